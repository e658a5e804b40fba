"""LarpTokenizer: a clip becomes a short ordered list of codes, and codes become a clip (arXiv 2410.21264).

Shapes: B batch, T frames, H, W pixels, P patches, N tokens, K codebook size, d code dimension, D width.
"""

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

from larp.hub import LarpModel
from larp.models.layers import Stack, embed_patches, init_xavier, sincos_1d, sincos_3d
from larp.models.losses import psnr
from larp.models.noise import BatchNoise
from larp.models.prior import ARPrior, PriorResult
from larp.models.published_tokenizer import tokenizer_from_published
from larp.models.quantizer import Quantized, VectorQuantizer
from larp.models.tokenizer_config import TokenizerConfig

import torch
from einops import rearrange
from torch import Tensor, nn


class TokenizerOutput(NamedTuple):
    """A training pass: unclamped reconstruction (B, 3, T, H, W); None where the pass had no quantizer or no prior."""

    reconstruction: Tensor
    latents: Tensor
    quantized: Quantized | None
    prior: PriorResult | None


class LarpTokenizer(LarpModel):
    """Encodes clips (B, 3, T, H, W), float in [0, 1], to codes (B, N), int64 in [0, K), and decodes codes to clips."""

    model_type = "larp-tokenizer"
    config_class = TokenizerConfig
    keep_in_fp32 = ("quantizer.embedding.weight",)

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = c = config
        self.patch, self.unpatch = c.patch_size, c.decoder_patch_size or c.patch_size
        self.x_embedder = nn.Conv3d(3, c.encoder_width, self.patch, stride=self.patch)
        self.encoder = Stack(c.encoder_width, c.encoder_heads, c.encoder_depth)
        self.in_linear = nn.Linear(c.encoder_width, c.code_dim)
        self.quantizer = VectorQuantizer(c.codebook_size, c.code_dim, c.temperature)
        self.out_linear = nn.Linear(c.code_dim, c.decoder_width)
        self.decoder = Stack(c.decoder_width, c.decoder_heads, c.decoder_depth)
        self.norm_final = nn.LayerNorm(c.decoder_width, eps=1e-6)
        self.head = nn.Linear(c.decoder_width, 3 * self.unpatch[0] * self.unpatch[1] * self.unpatch[2])
        self.prior = ARPrior(c.prior, c.code_dim) if c.prior.enabled else None
        init_xavier(self)
        nn.init.zeros_(self.head.weight)
        balanced = c.init == "balanced"
        self.queries = nn.Parameter(torch.randn(c.num_tokens, c.encoder_width) * (1.0 if balanced else 0.02))
        self.patch_type = nn.Parameter(torch.randn(1, 1, c.decoder_width) * 0.02)
        if balanced:
            # A unit latent comes out with the root-mean-square of a sin-cos table, sqrt(1/2).
            nn.init.normal_(self.out_linear.weight, std=0.5**0.5)
        # As long as the unit latents that it stands among.
        self.mask_latent = nn.Parameter(nn.functional.normalize(torch.randn(c.code_dim), dim=0)) if c.nested else None
        self.register_buffer("encoder_positions", sincos_3d(c.grid(self.patch), c.encoder_width)[None])
        self.register_buffer("decoder_positions", sincos_3d(c.grid(self.unpatch), c.decoder_width)[None])
        self.register_buffer("latent_positions", sincos_1d(c.num_tokens, c.decoder_width)[None])

    @property
    def num_tokens(self) -> int:
        """Codes of a clip, N."""
        return self.config.num_tokens

    @property
    def codebook_size(self) -> int:
        """Number of different codes, K."""
        return self.config.codebook_size

    @property
    def codebook(self) -> Tensor:
        """The L2-normalised codebook, (K, d) float32, detached."""
        return self.quantizer.codebook().detach()

    def project(self, clip: Tensor) -> Tensor:
        """Map a clip (B, 3, T', H, W) to latents (B, N, d) before normalisation; T' <= T, a multiple of the temporal patch."""
        x = embed_patches(self.x_embedder, clip)
        x = x + self.encoder_positions[:, : x.shape[1]].to(x)
        queries = self.queries.to(x).expand(len(x), -1, -1)
        return self.in_linear(self.encoder(torch.cat([x, queries], dim=1), last=self.num_tokens))

    def mask(self, latents: Tensor, keep: Tensor) -> Tensor:
        """Put the mask latent in place of all but the first `keep` (B,) latents of each row of (B, N, d); nested only."""
        kept = torch.arange(latents.shape[1], device=latents.device) < keep.to(latents.device)[:, None]
        return torch.where(kept[..., None], latents, self.mask_latent.to(latents))

    def render(self, latents: Tensor, num_frames: int | None = None) -> Tensor:
        """Map quantised latents (B, n, d) to an unclamped clip (B, 3, num_frames, H, W); by default T frames.

        Where n < N the mask latent stands for the rest.
        """
        if missing := self.num_tokens - latents.shape[1]:
            latents = torch.cat([latents, self.mask_latent.to(latents).expand(len(latents), missing, -1)], dim=1)
        t, h, w = self.config.grid(self.unpatch)
        pt, ph, pw = self.unpatch
        t = t if num_frames is None else num_frames // pt
        x = self.out_linear(latents.to(self.out_linear.weight.dtype))
        x = x + self.latent_positions.to(x)
        asked = (self.decoder_positions[:, : t * h * w] + self.patch_type).to(x).expand(len(x), -1, -1)
        x = self.decoder(torch.cat([x, asked], dim=1), last=t * h * w)
        pixels = self.head(self.norm_final(x))
        return rearrange(
            pixels, "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw, c=3
        )

    def forward(
        self,
        clip: Tensor,
        noise: BatchNoise | None = None,
        mix: float = 0.0,
        quantize: bool = True,
        keep: Tensor | None = None,
        temperature: float | None = None,
    ) -> TokenizerOutput:
        """Run a training pass over clips (B, 3, T, H, W).

        Args:
            noise: the stochastic samples of this batch; None takes the nearest codes.
            mix: scheduled-sampling share of the prior (see `ARPrior.forward`).
            quantize: False passes normalised continuous latents on: a start that small trainings need.
            keep: (B,) int64 in 1..N, how many latents of each clip the decoder sees (nested dropout; nested models only). The
                prior sees them all.
            temperature: of the samples, in place of the config's.
        """
        latents = self.project(clip)
        quantized = prior = None
        if quantize:
            uniform = noise.uniform(self.num_tokens) if noise is not None and self.config.stochastic else None
            quantized = self.quantizer(latents, uniform, temperature)
            seen = quantized.latents
            if self.prior is not None:
                prior = self.prior(quantized.latents, quantized.codes, self.codebook, mix, noise)
        else:
            seen = latents = nn.functional.normalize(latents.float(), dim=-1)
        if keep is not None:
            seen = self.mask(seen, keep)
        return TokenizerOutput(self.render(seen, clip.shape[2]), latents, quantized, prior)

    @torch.inference_mode()
    def encode(self, clip: Tensor, num_tokens: int | None = None, target_psnr: float | None = None) -> Tensor:
        """Map clips (B, 3, T, H, W) in [0, 1], float32 or of the weights' dtype, to codes (B, n) int64; by default all N.

        They are computed where the weights are and in their dtype; an empty batch gives codes (0, n). A clip may have fewer frames
        than T, in whole temporal patches; a single image (T = 1) is repeated to one temporal patch. Raises ValueError for what is
        no tensor, for a wrong shape, dtype (float64, say: it is not cast in silence) or range, and for NaN.

        Args:
            num_tokens: keep the first so many codes (nested models only).
            target_psnr: keep the fewest codes with which every clip of the batch is given back at this PSNR in dB (nested models
                only); all N where that is out of reach. See `shortest_prefix`.
        """
        if num_tokens is not None and target_psnr is not None:
            raise ValueError("give num_tokens or target_psnr, not both")
        if num_tokens is not None:
            self.check_length(num_tokens)
        clip = self.place(self.check_clip(clip))
        codes = self.quantizer.nearest(self.project(clip))
        if target_psnr is not None:
            num_tokens = max(self.shortest_prefix(clip, codes, target_psnr).tolist(), default=1)
        return codes[:, :num_tokens]

    @torch.inference_mode()
    def shortest_prefix(self, clip: Tensor, codes: Tensor, target_psnr: float) -> Tensor:
        """Return how many of its codes (B, N) each clip needs to be given back at `target_psnr` dB: (B,) int64, N where none do.

        Bisection with log2(N) decodings: exact where more codes never make a clip worse.
        """
        self.check_length(1)
        if not isinstance(target_psnr, Real) or isinstance(target_psnr, bool) or not target_psnr > 0:
            raise ValueError(f"target_psnr is a positive number of dB, got {target_psnr!r}")
        latents = self.quantizer.lookup(codes)

        def reached(lengths: Tensor) -> Tensor:
            again = self.render(self.mask(latents, lengths), clip.shape[2]).float().clamp(0, 1)
            return psnr(clip.float(), again) >= target_psnr

        return shortest_lengths(reached, codes)

    @torch.inference_mode()
    def decode(self, codes: Tensor, num_frames: int | None = None) -> Tensor:
        """Map codes (B, n), integers in [0, K), to clips (B, 3, num_frames, H, W), float32 clamped to [0, 1]; T frames by default.

        n is N, or less for a nested model; any integer dtype will do. Raises ValueError for what is no tensor, for a wrong shape or
        dtype, for codes out of range, and for num_frames that are not whole patches.
        """
        codes = self.check_codes(codes)
        self.check_frames(self.config.num_frames if num_frames is None else num_frames, self.unpatch[0])
        latents = self.quantizer.lookup(codes.to(self.queries.device))
        return self.render(latents, num_frames).float().clamp(0, 1)

    def check_frames(self, frames: int, patch: int) -> None:
        """Raise ValueError unless `frames` is a multiple of the temporal patch between it and T."""
        if not is_whole(frames) or frames % patch or not patch <= frames <= self.config.num_frames:
            raise ValueError(
                f"{frames!r} frames do not fit: this tokenizer takes multiples of {patch} up to {self.config.num_frames}"
            )

    def check_length(self, length: int) -> int:
        """Return `length`; ValueError unless so many codes can stand for a clip."""
        if not is_whole(length):
            raise ValueError(f"a number of codes is a whole number, got {length!r} ({type(length).__name__})")
        if not 1 <= length <= self.num_tokens:
            raise ValueError(f"{length} codes: this tokenizer has 1 to {self.num_tokens} for a clip")
        if length < self.num_tokens and not self.config.nested:
            raise ValueError(
                f"{length} codes: this tokenizer always takes {self.num_tokens}; prefixes need one trained with --model.nested"
            )
        return length

    def check_clip(self, clip: Tensor) -> Tensor:
        """Return `clip`, an image repeated; ValueError unless it is a float (B, 3, T', H, W) in [0, 1]."""
        _, h, w = self.config.clip_shape
        check_tensor(clip, "a clip")
        if clip.ndim != 5 or clip.shape[1] != 3 or tuple(clip.shape[3:]) != (h, w):
            raise ValueError(f"expected a clip (B, 3, T, {h}, {w}), got shape {tuple(clip.shape)}")
        if not clip.is_floating_point():
            raise ValueError(f"expected a float clip in [0, 1], got {clip.dtype}; divide uint8 frames by 255")
        if clip.shape[2] == 1:
            clip = clip.expand(-1, -1, self.patch[0], -1, -1)
        self.check_frames(clip.shape[2], self.patch[0])
        if clip.numel():
            low, high = clip.amin().item(), clip.amax().item()
            if not (low >= 0 and high <= 1):
                raise ValueError(f"expected a clip in [0, 1], got values from {low:g} to {high:g}")
        return clip

    def place(self, clip: Tensor) -> Tensor:
        """Return `clip` where the weights are and in their dtype; ValueError unless it has that dtype or is float32."""
        wanted = self.x_embedder.weight.dtype
        if clip.dtype not in (torch.float32, wanted):
            remedy = "cast it with .float()" + ("" if wanted == torch.float32 else f" or .to({wanted})")
            raise ValueError(f"expected a float32 clip (the weights are {wanted}), got {clip.dtype}; {remedy}")
        return clip.to(self.x_embedder.weight)

    def check_codes(self, codes: Tensor) -> Tensor:
        """Return `codes` as int64; ValueError unless they are integers (B, N) in [0, K), or (B, n) for a nested model."""
        check_tensor(codes, "codes")
        if codes.ndim != 2:
            raise ValueError(f"expected codes (B, {self.num_tokens}), got shape {tuple(codes.shape)}")
        self.check_length(codes.shape[1])
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"expected integer codes, got {codes.dtype}")
        # First of all: few operations take torch's wide unsigned integers, and one beyond int64 becomes negative.
        codes = codes.long()
        if codes.numel() and not 0 <= codes.amin().item() <= codes.amax().item() < self.codebook_size:
            raise ValueError(
                f"codes run from {codes.amin().item()} to {codes.amax().item()}, but the codebook has 0..{self.codebook_size - 1}"
            )
        return codes

    @classmethod
    def from_published(cls, config: dict, tensors: dict[str, Tensor]) -> tuple[TokenizerConfig, dict[str, Tensor]]:
        """Translate the published layout; see `larp.hub`."""
        return tokenizer_from_published(config, tensors)


