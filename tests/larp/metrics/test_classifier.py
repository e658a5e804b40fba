"""The classifier of clips: accuracy, determinism, cache, and agreement."""

import json
import os

from larp.data.clips import ClipShape
from larp.data.video import write_video
from larp.metrics import classifier as module
from larp.metrics.classifier import ClipClassifier, agreement, blur, classifier_of, clip_features, train

import pytest
import torch

CLASSES = ("still red", "moving red", "still blue")
SHAPE = ClipShape(6, 16, 16)


def clips_of(label: int, count: int, seed: int) -> torch.Tensor:
    """Noisy clips (count, 3, 6, 16, 16) that differ in colour, or only in that their pattern moves."""
    noise = torch.Generator().manual_seed(1000 * seed + label)
    pattern = torch.rand(count, 1, 1, 16, 16, generator=noise).repeat(1, 1, 6, 1, 1)
    if CLASSES[label].startswith("moving"):
        pattern = torch.stack([pattern[:, :, k].roll(3 * k, -1) for k in range(6)], dim=2)
    colour = torch.tensor([0.2, 0.3, 0.9] if "blue" in CLASSES[label] else [0.9, 0.3, 0.2]).view(1, 3, 1, 1, 1)
    return (colour * (0.4 + 0.6 * pattern)).clamp(0, 1)


def batches(seed: int):
    return [(clips_of(label, 12, seed), torch.full((12,), label)) for label in range(3)]


def manifest(folder, labelled: bool = True, count: int = 4) -> str:
    """Write `count` videos of each class and a broken one; returns the data spec."""
    lines = []
    for label, name in enumerate(CLASSES):
        for number, clip in enumerate(clips_of(label, count, 0)):
            path = f"{label}-{number}.mp4"
            frames = (clip * 255).byte().permute(1, 2, 3, 0).repeat(2, 1, 1, 1).contiguous().numpy()
            write_video(folder / path, frames, 25, quality=10)
            lines.append({"path": path, "split": "train"} | ({"label": name} if labelled else {}))
    (folder / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42 broken")
    lines.append({"path": "broken.mp4", "split": "train"} | ({"label": CLASSES[0]} if labelled else {}))
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return f"jsonl:{folder / 'list.jsonl'}"


def test_colours_and_motion_of_unseen_clips_are_classified():
    classifier = train(batches(0), CLASSES)
    for clips, labels in batches(1):
        assert (classifier.predict(clips) == labels).float().mean() > 0.9


def test_blurred_clips_are_classified():
    classifier = train(batches(0), CLASSES)
    hits = [(classifier.predict(blur(clips, 1, 2)) == labels) for clips, labels in batches(1)]
    assert torch.cat(hits).float().mean() > 0.9


def test_the_same_clips_give_the_same_classifier_whatever_the_batches():
    one, again = train(batches(0), CLASSES), train(batches(0), CLASSES)
    assert torch.equal(one.weight, again.weight) and torch.equal(one.bias, again.bias)
    clips = torch.cat([part for part, _ in batches(1)])
    assert torch.equal(one.predict(clips), torch.cat([one.predict(part) for part in clips.split(5)]))


def test_softening_takes_detail_and_keeps_the_rest():
    clip = clips_of(1, 2, 0)
    soft = blur(clip, 2, 4)
    assert soft.shape == clip.shape and soft.mean().item() == pytest.approx(clip.mean().item(), abs=0.02)
    assert soft.std(dim=(3, 4)).mean() < 0.7 * clip.std(dim=(3, 4)).mean() and torch.equal(blur(clip, 1, 1), clip)


def test_saved_and_loaded(tmp_path):
    classifier = train(batches(0), CLASSES, {"data": "mine"})
    classifier.save(tmp_path / "new" / "classifier.safetensors")
    again = ClipClassifier.load(tmp_path / "new" / "classifier.safetensors")
    assert (again.classes, again.key) == (CLASSES, {"data": "mine"}) and torch.equal(again.weight, classifier.weight)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad\.safetensors: not a saved classifier"):
        ClipClassifier.load(tmp_path / "bad.safetensors")


def test_it_is_trained_once_for_the_same_videos(tmp_path, monkeypatch):
    monkeypatch.setenv("LARP_DATA", str(tmp_path / "cache"))
    data = manifest(tmp_path)
    classifier = classifier_of(data, SHAPE)
    assert classifier.classes == tuple(sorted(CLASSES)) and classifier.key["shape"] == [6, 16, 16, 1]
    calls = []
    monkeypatch.setattr(module, "train", lambda *a: calls.append(a) or train(*a))
    assert torch.equal(classifier_of(data, SHAPE).weight, classifier.weight) and not calls
    os.utime(tmp_path / "0-0.mp4", (1, 1))
    assert classifier_of(data, SHAPE) and len(calls) == 1
    assert classifier_of(data, ClipShape(4, 16, 16)) and len(calls) == 2


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"13 of 13 videos have no class, such as 0-0\.mp4"):
        classifier_of(manifest(tmp_path, labelled=False), SHAPE)
    with pytest.raises(ValueError, match="no training clip of still blue"):
        train(batches(0)[:2], CLASSES)
    with pytest.raises(ValueError, match="at least 2 classes"):
        train([(clips_of(0, 3, 0), torch.zeros(3, dtype=torch.int64))], CLASSES[:1])
    for shape in ((2, 1, 6, 16, 16), (2, 3, 1, 16, 16), (2, 3, 6, 4, 16), (3, 6, 16, 16)):
        with pytest.raises(ValueError, match="at least 2 frames and 8x8"):
            clip_features(torch.rand(shape))


def test_agreement_counts_and_bounds():
    figures = agreement([0, 0, 0, 1, 1], torch.tensor([0, 0, 1, 1, 2]), CLASSES)
    assert figures["confusion"] == [[2, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert (figures["accuracy"], figures["chance"], figures["num_clips"]) == (3 / 5, 1 / 3, 5)
    assert figures["by_class"] == {"still red": 2 / 3, "moving red": 1 / 2}
    low, high = figures["interval_95"]
    assert 0 < low < 0.6 < high < 1
    with pytest.raises(ValueError, match="2 labels for 1 clips"):
        agreement([0, 1], torch.tensor([0]), CLASSES)
    with pytest.raises(ValueError, match="at least 1"):
        agreement([], torch.tensor([], dtype=torch.int64), CLASSES)


@pytest.mark.slow
@pytest.mark.long
def test_real_clips_are_classified(clips_root, tmp_path, monkeypatch):
    """Four of five test clips of six classes of UCF-101, from groups of videos that it was not trained on."""
    from larp.data.datasets import open_videos
    from larp.data.loader import iterate_once

    monkeypatch.setenv("LARP_DATA", str(tmp_path))
    data, shape = f"ucf101:{clips_root / 'ucf101'}", ClipShape(16, 64, 64)
    classifier = classifier_of(data, shape)
    rows = [(classifier.predict(b["clip"]), b["label"]) for b in iterate_once(open_videos(data, "test"), shape, 16)]
    predictions, labels = (torch.cat(part) for part in zip(*rows, strict=True))
    assert agreement(labels, predictions, classifier.classes)["accuracy"] > 0.77
