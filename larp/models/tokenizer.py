"""LarpTokenizer: encodes a clip to a short sequence of discrete codes, and decodes codes to a clip (arXiv 2410.21264).

Shapes: B batch, T frames, H, W pixels, P patches, N tokens, K codebook size, d code dimension, D width.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from larp.config import is_number, is_whole
from larp.hub import LarpModel
from larp.models.layers import Stack, embed_patches, init_xavier, sincos_1d, sincos_3d
from larp.models.losses import psnr
from larp.models.noise import BatchNoise
from larp.models.prior import ARPrior, PriorResult
from larp.models.published_tokenizer import tokenizer_from_published
from larp.models.quantizer import Quantized, VectorQuantizer
from larp.models.refiner import Refiner
from larp.models.tokenizer_config import TokenizerConfig

import torch
from einops import rearrange
from torch import Tensor, nn


class TokenizerOutput(NamedTuple):
    """The result of a training pass."""

    reconstruction: Tensor
    """(B, 3, T, H, W), not clamped."""
    latents: Tensor
    """(B, N, d), before quantization."""
    quantized: Quantized | None
    """None in a pass without quantizer."""
    prior: PriorResult | None
    """None in a pass without quantizer, or without a prior."""


class LarpTokenizer(LarpModel):
    """Encodes clips (B, 3, T, H, W), float in [0, 1], to codes (B, N), int64 in [0, K), and decodes codes to clips.

    A nested tokenizer also decodes any prefix of the codes: a learned mask latent replaces the rest.
    """

    model_type = "larp-tokenizer"
    config_class = TokenizerConfig
    keep_in_fp32 = ("quantizer.embedding.weight",)

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = c = config
        self.patch_size, self.decoder_patch_size = c.patch_size, c.decoder_patch_size or c.patch_size
        self.x_embedder = nn.Conv3d(3, c.encoder_width, self.patch_size, stride=self.patch_size)
        self.encoder = Stack(c.encoder_width, c.encoder_heads, c.encoder_depth)
        self.in_linear = nn.Linear(c.encoder_width, c.code_dim)
        self.quantizer = VectorQuantizer(c.codebook_size, c.code_dim, c.temperature)
        self.out_linear = nn.Linear(c.code_dim, c.decoder_width)
        self.decoder = Stack(c.decoder_width, c.decoder_heads, c.decoder_depth)
        self.norm_final = nn.LayerNorm(c.decoder_width, eps=1e-6)
        self.head = nn.Linear(c.decoder_width, 3 * math.prod(self.decoder_patch_size))
        self.refiner = Refiner(c.refiner_width) if c.refiner_width else None
        self.prior = ARPrior(c.prior, c.code_dim) if c.prior.enabled else None
        init_xavier(self)
        nn.init.zeros_(self.head.weight)
        balanced = c.init == "balanced"
        self.queries = nn.Parameter(torch.randn(c.num_tokens, c.encoder_width) * (1.0 if balanced else 0.02))
        self.patch_type = nn.Parameter(torch.randn(1, 1, c.decoder_width) * 0.02)
        if balanced:
            # Maps a unit latent to the root-mean-square of a sin-cos table, sqrt(1/2).
            nn.init.normal_(self.out_linear.weight, std=0.5**0.5)
        # A unit vector like the latents that it replaces.
        self.mask_latent = nn.Parameter(nn.functional.normalize(torch.randn(c.code_dim), dim=0)) if c.nested else None
        self.register_buffer("encoder_positions", sincos_3d(c.grid(self.patch_size), c.encoder_width)[None])
        self.register_buffer("decoder_positions", sincos_3d(c.grid(self.decoder_patch_size), c.decoder_width)[None])
        self.register_buffer("latent_positions", sincos_1d(c.num_tokens, c.decoder_width)[None])

    @property
    def num_tokens(self) -> int:
        """Codes of a clip, N."""
        return self.config.num_tokens

    @property
    def codebook_size(self) -> int:
        """Size of the codebook, K."""
        return self.config.codebook_size

    @property
    def codebook(self) -> Tensor:
        """The L2-normalised codebook, (K, d) float32, detached."""
        return self.quantizer.codebook().detach()

    def project(self, clip: Tensor) -> Tensor:
        """Map a clip (B, 3, T', H, W) to unnormalised latents (B, N, d); T' <= T is a multiple of the temporal patch size."""
        x = embed_patches(self.x_embedder, clip)
        x = x + self.encoder_positions[:, : x.shape[1]].to(x)
        queries = self.queries.to(x).expand(x.shape[0], -1, -1)
        return self.in_linear(self.encoder(torch.cat([x, queries], dim=1), last=self.num_tokens))

    def mask(self, latents: Tensor, prefix_lengths: Tensor) -> Tensor:
        """Replace latents (B, N, d) after the first `prefix_lengths` (B,) of each row by the mask latent; nested only."""
        selected = torch.arange(latents.shape[1], device=latents.device) < prefix_lengths.to(latents.device)[:, None]
        return torch.where(selected[..., None], latents, self.mask_latent.to(latents))

    def decode_latents(self, latents: Tensor, num_frames: int | None = None) -> Tensor:
        """Map quantised latents (B, n, d) to an unclamped clip (B, 3, num_frames, H, W); T frames by default.

        If n < N, the mask latent is appended N - n times.
        """
        if missing := self.num_tokens - latents.shape[1]:
            latents = torch.cat([latents, self.mask_latent.to(latents).expand(latents.shape[0], missing, -1)], dim=1)
        t, h, w = self.config.grid(self.decoder_patch_size)
        pt, ph, pw = self.decoder_patch_size
        t = t if num_frames is None else num_frames // pt
        x = self.out_linear(latents.to(self.out_linear.weight.dtype))
        x = x + self.latent_positions.to(x)
        queries = (self.decoder_positions[:, : t * h * w] + self.patch_type).to(x).expand(x.shape[0], -1, -1)
        x = self.decoder(torch.cat([x, queries], dim=1), last=t * h * w)
        pixels = self.head(self.norm_final(x))
        clip = rearrange(
            pixels, "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw, c=3
        )
        return clip if self.refiner is None else self.refiner(clip)

    def forward(
        self,
        clip: Tensor,
        noise: BatchNoise | None = None,
        mix: float = 0.0,
        quantize: bool = True,
        prefix_lengths: Tensor | None = None,
        temperature: float | None = None,
    ) -> TokenizerOutput:
        """Run a training pass over clips (B, 3, T, H, W).

        Args:
            noise: random numbers of this batch, with which codes are sampled; None takes the nearest codes.
            mix: scheduled-sampling share of the prior (see `ARPrior.forward`).
            quantize: False decodes the normalised continuous latents, with which short trainings begin.
            prefix_lengths: (B,) int64 in 1..N, number of latents that the decoder gets (nested dropout, nested models only).
                The prior gets all.
            temperature: of the sampled codes; overrides the config's.
        """
        latents = self.project(clip)
        quantized = prior = None
        if quantize:
            uniform = noise.uniform(self.num_tokens) if noise is not None and self.config.stochastic else None
            quantized = self.quantizer(latents, uniform, temperature)
            decoded = quantized.latents
            if self.prior is not None:
                prior = self.prior(quantized.latents, quantized.codes, self.codebook, mix, noise)
        else:
            decoded = latents = nn.functional.normalize(latents.float(), dim=-1)
        if prefix_lengths is not None:
            decoded = self.mask(decoded, prefix_lengths)
        return TokenizerOutput(self.decode_latents(decoded, clip.shape[2]), latents, quantized, prior)

    @torch.no_grad()
    def encode(self, clip: Tensor, num_tokens: int | None = None, target_psnr: float | None = None) -> Tensor:
        """Encode clips (B, 3, T, H, W) in [0, 1] to codes (B, n) int64, by default n = N.

        The computation uses the device and the dtype of the weights. A clip may have fewer frames than T, a multiple of the
        temporal patch size. A single image (T = 1) is repeated to one temporal patch. An empty batch gives codes (0, n).

        Args:
            clip: float32, or of the weights' dtype.
            num_tokens: return the first `num_tokens` codes (nested models only).
            target_psnr: return the fewest codes that reconstruct every clip of the batch with this PSNR in dB, N if it is out of
                reach (nested models only). See `shortest_prefix`.

        Raises ValueError for anything but a tensor, for a wrong shape, dtype or range, and for NaN. torch.compile, torch.export and
        ONNX trace the computation without the checks of values, and without `target_psnr`.
        """
        if num_tokens is not None and target_psnr is not None:
            raise ValueError("give num_tokens or target_psnr, not both")
        if num_tokens is not None:
            self.check_length(num_tokens)
        clip = self._check_clip_shape(clip)
        end_check = start_range_check(clip, 1, _CLIP_RANGE)
        clip = self._to_weights(clip)
        codes = self.quantizer.nearest(self.project(clip))
        end_check()
        if target_psnr is not None:
            num_tokens = max(self.shortest_prefix(clip, codes, target_psnr).tolist(), default=1)
        return codes[:, :num_tokens]

    @torch.no_grad()
    def shortest_prefix(self, clip: Tensor, codes: Tensor, target_psnr: float) -> Tensor:
        """Return the number of codes that reconstructs each clip with `target_psnr` dB: (B,) int64, N if it is out of reach.

        Bisection with log2(N) decodings, exact if the PSNR never decreases with more codes. Nested models only.

        Args:
            clip: (B, 3, T, H, W), where the weights are.
            codes: all codes of the clips, (B, N).
        """
        self.check_length(1)
        if not is_number(target_psnr) or not target_psnr > 0:
            raise ValueError(f"target_psnr is a positive number of dB, got {target_psnr!r}")
        latents = self.quantizer.lookup(codes)

        def reached(lengths: Tensor) -> Tensor:
            reconstruction = self.decode_latents(self.mask(latents, lengths), clip.shape[2]).float().clamp(0, 1)
            return psnr(clip.float(), reconstruction) >= target_psnr

        return shortest_lengths(reached, codes)

    @torch.no_grad()
    def decode(self, codes: Tensor, num_frames: int | None = None) -> Tensor:
        """Decode codes (B, n), integers in [0, K), to clips (B, 3, num_frames, H, W), float32 clamped to [0, 1]; T frames by default.

        n is N, or less for a nested model. Raises ValueError for anything but a tensor of integers, for a wrong shape, for codes
        out of range, and if `num_frames` is not a multiple of the temporal patch size. Traced as `encode` is.
        """
        codes = self._check_code_shape(codes)
        self.check_frames(self.config.num_frames if num_frames is None else num_frames, self.decoder_patch_size[0])
        end_check = start_range_check(codes, self.codebook_size - 1, _CODE_RANGE)
        if codes.device.type != "cpu":
            # A code out of range would end the process's use of a GPU before the check does.
            codes = codes.clamp(0, self.codebook_size - 1)
        clip = self.decode_latents(self.quantizer.lookup(codes.to(self.device)), num_frames).float().clamp(0, 1)
        end_check()
        return clip

    def check_frames(self, frames: int, patch: int) -> None:
        """Raise ValueError unless `frames` is a multiple of the temporal patch size `patch`, at most T."""
        if not is_whole(frames) or frames % patch or not patch <= frames <= self.config.num_frames:
            raise ValueError(
                f"{frames!r} frames do not fit: this tokenizer takes multiples of {patch} up to {self.config.num_frames}"
            )

    def check_length(self, length: int) -> int:
        """Return `length`. Raises ValueError unless a clip can have this number of codes: N, or 1 to N for a nested model."""
        if not is_whole(length):
            raise ValueError(f"the number of codes must be a whole number, got {length!r} ({type(length).__name__})")
        if not 1 <= length <= self.num_tokens:
            raise ValueError(f"{length} codes: this tokenizer has 1 to {self.num_tokens} for a clip")
        if length < self.num_tokens and not self.config.nested:
            raise ValueError(
                f"{length} codes: this tokenizer always takes {self.num_tokens}; prefixes need one trained with --model.nested"
            )
        return length

    def check_clip(self, clip: Tensor) -> Tensor:
        """Return `clip`, an image as one temporal patch. Raises ValueError unless it is float (B, 3, T', H, W) in [0, 1]."""
        clip = self._check_clip_shape(clip)
        start_range_check(clip, 1, _CLIP_RANGE)()
        return clip

    def _check_clip_shape(self, clip: Tensor) -> Tensor:
        _, h, w = self.config.clip_shape
        check_tensor(clip, "a clip")
        if clip.ndim != 5 or clip.shape[1] != 3 or tuple(clip.shape[3:]) != (h, w):
            raise ValueError(f"expected a clip (B, 3, T, {h}, {w}), got shape {tuple(clip.shape)}")
        if not clip.is_floating_point():
            raise ValueError(f"expected a float clip in [0, 1], got {clip.dtype}; divide uint8 frames by 255")
        if clip.shape[2] == 1:
            clip = clip.expand(-1, -1, self.patch_size[0], -1, -1)
        self.check_frames(clip.shape[2], self.patch_size[0])
        return clip

    def _to_weights(self, clip: Tensor) -> Tensor:
        """Move `clip` to the device and dtype of the weights. Raises ValueError unless it has that dtype or is float32."""
        expected = self.dtype
        if clip.dtype not in (torch.float32, expected):
            remedy = "cast it with .float()" + ("" if expected == torch.float32 else f" or .to({expected})")
            raise ValueError(f"expected a float32 clip (the weights are {expected}), got {clip.dtype}; {remedy}")
        return clip.to(self.x_embedder.weight)

    def _check_code_shape(self, codes: Tensor) -> Tensor:
        """Return `codes` as int64. Raises ValueError unless they are integers (B, N), or (B, n) if nested."""
        check_tensor(codes, "codes")
        if codes.ndim != 2:
            raise ValueError(f"expected codes (B, {self.num_tokens}), got shape {tuple(codes.shape)}")
        self.check_length(codes.shape[1])
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"expected integer codes, got {codes.dtype}")
        # Cast before comparing: few operations support uint16 to uint64. Values beyond int64 become negative.
        return codes.long()

    @classmethod
    def from_published(cls, config: dict, tensors: dict[str, Tensor]) -> tuple[TokenizerConfig, dict[str, Tensor]]:
        """Convert from the published layout; see `larp.hub`."""
        return tokenizer_from_published(config, tensors)


_CLIP_RANGE = "expected a clip in [0, 1], got values from {:g} to {:g}"
_CODE_RANGE = "codes run from {} to {}, but the codebook has 0..{}"


def start_range_check(values: Tensor, highest: float, message: str) -> Callable[[], None]:
    """Start checking that values lie in [0, highest], and return a function that raises ValueError if they do not.

    On a CPU the error is raised at once. On a GPU two numbers are copied behind the work that was queued before; the returned
    function waits for this copy only, so that the GPU never waits for the host if the next work was queued in between. Nothing is
    checked where torch.compile or torch.export traces. `message` takes the smallest value, the largest and `highest`.
    """
    if torch.compiler.is_compiling() or not values.numel():
        return lambda: None
    # NaN propagates.
    ends, copied = torch.stack(torch.aminmax(values)), None
    if values.is_cuda:
        ends = torch.empty_like(ends, device="cpu", pin_memory=True).copy_(ends, non_blocking=True)
        copied = torch.cuda.current_stream(values.device).record_event()

    def end_check() -> None:
        if copied is not None:
            copied.synchronize()
        low, high = ends.tolist()
        if not (low >= 0 and high <= highest):
            raise ValueError(message.format(low, high, highest))

    if copied is None:
        end_check()
    return end_check


def check_tensor(value: Any, what: str) -> None:
    """Raise ValueError, with the description `what`, unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"expected {what} as a torch tensor, got {type(value).__name__}: torch.as_tensor makes one")


def shortest_lengths(reached: Callable[[Tensor], Tensor], codes: Tensor) -> Tensor:
    """Return the length of the shortest prefix of each row of codes (B, N) for which `reached` holds: (B,) int64, else N.

    `reached` maps lengths (B,) to bool (B,). By bisection: `reached` was evaluated and true for every returned length below N.
    The length is the shortest if `reached` is monotonic.
    """
    low = torch.ones(len(codes), dtype=torch.int64, device=codes.device)
    high = torch.full_like(low, codes.shape[1])
    for _ in range((codes.shape[1] - 1).bit_length()):  # no value is read back to end earlier
        middle = (low + high) // 2
        enough = reached(middle)
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, torch.minimum(middle + 1, high))
    return high


def sample_prefix_lengths(noise: BatchNoise, share: float, shortest: int, longest: int) -> Tensor:
    """Sample the prefix length of each clip for nested dropout, (B,) int64.

    With probability `share` it is uniform in shortest..longest, otherwise `longest`.
    """
    sampled = shortest + (noise.uniform() * (longest - shortest + 1)).long()
    return torch.where(noise.uniform() < share, sampled, longest)
