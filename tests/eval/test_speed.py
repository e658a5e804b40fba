"""eval/speed.py: the two ways agree, the operations are counted rightly, and every figure is there."""

import json
from dataclasses import replace

from bench import flops, timing
from bench.reference import ReferenceTokenizer, judge
from eval import speed
from larp.engine.adversary import AdversaryConfig
from larp.kernels import matmul as products
from larp.models.discriminator import Discriminator
from larp.models.noise import BatchNoise
from larp.models.objective import tokenizer_loss
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

CONFIG = TokenizerConfig(
    num_frames=4, height=16, width=24, patch_size=(2, 8, 8), decoder_patch_size=(2, 4, 8), num_tokens=6, codebook_size=32,
    code_dim=8, encoder_width=32, encoder_depth=2, encoder_heads=4, decoder_width=16, decoder_depth=3, decoder_heads=2,
    prior=PriorConfig(depth=2, heads=2, width=24, positions=6, dropout=0.0),
)  # fmt: skip
ADVERSARY = AdversaryConfig(hidden=16, depth=2, heads=2).discriminator(CONFIG)
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


def build() -> LarpTokenizer:
    model = LarpTokenizer(CONFIG)
    torch.nn.init.normal_(model.head.weight, std=0.05)
    return model


def test_both_ways_are_the_same_mathematics():
    model, clip = build(), torch.rand(2, 3, *CONFIG.clip_shape)
    plain = ReferenceTokenizer(model)
    assert torch.equal(model.encode(clip), plain.encode(clip))
    torch.testing.assert_close(model.decode(model.encode(clip)), plain.decode(plain.encode(clip)))
    slopes = []
    for way in (model, plain):
        out = way(clip, BatchNoise(0, 0, 2), 0.5)
        loss, _ = tokenizer_loss(speed.LossConfig(), clip, out)
        slopes.append([loss, out.reconstruction, *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    discriminator = Discriminator(ADVERSARY)
    torch.testing.assert_close(discriminator(clip), judge(discriminator, clip))


def counted(work) -> int:
    """What torch counts, where it knows every operation: without oneDNN's products and fused attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("pruned", [True, False], ids=["ours", "straightforward"])
def test_operations_are_those_that_torch_counts(monkeypatch, pruned):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    model, clip, discriminator = build(), torch.rand(2, 3, *CONFIG.clip_shape), Discriminator(ADVERSARY)
    way, score = (model, discriminator) if pruned else (ReferenceTokenizer(model), lambda x: judge(discriminator, x))
    codes = model.encode(clip)
    assert counted(lambda: way.encode(clip)) == flops.forward_flops(flops.encode_products(CONFIG, 2, pruned))
    assert counted(lambda: way.decode(codes)) == flops.forward_flops(flops.decode_products(CONFIG, 2, pruned))
    subject = speed.Subject(CONFIG, AdversaryConfig(), speed.LossConfig(), speed.SpeedConfig(device="cpu"))
    optimizers = {module: torch.optim.SGD(module.parameters()) for module in (model, discriminator)}
    alone = dict(list(optimizers.items())[:1])
    assert counted(lambda: speed.step_once(subject, way, None, alone, clip)) == flops.step_flops(
        CONFIG, None, 2, pruned
    )
    assert counted(lambda: speed.step_once(subject, way, score, optimizers, clip)) == flops.step_flops(
        CONFIG, ADVERSARY, 2, pruned
    )


def test_the_papers_size():
    ours, plain = (
        flops.forward_flops(
            flops.encode_products(TokenizerConfig(), 1, pruned) + flops.decode_products(TokenizerConfig(), 1, pruned)
        )
        for pruned in (True, False)
    )
    assert 0.96 < ours / plain < 0.97 and round(plain / 1e9) == 1008


def test_without_a_prior_it_costs_nothing():
    bare = replace(CONFIG, prior=PriorConfig(enabled=False))
    assert not flops.prior_products(bare) and flops.step_flops(bare) < flops.step_flops(CONFIG)


def run(tmp_path, *arguments: str) -> dict:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    sizes = ["--size", str(tmp_path / "tiny.toml"), "--device", "cpu", "--repeats", "2", "--rounds", "1"]
    return speed.main([*sizes, "--out", str(tmp_path / "speed.json"), *arguments])


def test_inference_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "in_fresh_process", lambda work, *arguments: work(*arguments))
    report = run(tmp_path, "--what", "inference", "--batch-size", "3")
    assert json.loads((tmp_path / "speed.json").read_text()) == report
    assert report["agreement"]["largest_difference_of_clips"] < 1e-4
    for kind in ("encode", "decode", "encode+decode"):
        for way in speed.WAYS:
            own = report[kind][way]
            assert len(own["all_seconds"]) == 2 and own["clips_per_second"] == 3 / own["seconds"]
            assert own["share_of_rate"] > 0 and own["flops_per_clip"] > 1e5 and own["cpu_seconds"] > 0
        assert report[kind]["time_ratio"]["lowest"] <= report[kind]["time_ratio"]["highest"]
        assert report[kind]["floor_seconds"] > 0
    assert report["encode+decode"]["ours"]["peak_memory"] > 1e8
    assert "training step" not in report
    printed = capsys.readouterr().out
    assert "encode+decode" in printed and "load average" in printed and "threads" in printed


def test_training_steps_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "in_fresh_process", lambda work, *arguments: work(*arguments))
    report = run(tmp_path, "--what", "training", "adversarial")
    for kind in ("training step", "adversarial step"):
        ours, plain = (report[kind][way] for way in speed.WAYS)
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-3) and ours["peak_memory"] > 1e8
        assert ours["flops_per_clip"] < plain["flops_per_clip"] and report[kind]["memory_ratio"] > 0
    steps = [report[kind]["ours"]["flops_per_clip"] for kind in ("training step", "adversarial step")]
    assert steps[0] < steps[1]


@pytest.mark.slow
def test_fresh_processes_have_memory_and_threads_of_their_own():
    before = timing.peak_memory(torch.device("cpu"))
    ballast = torch.ones(2**29, dtype=torch.uint8)
    assert timing.peak_memory(torch.device("cpu")) >= before + 2**29 - 2**28
    assert timing.in_fresh_process(timing.peak_memory, torch.device("cpu")) < len(ballast)
    assert timing.in_fresh_process(torch.get_num_threads) == torch.get_num_threads()


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
    for wrong in (["--batch-size", "0"], ["--rounds", "0"], ["--what", "sampling"], ["--precision", "fp8"]):
        with pytest.raises(SystemExit):
            run(tmp_path, *wrong)
        assert wrong[0].strip("-") in capsys.readouterr().err.replace("_", "-")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            speed.SpeedConfig(device="cuda")
    with pytest.raises(ValueError, match="what is empty"):
        speed.SpeedConfig(what=())