def is_whole(value: Any) -> bool:
    """Whether `value` is a whole number by its type; True and 3.0 are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_tensor(value: Any, what: str) -> None:
    """Raise ValueError unless `value`, called `what` in the message, is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"expected {what} as a torch tensor, got {type(value).__name__}: torch.as_tensor makes one")


def shortest_lengths(reached: Callable[[Tensor], Tensor], codes: Tensor) -> Tensor:
    """Return the shortest prefix of each row of codes (B, N) for which `reached` is true: (B,) int64, N where none is.

    `reached` maps lengths (B,) to bool (B,). By bisection: a length below N is one that was seen to reach, and the shortest such where
    longer ones reach as well.
    """
    low = torch.ones(len(codes), dtype=torch.int64, device=codes.device)
    high = torch.full_like(low, codes.shape[1])
    while bool((low < high).any()):
        middle = (low + high) // 2
        enough = reached(middle)
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, torch.minimum(middle + 1, high))
    return high


def sample_prefix_lengths(noise: BatchNoise, share: float, shortest: int, longest: int) -> Tensor:
    """Draw how many codes each clip of a batch keeps in nested dropout: (B,) int64.

    With probability `share` a length uniform in shortest..longest, otherwise `longest`.
    """
    sampled = shortest + (noise.uniform() * (longest - shortest + 1)).long()
    return torch.where(noise.uniform() < share, sampled, longest)
