"""How videos and text are sampled: two sets of options that check themselves, and the samples that they mean.

Every random number belongs to a place in the list: the same seed and place give the same result whatever the batch.
"""

from dataclasses import dataclass

from larp.sampling.sample import check_sampling, row_uniforms, sample_logits
from larp_mllm.checks import check_count, check_seed

from torch import Tensor

# Text and videos of one seed must not be sampled with the same numbers.
_TEXT_STREAM = 0x632BE59BD9B4E019


@dataclass(frozen=True)
class VideoSampling:
    """How codes are sampled; ValueError names the option that is out of range."""

    guidance_scale: float = 2.0
    """1 is off; more follows the prompt more closely: `unconditional + s * (conditional - unconditional)`."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest code."""
    top_k: int = 0
    """Draw among the k likeliest codes; 0 is off."""
    top_p: float = 1.0
    """Draw among the likeliest codes that together reach this probability; 1 is off."""
    seed: int = 0
    """The same seed and place in the list give the same video."""
    batch_size: int = 64
    """Videos that are sampled side by side; does not change them."""

    def __post_init__(self):
        check_sampling(self.temperature, self.top_k, self.top_p, self.guidance_scale)
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
        return sample_logits(logits, self.temperature, self.top_k, self.top_p, uniform)


@dataclass(frozen=True)
class TextSampling:
    """How text is sampled; ValueError names the option that is out of range."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest word piece."""
    top_k: int = 0
    """Draw among the k likeliest word pieces; 0 is off."""
    top_p: float = 1.0
    """Draw among the likeliest word pieces that together reach this probability; 1 is off."""
    max_new_tokens: int = 48
    """Word pieces that are written at most, those of all texts of an answer together."""
    seed: int = 0
    """The same seed and place in the list give the same text."""

    def __post_init__(self):
        check_sampling(self.temperature, self.top_k, self.top_p)
        check_count("max_new_tokens", self.max_new_tokens)
        check_seed(self.seed)

    def uniforms(self, first_row: int, rows: int, count: int) -> Tensor:
        """The random numbers of `count` samples of the rows from `first_row` on: float64 (rows, count) in [0, 1)."""
        return row_uniforms(int(self.seed) ^ _TEXT_STREAM, first_row, rows, count)

    def sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Logits of text and controls (B, V) and one number for each row (B,) -> ids int64 (B,)."""
        return sample_logits(logits, self.temperature, self.top_k, self.top_p, uniform)
