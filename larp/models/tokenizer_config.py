"""Configuration of the tokenizer: network sizes, and the shape of its clips and codes."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from larp.config import check_positive, check_types
from larp.models.prior import PriorConfig

Patch = tuple[int, int, int]


# (depth, heads, width) of both encoder and decoder, from the paper. Only L has published weights (S and B: hywang66/LARP, issue 11).
TOKENIZER_SIZES: dict[str, tuple[int, int, int]] = {
    "S": (6, 8, 512),
    "B": (8, 12, 768),
    "L": (12, 12, 768),
}


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of the tokenizer; the defaults are LARP-L (173 M parameters without the prior)."""

    num_frames: int = 16
    """Frames of a clip, T."""
    height: int = 128
    """H, in pixels."""
    width: int = 128
    """W, in pixels."""
    patch_size: Patch = (4, 8, 8)
    """Frames, rows and columns of an encoder patch."""
    decoder_patch_size: Patch | None = None
    """Patch of the decoder; by default the encoder's."""
    num_tokens: int = 1024
    """Codes of a clip, N."""
    codebook_size: int = 8192
    """Number of different codes, K."""
    code_dim: int = 16
    """Dimension of a code, d."""
    encoder_width: int = 768
    encoder_depth: int = 12
    encoder_heads: int = 12
    decoder_width: int = 768
    decoder_depth: int = 12
    decoder_heads: int = 12
    refiner_width: int = 0
    """Width of the convolutions that refine decoded frames, see `Refiner`; 0: none."""
    stochastic: bool = True
    """Sample codes in training; off takes the nearest ones (deterministic VQ)."""
    temperature: float = 0.03
    """Of the softmax that codes are sampled from."""
    init: Literal["published", "balanced"] = "published"
    """`balanced`, for short trainings, scales the queries like the patches and the latents like the decoder positions."""
    nested: bool = False
    """Any prefix of the codes can be decoded; a learned mask latent replaces the rest."""
    prior: PriorConfig = field(default_factory=PriorConfig)
    """The AR prior, used in training only."""

    def __post_init__(self):
        check_types(self)
        sides = [f"{side}_{what}" for side in ("encoder", "decoder") for what in ("width", "depth", "heads")]
        check_positive(self, "num_frames", "height", "width", "num_tokens", "codebook_size", "code_dim", *sides)
        for name, patch in (("patch_size", self.patch_size), ("decoder_patch_size", self.decoder_patch_size)):
            for axis, length, size in zip(
                ("num_frames", "height", "width"), self.clip_shape, patch or (1, 1, 1), strict=True
            ):
                if size < 1 or length % size:
                    raise ValueError(f"{axis} = {length} is not a multiple of its {size} in {name} = {tuple(patch)}")
        for side in ("encoder", "decoder"):
            width, heads = getattr(self, f"{side}_width"), getattr(self, f"{side}_heads")
            if width % heads or width % 4:
                raise ValueError(f"{side}_width = {width} must be a multiple of 4 and of {side}_heads = {heads}")
        if self.refiner_width < 0 or (self.refiner_width and (self.height % 2 or self.width % 2)):
            raise ValueError(
                f"refiner_width = {self.refiner_width} must be 0 or more, and a refiner needs even sides, got {self.height}x{self.width}"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if self.prior.enabled and self.prior.positions < self.num_tokens:
            raise ValueError(f"prior.positions = {self.prior.positions} is less than num_tokens = {self.num_tokens}")
        if self.prior.enabled and self.num_tokens < 2:
            raise ValueError("the prior needs num_tokens of at least 2; turn it off with --model.prior.no-enabled")

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> "TokenizerConfig":
        """Return the configuration of a row of `TOKENIZER_SIZES`, with the other fields given by name."""
        if size not in TOKENIZER_SIZES:
            raise ValueError(f"unknown tokenizer size {size!r}; the sizes are {', '.join(TOKENIZER_SIZES)}")
        depth, heads, width = TOKENIZER_SIZES[size]
        sides = {f"{side}_{name}": value for side in ("encoder", "decoder")
                 for name, value in (("depth", depth), ("heads", heads), ("width", width))}  # fmt: skip
        return cls(**sides | fields)

    @property
    def clip_shape(self) -> tuple[int, int, int]:
        """(T, H, W)."""
        return self.num_frames, self.height, self.width

    def grid(self, patch: Patch) -> Patch:
        """Return the number of patches of a clip of T frames along time, rows and columns."""
        return tuple(length // size for length, size in zip(self.clip_shape, patch, strict=True))
