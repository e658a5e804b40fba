"""eval/memorising.py, from the command line to the files, with tiny random models; a model that repeats training clips."""

import json
import re

from eval import memorising
from larp.data.video import read_video, write_video
from larp.metrics.clip_source import GeneratorSource
from larp.metrics.i3d import RandomI3D
from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.models.tokenizer import LarpTokenizer
from tests.larp_mllm.tiny import tiny_mllm

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

CLASSES = ("Archery", "Surfing")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Videos of coarse noise of two classes, a broken one, a language model, and a generator on codes of its tokenizer."""
    root = tmp_path_factory.mktemp("memorising")
    lines, rng = [], np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 5)):
        for number in range(count):
            for name in CLASSES:
                coarse = rng.integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
                path = f"{split}-{name}-{number}.mp4"
                write_video(root / path, coarse.repeat(4, 1).repeat(4, 2), 25, quality=10)
                lines.append({"path": path, "label": name, "split": split})
    (root / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42 broken")
    lines.append({"path": "broken.mp4", "label": "Archery", "split": "train"})
    (root / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    mllm = tiny_mllm()
    tokenizer = mllm.processor.video_tokenizer
    torch.nn.init.normal_(tokenizer.head.weight, std=0.1)
    mllm.model.config.video_tokenizer_hash = tokenizer.weight_hash()
    mllm.save(root / "mllm")
    tokenizer.save_pretrained(root / "tokenizer")
    small = dict(num_tokens=4, codebook_size=16, depth=1, heads=2, width=16, ffn_multiple=16)
    names = dict(num_classes=2, class_names=CLASSES, tokenizer_hash=tokenizer.weight_hash())
    LarpGenerator(GeneratorConfig(**small, **names)).save_pretrained(root / "generator")
    return root


@pytest.fixture(autouse=True)
def small_features(monkeypatch, tmp_path):
    monkeypatch.setenv("LARP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(memorising, "open_features", lambda *_: RandomI3D(width=0.05))


def run(world, out, *extra, mllm=False):
    options = {"--data": f"jsonl:{world / 'list.jsonl'}", "--out": out, "--device": "cpu", "--num-clips": 8}
    model = {"--generator": world / "generator", "--tokenizer": world / "tokenizer"}
    options |= {"--mllm": world / "mllm"} if mllm else model
    return memorising.main([*(str(part) for pair in options.items() for part in pair), *map(str, extra)])


@pytest.mark.parametrize("mllm", [False, True])
def test_it_measures_writes_and_prints(world, tmp_path, capsys, mllm):
    out = tmp_path / "new" / "x.json"
    report = run(world, out, "--guidance-scale", 1, 3, "--show", 2, "--batch-size", 3, mllm=mllm)
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    generated = ["generated, guidance 1", "generated, guidance 3"]
    training = ["training clips, to another training video", "training clips, to its own video"]
    through, plain = report["through_the_tokenizer"], report["as_they_are"]
    assert [row["clips"] for row in through] == [*generated, "held-out clips", *training]
    assert [row["clips"] for row in plain] == [*generated, "held-out clips", "held-out clips, reconstructed"]
    assert [row["num_clips"] for row in through] == [8, 8, 10, 24, 24]
    for row in (*through, *plain):
        assert 0 <= row["least"] <= row["quantile_01"] <= row["quantile_05"] <= row["median"] <= 2
    # The 5 % quantile of ten values has at most one below it.
    assert through[2]["nearer"] <= 0.1 and plain[3]["nearer"] <= 0.1
    assert (report["training_clips"], report["training_videos"]) == (24, 12)
    assert [entry["name"] for entry in report["skipped"]] == ["broken.mp4"]
    assert report["features"]["name"] == "frechet-random-i3d" and ("prompts" in report) == mllm
    assert min(Image.open(tmp_path / "new" / "x.png").size) > 50
    printed = capsys.readouterr().out
    assert "the nearest of 24 clips of 12 training videos" in printed and "skipped broken.mp4" in printed
    assert all(name in printed for name in [*generated, *training])


def test_a_model_that_repeats_training_clips_is_found_out(world, tmp_path, monkeypatch):
    """It gives the reconstructions of training clips, every other one mirrored, by a tokenizer that blurs."""
    monkeypatch.setattr(LarpTokenizer, "encode", lambda self, clip: F.avg_pool3d(clip, (1, 8, 8)))
    monkeypatch.setattr(LarpTokenizer, "decode", lambda self, codes: F.interpolate(codes, scale_factor=(1, 8, 8)))
    asked = []

    def repeat(self, videos, labels, sampling, seed, batch_size):
        asked.append((labels, sampling.top_k, seed))
        paths = [world / f"train-{CLASSES[label]}-{number % 6}.mp4" for number, label in enumerate(labels)]
        frames = np.stack([read_video(path)[0][0:4] for path in paths])
        clips = torch.from_numpy(frames).permute(0, 4, 1, 2, 3) / 255
        clips = self.tokenizer.decode(self.tokenizer.encode(clips))
        mirrored = torch.arange(len(clips)).view(-1, 1, 1, 1, 1) % 2 == 0
        yield torch.where(mirrored, clips.flip(-1), clips), torch.zeros(len(clips), 4, dtype=torch.int64)

    monkeypatch.setattr(GeneratorSource, "clips", repeat)
    report = run(world, tmp_path / "x.json", "--guidance-scale", 1, "--top-k", 3, "--seed", 5, "--show", 8)
    # The classes of eight of the ten held-out clips, which take turns.
    assert asked == [([0, 1, 0, 1, 1, 0, 1, 0], 3, 5)]
    row, held_out = report["through_the_tokenizer"][0], report["through_the_tokenizer"][1]
    assert row["median"] < 1e-4 < held_out["least"] and row["nearer"] == 1
    # Not so against the clips as they are: blur alone keeps it away.
    assert report["as_they_are"][0]["least"] > 1e-3


def test_the_sheet_shows_the_nearest_clips_first(world, tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(memorising, "write_sheet", lambda *given, **_: sheets.append(given) or [])
    run(world, tmp_path / "x.json", "--guidance-scale", 1, "--show", 3)
    ((pictures, captions, _),) = sheets
    assert len(pictures) == 3 and pictures[0].shape == (4, 32, 16, 3)
    found = [float(re.search(r"distance ([\d.]+);", text)[1]) for text in captions]
    assert found == sorted(found)
    # Below stands the training clip that the caption names: its first window of 4 frames of 9 begins at frame 0.
    name, window = re.search(r"below: (\S+), clip (\d)", captions[0]).groups()
    frames = read_video(world / name)[0][{"1": slice(0, 4), "2": slice(4, 8)}[window]]
    assert np.array_equal(pictures[0][:, 16:], frames)


def test_the_batch_and_a_second_run_do_not_change_it(world, tmp_path):
    first = run(world, tmp_path / "x.json", "--guidance-scale", 2, "--show", 0)
    again = run(world, tmp_path / "x.json", "--guidance-scale", 2, "--show", 0, "--batch-size", 5)
    assert not (tmp_path / "x.png").exists()
    for one, other in zip(first["through_the_tokenizer"], again["through_the_tokenizer"], strict=True):
        assert one["median"] == pytest.approx(other["median"], abs=1e-4)
    more = run(world, tmp_path / "x.json", "--guidance-scale", 2, "--show", 0, "--windows", 1)
    assert more["training_clips"] == 12 and len(more["through_the_tokenizer"]) == 3


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data", ""], "no data: give --data ucf101:ROOT"),
        (["--mllm", "x"], "both are given; give one of them"),
        (["--out", "x.png"], "is the name of a picture"),
    ],
)
def test_mistakes_end_in_one_line(world, tmp_path, extra, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(world, tmp_path / "x.json", *extra)


def test_clips_that_are_too_short_for_the_features(world, tmp_path, monkeypatch):
    features = RandomI3D(width=0.05)
    features.min_frames = 10
    monkeypatch.setattr(memorising, "open_features", lambda *_: features)
    with pytest.raises(
        ValueError, match="needs clips of 10 frames, the model's have 4; measure a model of longer clips"
    ):
        run(world, tmp_path / "x.json")


@pytest.mark.parametrize(
    "extra", [["--num-clips", "0"], ["--guidance-scale"], ["--guidance-scale", "-1"], ["--windows", "0"]]
)
def test_options_out_of_range_are_refused(world, tmp_path, extra, capsys):
    with pytest.raises(SystemExit):
        run(world, tmp_path / "x.json", *extra)
    assert extra[0][2:].split("-")[0] in capsys.readouterr().err.replace("_", "-")
