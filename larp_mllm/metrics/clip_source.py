"""The source of generated clips of an evaluation: a generator with its tokenizer, or a language model.

Shapes: n clips in all, b clips of a batch, T frames, H x W pixels, N codes of a clip.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from larp.data.clips import ClipShape
from larp.data.datasets import VideoSet
from larp.metrics.clip_source import ClipSource, GeneratorSource
from larp.metrics.evaluation import EvaluationConfig
from larp.metrics.protocols import checkpoint_hashes
from larp.models.tokenizer import LarpTokenizer
from larp.sampling.options import GuidedSampling
from larp_mllm.generation.sampling import VideoSampling
from larp_mllm.locate import find_model
from larp_mllm.metrics.evaluation import clip_shape, prompts_in_turn, prompts_of
from larp_mllm.pipeline import Mllm

import torch
from torch import Tensor


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

    def check(self, videos: VideoSet, labels: Sequence[int], *samplings: GuidedSampling) -> None:
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
    """The options that choose the model of an evaluation of generated clips; ValueError for values out of range."""

    needed: ClassVar[tuple[str, ...]] = ("data",)

    generator: str = ""
    """Folder or hub name of a class-conditional generator; needs --tokenizer."""
    tokenizer: str = ""
    """Folder or hub name of the tokenizer that the generator was trained with."""
    variant: Literal["ema"] | None = None
    """ema: the averaged weights of the tokenizer's training."""
    mllm: str = ""
    """In place of --generator: folder of a language model, or of the run that trained it, or a hub name. It has its own tokenizer."""

    def open_source(self) -> ClipSource:
        """Load the model; ValueError unless it is one generator with its tokenizer, or one language model."""
        self.check_paths()
        if bool(self.generator) == bool(self.mllm):
            given = "both are given" if self.mllm else "neither is given"
            raise ValueError(
                f"--generator, --mllm: {given}; give one of them, a generator with its --tokenizer or a language model"
            )
        if self.mllm and (self.tokenizer or self.variant):
            raise ValueError(
                f"--mllm {self.mllm}: a language model has its own video tokenizer; leave out --tokenizer and --variant"
            )
        if self.mllm:
            return MllmSource.load(self.mllm, self.device)
        if not self.tokenizer:
            raise ValueError("--tokenizer is needed with --generator: the one that the generator was trained with")
        return GeneratorSource.load(self.generator, self.tokenizer, self.device, self.variant)
