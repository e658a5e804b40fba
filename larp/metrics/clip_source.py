"""Clips of named classes, made by a model of any kind: the generated side of an evaluation.

`GeneratorSource` makes them with an AR generator. `larp_mllm.metrics.clip_source` has the source for a language model.

Shapes: n clips in all, b clips of a batch, T frames, H x W pixels, N codes of a clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from larp.data.clips import ClipShape
from larp.data.listing import VideoSet, of_classes
from larp.metrics.clipsets import class_numbers, generated_clips
from larp.models.class_names import class_number
from larp.models.generator import LarpGenerator
from larp.models.tokenizer import LarpTokenizer
from larp.sampling.guidance import guidance_scales
from larp.sampling.options import GuidedSampling

from torch import Tensor


class ClipSource(Protocol):
    """A model that makes a clip for a class of a data set."""

    tokenizer: LarpTokenizer
    """Decodes the codes that the model samples."""

    @property
    def shape(self) -> ClipShape:
        """The shape of the clips, and the stride at which the model saw videos."""

    @property
    def checkpoints(self) -> Mapping[str, str]:
        """Hashes of the weights, by name."""

    def select(self, videos: VideoSet) -> VideoSet:
        """Return the videos of the classes that the model knows, with a further note if there are others; ValueError if it knows none."""

    def check(self, videos: VideoSet, labels: Sequence[int], *samplings: GuidedSampling) -> None:
        """Raise ValueError, before anything is computed, for a class or a way of sampling that the model does not know."""

    def notes(self, videos: VideoSet) -> dict[str, Any]:
        """Return what a record needs to say beside the checkpoints."""

    def clips(
        self, videos: VideoSet, labels: Sequence[int], sampling: GuidedSampling, seed: int, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a clip for each label (n,), in batches: clips (b, 3, T, H, W) in [0, 1] and codes int64 (b, N) on the CPU.

        Seed and place in `labels` determine a clip, for any batch size.
        """


@dataclass(frozen=True)
class GeneratorSource:
    """A class-conditional generator with its tokenizer, as a `ClipSource`."""

    generator: LarpGenerator
    tokenizer: LarpTokenizer
    stride: int = 1
    """Distance of a clip's frames in the video, as in training."""

    @property
    def shape(self) -> ClipShape:
        """The shape of the tokenizer's clips, and the stride of the training."""
        return ClipShape(*self.tokenizer.config.clip_shape, stride=self.stride)

    @property
    def checkpoints(self) -> dict[str, str]:
        """The weight hashes of both."""
        return {"generator": self.generator.weight_hash(), "tokenizer": self.tokenizer.weight_hash()}

    def select(self, videos: VideoSet) -> VideoSet:
        """Return the videos of the classes whose names the generator stores; all of them if it stores none."""
        names = self.generator.config.class_names
        # A number is the number of a class, see `LarpGenerator.class_labels`.
        selected = of_classes(
            videos,
            [name for name in videos.classes if not names or name.isdecimal() or class_number(name, names) is not None],
        )
        if selected is videos:
            return videos
        if not selected.classes:
            raise ValueError(
                f"the generator knows none of the {len(videos.classes)} classes of {videos.spec}, but {', '.join(names[:6])}"
                f"{', ...' if len(names) > 6 else ''}: give the data that it was trained on, or another generator"
            )
        note = (
            f"the generator knows {len(selected.classes)} of the {len(videos.classes)} classes of {videos.spec}: their "
            f"{len(selected)} videos are used"
        )
        return replace(selected, notes=(*videos.notes, note))

    def check(self, videos: VideoSet, labels: Sequence[int], *samplings: GuidedSampling) -> None:
        """Raise ValueError for an unknown class, and for guidance of none of a clip's codes."""
        for sampling in samplings:
            guidance_scales(sampling, self.tokenizer.num_tokens)
        class_numbers(self.generator, videos, labels)

    def notes(self, videos: VideoSet) -> dict[str, Any]:
        """Return the notes of the data; the checkpoints say everything else."""
        return {"notes": list(videos.notes)} if videos.notes else {}

    def clips(
        self, videos: VideoSet, labels: Sequence[int], sampling: GuidedSampling, seed: int, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield clips and codes for labels, see `larp.metrics.clipsets.generated_clips`."""
        condition = class_numbers(self.generator, videos, labels)
        return generated_clips(self.generator, self.tokenizer, condition, sampling, seed, batch_size)
