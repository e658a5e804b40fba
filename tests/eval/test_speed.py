"""eval/speed.py: a result that differs is refused, and the record holds every figure, whatever its value."""

import json

from bench.reference import ReferenceTokenizer
from eval import speed

import pytest
import torch

RECIPE = """
batch_size = 8
[model]
num_frames = 4
height = 16
width = 16
patch_size = [2, 8, 8]
num_tokens = 6
codebook_size = 32
code_dim = 8
encoder_width = 32
encoder_depth = 2
encoder_heads = 2
decoder_width = 32
decoder_depth = 2
decoder_heads = 2
[model.prior]
depth = 1
heads = 2
width = 16
positions = 6
[adversary]
hidden = 16
depth = 2
heads = 2
"""


def run(tmp_path, *arguments: str) -> dict:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    sizes = ["--size", str(tmp_path / "tiny.toml"), "--device", "cpu", "--pairs", "3"]
    return speed.main([*sizes, "--out", str(tmp_path / "speed.json"), *arguments])


def test_inference_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "in_fresh_process", lambda work, *arguments: work(*arguments))
    report = run(tmp_path, "--what", "inference", "--batch-size", "3")
    assert json.loads((tmp_path / "speed.json").read_text()) == report
    assert report["agreement"]["largest_difference_of_clips"] < 1e-4
    for kind in ("encode", "decode", "encode+decode"):
        for way in speed.WAYS:
            own = report[kind][way]
            assert (
                len(own["all_seconds"]) == 3 == len(own["all_cpu_seconds"])
                and own["clips_per_second"] == 3 / own["seconds"]
            )
            assert own["share_of_rate"] > 0 and own["flops_per_clip"] > 1e5 and own["cpu_seconds"] > 0
        for ratio in (report[kind]["time_ratio"], report[kind]["cpu_time_ratio"]):
            assert ratio["lowest"] <= ratio["median"] <= ratio["highest"]
        assert report[kind]["floor_seconds"] > 0
    assert report["encode+decode"]["ours"]["peak_memory"] > 1e8
    assert "training step" not in report
    printed = capsys.readouterr().out
    assert "encode+decode" in printed and "load average" in printed and "CPU time" in printed


@pytest.mark.slow
def test_onnx_from_the_command_line(tmp_path, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs pip install 'larp-mllm[onnx]'")
    report = run(tmp_path, "--what", "onnx", "--batch-size", "2")["onnx"]
    assert report["codes"] == 12 and report["largest_difference_of_clips"] < 1e-4
    for name in ("encode", "decode"):
        for way in ("ours", "onnxruntime"):
            assert len(report[name][way]["all_seconds"]) == 3
        assert report[name]["cpu_time_ratio"]["median"] > 0
    assert "of 12 codes differ" in capsys.readouterr().out
    with pytest.raises(ValueError, match="onnx, which is compared on a CPU in fp32"):
        speed.SpeedConfig(what=("onnx",), device="cpu", precision="bf16")


def test_training_steps_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "in_fresh_process", lambda work, *arguments: work(*arguments))
    report = run(tmp_path, "--what", "training", "adversarial")
    for kind in ("training step", "adversarial step"):
        ours, reference = (report[kind][way] for way in speed.WAYS)
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-3) and ours["peak_memory"] > 1e8
        assert ours["flops_per_clip"] < reference["flops_per_clip"] and report[kind]["memory_ratio"] > 0
    steps = [report[kind]["ours"]["flops_per_clip"] for kind in ("training step", "adversarial step")]
    assert steps[0] < steps[1]


def test_a_different_result_is_refused_before_anything_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        ReferenceTokenizer, "decode_latents", lambda self, latents: self.model.decode_latents(latents) + 0.01
    )
    with pytest.raises(ValueError, match="the two implementations differ"):
        run(tmp_path, "--what", "inference")
    assert not (tmp_path / "speed.json").exists()


def test_what_is_wrong_on_the_command_line_is_named(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no recipe 'tokenizer-ucf46'.*did you mean 'tokenizer-ucf64'"):
        speed.main(["--size", "tokenizer-ucf46", "--out", str(tmp_path / "x.json")])
    for wrong in (["--batch-size", "0"], ["--pairs", "2"], ["--what", "sampling"], ["--precision", "fp8"]):
        with pytest.raises(SystemExit):
            run(tmp_path, *wrong)
        assert wrong[0].strip("-") in capsys.readouterr().err.replace("_", "-")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            speed.SpeedConfig(device="cuda")
    with pytest.raises(ValueError, match="what is empty"):
        speed.SpeedConfig(what=())
