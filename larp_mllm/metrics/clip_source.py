"""The source of generated clips of an evaluation: a generator with its tokenizer, or a language model.

Shapes: n clips in all, b clips of a batch, T frames, H x W pixels, N codes of a clip.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from larp.data.clips import ClipShape
from larp.data.datasets import VideoSet, open_videos
from larp.data.listing import Split
from larp.engine.generator_run import find_training
from larp.files import user_path
from larp.metrics.classifier import require_labels
from larp.metrics.clip_source import ClipSource, GeneratorSource
from larp.metrics.clipsets import load_generator
from larp.metrics.evaluation import EvaluationConfig
from larp.metrics.protocols import checkpoint_hashes
from larp.models.tokenizer import LarpTokenizer
from larp.sampling.options import GuidedSampling
from larp_mllm.generation.sampling import VideoSampling
from larp_mllm.locate import find_generator, find_model, load_generator_tokenizer
from larp_mllm.metrics.evaluation import clip_shape, prompts_in_turn, prompts_of
from larp_mllm.pipeline import Mllm

import torch
from torch import Tensor

UCF101 = "LARP_UCF101"
"""Environment variable with the folder of UCF-101, for evaluations without --data."""
_UCF101_IS = (
    "UCF-101 is a public set of 13,320 videos of 101 human actions, for research, which does not come with larp-mllm: ROOT holds "
    "UCF-101/<class>/<video>.avi and the published lists, ucfTrainTestlist/*.txt"
)


@dataclass(frozen=True)
class MllmSource:
    """A language model as a `ClipSource`: the prompts of a class are its phrasings of training, in turn."""

    mllm: Mllm
    folder: Path
    """Of the model."""

    @classmethod
    def load(cls, model: str, device: str) -> "MllmSource":
        """Load a model folder, a run folder or a hub repository; ValueError as `Mllm.load`."""
        folder = find_model(model, "--mllm")
        return cls(Mllm.load(folder, device), folder)

    @property
    def tokenizer(self) -> LarpTokenizer:
        """The model's own video tokenizer."""
        return self.mllm.processor.video_tokenizer

    @property
    def shape(self) -> ClipShape:
        """The shape and stride of the clips that the model was trained on."""
        return clip_shape(self.mllm)

    @property
    def checkpoints(self) -> dict[str, str]:
        """The SHA-256 of each file of weights, and the hash of the tokenizer."""
        hashes = {f"mllm/{name}": digest for name, digest in checkpoint_hashes(self.folder).items()}
        return hashes | {"tokenizer": self.tokenizer.weight_hash()}

    def select(self, videos: VideoSet) -> VideoSet:
        """Return all videos: any text is a prompt."""
        return videos

    def check(self, videos: VideoSet, labels: Sequence[int], *samplings: GuidedSampling) -> None:
        """Raise ValueError for guidance that changes along a clip."""
        self.check_guidance(*samplings)

    def check_guidance(self, *samplings: GuidedSampling) -> None:
        """Raise ValueError for guidance that changes along a clip: a language model has one scale for all codes."""
        for sampling in samplings:
            if sampling.guidance_final is not None or (sampling.guidance_start, sampling.guidance_stop) != (0, 1):
                raise ValueError(
                    "a language model has one guidance scale for all codes of a clip; "
                    "leave out --guidance-final, --guidance-start and --guidance-stop with --mllm"
                )

    def notes(self, videos: VideoSet) -> dict[str, Any]:
        """Return the prompts of each class."""
        return {"prompts": dict(zip(videos.classes, map(list, prompts_of(videos)), strict=True))}

    def prompts(self, videos: VideoSet, labels: Sequence[int]) -> list[str]:
        """Return a prompt for each label (n,): the phrasings of its class, each clip of the class the next one."""
        return prompts_in_turn(prompts_of(videos), labels)

    @torch.inference_mode()
    def clips(
        self, videos: VideoSet, labels: Sequence[int], sampling: GuidedSampling, seed: int, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield clips (b, 3, T, H, W) in [0, 1] and codes int64 (b, N) for labels (n,); all codes are sampled first."""
        options = VideoSampling.of(sampling, seed=seed, batch_size=batch_size)
        codes = self.mllm.generate_codes(self.prompts(videos, labels), options)
        for batch in codes.split(batch_size):
            yield self.tokenizer.decode(batch.to(self.tokenizer.codebook.device)), batch


@dataclass(frozen=True)
class ClipSourceConfig(EvaluationConfig):
    """The options that choose model and data of an evaluation of generated clips; ValueError for values out of range."""

    needed: ClassVar[tuple[str, ...]] = ()

    generator: str = ""
    """Folder or hub name of a class-conditional generator; by default the newest one trained here, else the one that comes with
    larp-mllm."""
    tokenizer: str = ""
    """Folder or hub name of the generator's tokenizer; by default the one that its run names."""
    variant: Literal["ema"] | None = None
    """ema: the averaged weights of the tokenizer's training."""
    mllm: str = ""
    """In place of --generator: folder of a language model, or of the run that trained it, or a hub name. It has its own tokenizer."""

    def resolved(self) -> Self:
        """Return the config with the generator and the data that are the defaults here; ValueError if no data are known."""
        self.check_paths()
        if self.mllm and self.generator:
            raise ValueError("--generator, --mllm: both are given; give one of them")
        if self.mllm and (self.tokenizer or self.variant):
            raise ValueError(
                f"--mllm {self.mllm}: a language model has its own video tokenizer; leave out --tokenizer and --variant"
            )
        generator = "" if self.mllm else find_generator(self.generator or None)
        return replace(self, generator=generator, data=self.data or _data_of(generator))

    def open_source(self) -> ClipSource:
        """Load the model of a resolved config; ValueError if it is no model for classes."""
        if self.mllm:
            return MllmSource.load(self.mllm, self.device)
        generator = load_generator(self.generator, "class", self.device)
        training, tokenizer = find_training(self.generator), self.tokenizer or None
        loaded = load_generator_tokenizer(self.generator, generator, training, tokenizer, self.variant, self.device)
        return GeneratorSource(generator, loaded, training.stride or 1)

    def open_videos(self, source: ClipSource, split: Split) -> VideoSet:
        """List the videos of the classes that the source knows; says so on stderr if there are others.

        Raises ValueError for videos without a class, and if the source knows none of the classes.
        """
        videos = open_videos(self.data, split)
        require_labels(videos)
        known = source.select(videos)
        if known is not videos:
            print(f"note: {known.notes[-1]}", file=sys.stderr)
        return known


def _data_of(generator: str) -> str:
    """Return the data spec of LARP_UCF101, else of the training of a generator, and say on stderr which."""
    if root := os.environ.get(UCF101):
        data, source = f"ucf101:{root}", UCF101
        if not user_path(root).is_dir():
            raise ValueError(f"{UCF101}={root}: there is no such folder. {_UCF101_IS}")
    else:
        data, source = generator and find_training(generator).data, generator
    if not data:
        raise ValueError(
            f"no data: give --data ucf101:ROOT, or set the environment variable {UCF101} to ROOT. {_UCF101_IS}"
        )
    print(f"the data are {data} ({source})", file=sys.stderr)
    return data
