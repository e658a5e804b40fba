"""The zero-shot classifier: the likeliest of the classes that the data have, and when there is none."""

from types import SimpleNamespace

from larp.data.clips import frames_to_clip
from larp.data.video import read_video
from larp.metrics import kinetics_classifier as module
from larp.metrics.classifier import classify
from larp.metrics.i3d import TFHUB_NAME
from larp.metrics.kinetics_classifier import KINETICS_CLASSES, KineticsClassifier, kinetics_classifier

import pytest
import torch


class FakeLogits:
    """The first pixel of a clip, times 400, names the class with the largest logit; archery comes next."""

    name, dim, min_frames, weights_hash = TFHUB_NAME, 400, 10, "fake"

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(clip), 400)
        logits[:, 5] = 1
        logits[torch.arange(len(clip)), (clip[:, 0, 0, 0, 0] * 400).round().long()] = 2
        return logits


def clips_of(*numbers: int) -> torch.Tensor:
    return (torch.tensor(numbers) / 400).view(-1, 1, 1, 1, 1).expand(-1, 3, 10, 8, 8)


def test_only_the_classes_of_the_data_are_chosen_among():
    classifier = KineticsClassifier(("Surfing", "PlayingPiano", "Archery"), FakeLogits())
    # 250 is playing the violin, which these data do not have.
    scores = classifier.scores(clips_of(337, 241, 5, 250))
    assert scores.tolist() == [[2, 0, 1], [0, 2, 1], [0, 0, 2], [0, 0, 1]]


def test_a_class_that_is_not_the_same_is_named():
    notes = KineticsClassifier(("HorseRace", "Surfing"), FakeLogits()).notes
    assert notes["not_the_same_class"] == ["HorseRace"] and notes["features"] == TFHUB_NAME
    assert notes["kinetics"] == {"HorseRace": "riding or walking with horse", "Surfing": "surfing water"}


def test_several_classifiers_of_the_same_clips():
    class Always:
        name, classes = "always", ("Surfing", "Archery")

        def scores(self, clip: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, 1.0]]).expand(len(clip), 2)

    batches = [(clips_of(337, 5), torch.tensor([0, 1])), (clips_of(5), torch.tensor([0]))]
    figures = classify([Always(), KineticsClassifier(("Surfing", "Archery"), FakeLogits())], batches)
    assert figures["confusion"] == [[0, 2], [0, 1]] and figures["accuracy"] == pytest.approx(1 / 3)
    assert figures["zero_shot"]["confusion"] == [[1, 1], [0, 1]] and figures["zero_shot"]["num_clips"] == 3


def test_why_there_is_none(monkeypatch):
    # The tests' cache folder has no weights.
    assert "larp-mllm fetch i3d" in kinetics_classifier(("Surfing", "Archery"), 16, "cpu")
    assert "no Kinetics class is known for Knitting (1 of 2 classes)" in kinetics_classifier(
        ("Knitting", "Archery"), 16, "cpu"
    )
    monkeypatch.setattr(module, "I3D_KINETICS", SimpleNamespace(find=lambda: ("a file",)))
    monkeypatch.setattr(module, "open_features", lambda *_, **__: FakeLogits())
    assert "I3D needs 10 frames, the clips have 4" in kinetics_classifier(("Surfing", "Archery"), 4, "cpu")
    assert kinetics_classifier(("Surfing", "Archery"), 10, "cpu").classes == ("Surfing", "Archery")


def test_what_all_clips_share_is_left_out_of_the_centred_figure():
    class Archers:
        """Archery scores highest everywhere, less so where it is not seen."""

        name, classes = "archers", ("Surfing", "Archery")

        def scores(self, clip: torch.Tensor) -> torch.Tensor:
            surfing = (clip[:, 0, 0, 0, 0] * 400).round() == 337
            return torch.stack([surfing.float(), torch.full((len(clip),), 9.0)], dim=1)

    batches = [(clips_of(337, 5), torch.tensor([0, 1])), (clips_of(5, 337), torch.tensor([1, 0]))]
    figures = classify([Archers(), Archers()], batches)
    assert figures["accuracy"] == figures["archers"]["accuracy"] == 0.5 and "centred" not in figures
    assert figures["archers"]["centred"]["accuracy"] == 1
    with pytest.raises(ValueError, match="no clip to classify"):
        classify([Archers()], [])


@pytest.mark.slow
def test_real_clips_are_recognised(fetched, clips_root):
    fetched("i3d")
    names = tuple(KINETICS_CLASSES)
    classifier, clips = kinetics_classifier(names, 16, "cpu"), []
    for name in ("Archery", "PlayingPiano", "Surfing"):
        path = min((clips_root / "ucf101/UCF-101" / name).glob("*_g08_*"))
        clips.append(frames_to_clip(read_video(path)[0][8:24], 128, 128))
    assert [names[number] for number in classifier.scores(torch.stack(clips)).argmax(dim=1)] == [
        "Archery",
        "PlayingPiano",
        "Surfing",
    ]
