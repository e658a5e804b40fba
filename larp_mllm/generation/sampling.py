"""Sampling options of videos and of text, with the random numbers of a seed.

Each random number belongs to a place in the list of results: seed and place determine a result, for any batch size.
"""

from dataclasses import dataclass

from larp.config import check_count
from larp.sampling.options import SamplingOptions, check_guidance_scale
from larp.sampling.sample import row_uniforms, sample_logits
from larp_mllm.checks import check_seed

from torch import Tensor

# Text and videos of the same seed get different random numbers.
_TEXT_STREAM = 0x632BE59BD9B4E019


@dataclass(frozen=True, kw_only=True)
class VideoSampling(SamplingOptions):
    """How codes are sampled. Raises ValueError for an option out of range."""

    temperature: float = 0.8
    """Divides the logits, 1e-4 to 1e6; 0 always takes the likeliest. By default below 1: scenes hold together better (LOG.md)."""
    guidance_scale: float = 2.0
    """Scale s of classifier-free guidance, `unconditional + s * (conditional - unconditional)`; 1 is off."""
    seed: int = 0
    """The same seed and place in the list give the same video."""
    batch_size: int = 64
    """Videos that are sampled in one batch. Does not change the videos."""

    def __post_init__(self):
        super().__post_init__()
        check_guidance_scale("guidance_scale", self.guidance_scale)
        check_count("batch_size", self.batch_size)
        check_seed(self.seed)

    @property
    def guided(self) -> bool:
        """Whether guidance is on, which needs an unconditional row for each row."""
        return self.guidance_scale != 1.0

    def uniforms(self, first_row: int, rows: int, count: int) -> Tensor:
        """The random numbers for `count` codes of rows first_row, first_row + 1, ...: float64 (rows, count) in [0, 1)."""
        return row_uniforms(int(self.seed), first_row, rows, count)  # int(): numpy's integers overflow

    def sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Code logits (B, K), after guidance, and a random number per row (B,) -> codes int64 (B,)."""
        return sample_logits(logits, self, uniform)


@dataclass(frozen=True, kw_only=True)
class TextSampling(SamplingOptions):
    """How text is sampled. Raises ValueError for an option out of range."""

    temperature: float = 0.0
    max_new_tokens: int = 48
    """The largest number of sampled text ids, summed over all texts of an answer."""
    seed: int = 0
    """The same seed and place in the list give the same text."""

    def __post_init__(self):
        super().__post_init__()
        check_count("max_new_tokens", self.max_new_tokens)
        check_seed(self.seed)

    def uniforms(self, first_row: int, rows: int, count: int) -> Tensor:
        """The random numbers for `count` samples of rows first_row, first_row + 1, ...: float64 (rows, count) in [0, 1)."""
        return row_uniforms(int(self.seed) ^ _TEXT_STREAM, first_row, rows, count)

    def sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Logits of text and controls (B, V) and a random number per row (B,) -> ids int64 (B,)."""
        return sample_logits(logits, self, uniform)
