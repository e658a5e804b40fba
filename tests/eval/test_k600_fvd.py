"""eval/k600_fvd.py, from the command line to the files, with tiny random models."""

import json
import re
import shutil
from dataclasses import replace

from eval import k600_fvd
from larp.data.video import write_video
from larp.metrics.i3d import RANDOM_NAME
from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig
from tests.larp_mllm.tiny import tiny_mllm

import numpy as np
import pytest
import torch
from PIL import Image

_SHRINK = dict(encoder_width=32, encoder_depth=1, encoder_heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2)


class FrameColours:
    """Stands in for I3D, which takes its time: the mean colour of each frame."""

    name, dim, min_frames, weights_hash = RANDOM_NAME, 12, 1, "none"

    def __call__(self, clip):
        assert clip.shape[1:] == (3, 4, 64, 64) and clip.min() >= 0 and clip.max() <= 1
        return clip.mean(dim=(3, 4)).flatten(1).cpu()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Videos that drift (validation) or stand still (test), a tokenizer of 4 frames, and generators."""
    root = tmp_path_factory.mktemp("prediction")
    lines, rng = [], np.random.default_rng(0)
    for number in range(6):
        texture = rng.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
        for split, speed in (("validation", 1), ("test", 0)):
            frames = np.concatenate([np.roll(texture, speed * k, axis=2) for k in range(9)])
            write_video(root / f"{split}-{number}.mp4", frames, 25, quality=10)
            lines.append({"path": f"{split}-{number}.mp4", "split": split})
    (root / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42 broken")
    lines.append({"path": "broken.mp4", "split": "validation"})
    (root / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    torch.manual_seed(0)
    sizes = dict(num_frames=4, height=16, width=16, num_tokens=4, codebook_size=32, code_dim=4, **_SHRINK)
    tokenizer = LarpTokenizer(TokenizerConfig(**sizes, prior=PriorConfig(enabled=False)))
    torch.nn.init.normal_(tokenizer.head.weight, std=0.05)
    tokenizer.save_pretrained(root / "tokenizer")
    small = dict(num_tokens=4, codebook_size=32, depth=1, heads=2, width=16, ffn_multiple=16)
    for name, more in (
        ("plain", {}),
        ("guided", {"null_condition": True}),
        ("class", {"task": "class", "num_classes": 2}),
    ):
        model = LarpGenerator(GeneratorConfig(**small | {"task": "frame-prediction"} | more))
        torch.nn.init.normal_(model.output.weight, std=2.0)
        model.save_pretrained(root / name)
    return root


@pytest.fixture
def run(world, monkeypatch):
    monkeypatch.setattr("larp.metrics.evaluation.open_features", lambda *_: FrameColours())

    def run(out, *extra, generator="plain"):
        options = {"--generator": world / generator, "--tokenizer": world / "tokenizer", "--out": out, "--repeats": 2}
        options |= {"--data": f"jsonl:{world / 'list.jsonl'}", "--device": "cpu", "--given": 2, "--num-clips": 6}
        return k600_fvd.main([*(str(part) for pair in options.items() for part in pair), *extra])

    return run


def test_every_predicted_frame_stands_beside_the_baselines(run, tmp_path, capsys):
    out = tmp_path / "new" / "x.json"
    report = run(out, "--show", "2", "--batch-size", "4")
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    assert report["frame"] == [3, 4] and report["num_clips"] == 6
    for name in ("psnr", "ssim"):
        assert set(report["per_frame"][name]) == set(k600_fvd.WAYS)
        for way in k600_fvd.WAYS:
            assert np.mean(report["per_frame"][name][way]) == pytest.approx(report["mean"][name][way])
    # A drifting picture is ever less like the frame that was copied.
    copied = report["per_frame"]["psnr"][k600_fvd.COPY]
    assert copied[0] > copied[1]
    means = report["mean"]["psnr"]
    for way in (k600_fvd.COPY, k600_fvd.CODED_COPY):
        gain = report["psnr_above"][way]
        assert gain["mean"] == pytest.approx(means[k600_fvd.PREDICTION] - means[way])
        assert gain["interval_95"][0] < gain["mean"] < gain["interval_95"][1] and 0 <= gain["share_of_clips"] <= 1
    assert [entry["name"] for entry in report["skipped"]] == ["broken.mp4"]
    assert min(Image.open(tmp_path / "new" / "x.png").size) > 50
    printed = capsys.readouterr().out
    assert (
        "prediction above copy of the last given frame" in printed
        and "NOT comparable" in printed
        and "skipped broken.mp4" in printed
    )


def test_a_video_that_turns_out_damaged_is_replaced_and_named(world, run, tmp_path, capsys):
    for path in world.glob("validation-*.mp4"):
        shutil.copy(path, tmp_path)
    damaged = bytearray((tmp_path / "validation-2.mp4").read_bytes())
    start = damaged.index(b"mdat") + 4
    size = int.from_bytes(damaged[start - 8 : start - 4], "big") - 8
    damaged[start : start + size] = bytes(size)
    (tmp_path / "validation-2.mp4").write_bytes(damaged)
    report = run(tmp_path / "x.json", "--data", f"folder:{tmp_path}", "--split", "all", "--num-clips", "6")
    assert [entry["name"] for entry in report["skipped"]] == ["validation-2.mp4"]
    assert report["num_clips"] == 6 and report["frechet"]["floor"]["num_clips"] == 5
    assert "skipped validation-2.mp4" in capsys.readouterr().out


def test_the_frechet_figure_is_the_protocols(run, tmp_path):
    figure = run(tmp_path / "x.json", "--show", "0")["frechet"]
    assert figure["metric"] == "frechet-random-i3d" and not figure["comparable"]
    protocol = figure["protocol"]
    assert protocol["name"] == "larp-k600-fp" and protocol["split"] == "validation"
    assert (protocol["height"], protocol["width"]) == (64, 64) and protocol["frame_rule"].startswith("2 frames given")
    rows = {row["clips"]: row["value"] for row in figure["table"]}
    assert len(rows) == 6 and figure["value"] == rows["prediction, all frames decoded"]
    assert rows["other real clips (the floor)"] == figure["floor"]["value"]
    # Real frames in front bring a prediction nearer to the real clips.
    assert rows["prediction, given frames pasted"] < figure["value"]
    assert not (tmp_path / "x.png").exists()


def test_given_frames_are_pasted_exactly(world):
    """Where nothing moves, copying is right to the last bit, and of a prediction the given frames are."""
    config = k600_fvd.PredictionConfig(given=3, num_clips=4, show=4, device="cpu")
    models = {"generator": str(world / "plain"), "tokenizer": str(world / "tokenizer"), "data": "unread"}
    clip = torch.rand(4, 3, 1, 16, 16).mul(255).round().div(255).expand(-1, -1, 4, -1, -1).contiguous()
    seen = k600_fvd.measure(
        k600_fvd.open_predictor(replace(config, **models)),
        iter([clip]),
        FrameColours(),
        None,
        config,
    )
    assert torch.cat(seen.figures["psnr"][k600_fvd.COPY]).tolist() == [[100.0]] * 4
    # The codes of a clip that does not move are those of its first frames repeated.
    coded, again = (torch.cat(seen.figures["psnr"][way]) for way in (k600_fvd.CODED_COPY, k600_fvd.RECONSTRUCTION))
    assert torch.equal(coded, again)
    for frames in seen.shown:
        above, below = frames[:, :16], frames[:, 16:]
        assert (above[:3] == below[:3]).all() and (above[3] != below[3]).any()


def test_seed_given_guidance_and_sampling_act_and_the_batch_does_not(run, tmp_path):
    def mean(*extra):
        report = run(tmp_path / "x.json", "--show", "0", *extra, generator="guided")
        return report["mean"]["psnr"][k600_fvd.PREDICTION]

    plain = mean()
    assert mean("--batch-size", "3") == pytest.approx(plain, rel=1e-6)
    for extra in (
        ["--seed", "1"],
        ["--given", "3"],
        ["--guidance-scale", "4"],
        ["--temperature", "0"],
        ["--top-k", "2"],
    ):
        assert mean(*extra) != pytest.approx(plain, rel=1e-6), extra


@pytest.fixture(scope="module")
def mllm(tmp_path_factory):
    """A language model that continues two frames."""
    model = tiny_mllm()
    tokenizer = model.processor.video_tokenizer
    torch.nn.init.normal_(tokenizer.head.weight, std=0.05)
    model.model.config.update({"given_frames": 2, "video_tokenizer_hash": tokenizer.weight_hash()})
    folder = tmp_path_factory.mktemp("mllm") / "model"
    model.save(folder)
    return folder


def test_a_language_model_in_place_of_a_generator(run, mllm, tmp_path):
    alone = ["--generator", "", "--tokenizer", "", "--mllm", str(mllm), "--show", "0"]
    report = run(tmp_path / "x.json", *alone)
    assert {"mllm/model.safetensors", "tokenizer"} < set(report["frechet"]["checkpoints"])
    again = run(tmp_path / "x.json", *alone, "--batch-size", "3")
    assert report["mean"]["psnr"] == pytest.approx(again["mean"]["psnr"], rel=1e-6), "for any batch size"
    other = run(tmp_path / "x.json", *alone, "--seed", "1")
    assert report["mean"]["psnr"] != pytest.approx(other["mean"]["psnr"], rel=1e-6)
    for extra, message in (
        (["--given", "3"], "--given 3: this model continues 2 frames"),
        (["--guidance-final", "2"], "one guidance scale"),
        (["--tokenizer", "x"], "--mllm: a language model has its own video tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "x.json", *alone, *extra)


def test_the_split_is_the_one_asked_for(run, tmp_path):
    report = run(tmp_path / "x.json", "--show", "0", "--split", "test")
    assert report["frechet"]["protocol"]["split"] == "test" and report["skipped"] == []
    assert report["median_psnr"][k600_fvd.COPY] > 35


@pytest.mark.parametrize(
    ("extra", "generator", "message"),
    [
        (["--given", "4"], "plain", "--given 4: clips have 4 frames; give 1 to 3"),
        (["--given", "0"], "plain", "--given 0"),
        (["--guidance-scale", "2"], "plain", "guidance_scale 1.0"),
        ([], "class", "is conditional on classes; this needs one that predicts frames"),
        (["--num-clips", "40"], "plain", "windows of 4 frames"),
        (["--tokenizer", ""], "plain", "--generator and --tokenizer, or --mllm: give the model to measure"),
        (["--out", "x.png"], "plain", "is the name of a picture"),
        (["--variant", "ema"], "plain", "holds no variant 'ema'"),
    ],
)
def test_mistakes_end_in_one_line(run, tmp_path, extra, generator, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(tmp_path / "x.json", *extra, generator=generator)
    assert not (tmp_path / "x.json").exists()
