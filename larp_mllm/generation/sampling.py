"""How videos and text are sampled: two sets of options that check themselves, and the samples that they mean.

Every random number belongs to a place in the list: the same seed and place give the same result whatever the batch.
"""

from dataclasses import dataclass

from larp.sampling.options import SamplingOptions, check_guidance_scale
from larp.sampling.sample import row_uniforms, sample_logits
from larp_mllm.checks import check_count, check_seed

from torch import Tensor

# Text and videos of one seed must not be sampled with the same numbers.
_TEXT_STREAM = 0x632BE59BD9B4E019


@dataclass(frozen=True, kw_only=True)
class VideoSampling(SamplingOptions):
    """How codes are sampled; ValueError names the option that is out of range."""

    guidance_scale: float = 2.0
    """1 is off; more follows the prompt more closely: `unconditional + s * (conditional - unconditional)`."""
    seed: int = 0
    """The same seed and place in the list give the same video."""
    batch_size: int = 64
    """Videos that are sampled side by side; does not change them."""

    def __post_init__(self):
        super().__post_init__()
        check_guidance_scale("guidance_scale", self.guidance_scale)
        check_count("batch_size", self.batch_size)
        check_seed(self.seed)

    @property
    def guided(self) -> bool:
        """Whether an unconditional row runs beside each row."""
        return self.guidance_scale != 1.0

    def uniforms(self, first_row: int, rows: int, count: int) -> Tensor:
        """The random numbers of `count` codes of the rows from `first_row` on: float64 (rows, count) in [0, 1)."""
        return row_uniforms(int(self.seed), first_row, rows, count)  # numpy's integers overflow where Python's do not

    def sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Code logits (B, K), already guided, and one number for each row (B,) -> codes int64 (B,)."""
        return sample_logits(logits, self, uniform)


@dataclass(frozen=True, kw_only=True)
class TextSampling(SamplingOptions):
    """How text is sampled; ValueError names the option that is out of range."""

    temperature: float = 0.0
    max_new_tokens: int = 48
    """Word pieces that are written at most, those of all texts of an answer together."""
    seed: int = 0
    """The same seed and place in the list give the same text."""

    def __post_init__(self):
        super().__post_init__()
        check_count("max_new_tokens", self.max_new_tokens)
        check_seed(self.seed)

    def uniforms(self, first_row: int, rows: int, count: int) -> Tensor:
        """The random numbers of `count` samples of the rows from `first_row` on: float64 (rows, count) in [0, 1)."""
        return row_uniforms(int(self.seed) ^ _TEXT_STREAM, first_row, rows, count)

    def sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Logits of text and controls (B, V) and one number for each row (B,) -> ids int64 (B,)."""
        return sample_logits(logits, self, uniform)
