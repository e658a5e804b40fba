"""A zero-shot classifier of actions: the likeliest of a few Kinetics-400 classes, by the I3D whose logits are the features of FVD.

It was trained on other videos, so nothing measured here was tuned to it. It recognises actions, where
`larp.metrics.classifier` recognises layout and colours.

Shapes: B clips, T frames, H x W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from larp.metrics.i3d import ClipFeatures, open_features
from larp.metrics.weights import I3D_KINETICS

from torch import Tensor

KINETICS_CLASSES = {
    "Archery": (5, "archery"),
    "BasketballDunk": (107, "dunking basketball"),
    "HorseRace": (273, "riding or walking with horse"),
    "PlayingPiano": (241, "playing piano"),
    "PlayingViolin": (250, "playing violin"),
    "Surfing": (337, "surfing water"),
}
"""UCF-101 class -> index and name of its Kinetics-400 class."""
_NOT_THE_SAME = {"HorseRace"}


@dataclass(frozen=True)
class KineticsClassifier:
    """Picks, among the Kinetics classes that the classes of a data set map to, the one with the largest logit."""

    name: ClassVar[str] = "zero_shot"
    """Key of its figures in a record."""

    classes: tuple[str, ...]
    """UCF-101 names of the K classes, each in `KINETICS_CLASSES`."""
    features: ClipFeatures
    """Maps clips to the 400 logits of Kinetics."""

    @property
    def notes(self) -> dict[str, Any]:
        """Return what a record says of it: the features, the Kinetics name of each class, and names that are not the same class."""
        return {
            "features": self.features.name,
            "features_weights": self.features.weights_hash,
            "kinetics": {name: KINETICS_CLASSES[name][1] for name in self.classes},
            "not_the_same_class": [name for name in self.classes if name in _NOT_THE_SAME],
        }

    def scores(self, clip: Tensor) -> Tensor:
        """Return the logits, float32 (B, K) on the CPU, of clips (B, 3, T, H, W) in [0, 1]; ValueError for too few frames."""
        return self.features(clip)[:, [KINETICS_CLASSES[name][0] for name in self.classes]]


def kinetics_classifier(classes: Sequence[str], frames: int, device: str) -> KineticsClassifier | str:
    """Return the classifier for the classes of a data set and clips of `frames` frames, or why there is none.

    It needs a Kinetics class for every class, the weights of I3D, and as many frames as I3D takes.
    """
    if unknown := [name for name in classes if name not in KINETICS_CLASSES]:
        return f"no Kinetics class is known for {', '.join(unknown[:3])} ({len(unknown)} of {len(classes)} classes)"
    if not I3D_KINETICS.find():
        return f"the weights of I3D are not at hand (larp-mllm fetch {I3D_KINETICS.name})"
    features = open_features("auto", device=device)
    if frames < features.min_frames:
        return f"I3D needs {features.min_frames} frames, the clips have {frames}"
    return KineticsClassifier(tuple(classes), features)
