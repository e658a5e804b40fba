"""The stochastic vector quantizer, always in float32 (arXiv 2410.21264, section 3.2), and how many of its codes are used.

Shapes: B batch, N tokens, K codebook size, d code dimension.
"""

from typing import NamedTuple

from larp.kernels.matmul import linear
from larp.models.codebook_scores import rows_per_chunk, sample_in_blocks

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Latents that a CPU compares with the codebook at a time: 16 MB of cosine similarities for 8192 codes.
_ROWS_PER_CHUNK = 512


class Quantized(NamedTuple):
    """Latents (B, N, d) with straight-through gradients, codes (B, N) int64, and two scalar losses."""

    latents: Tensor
    codes: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


class VectorQuantizer(nn.Module):
    """Maps a latent to the code of highest cosine similarity, or samples one from softmax(cosine / temperature).

    Args:
        codebook_size, dim: K and d.
        temperature: of the softmax that codes are sampled from.
    """

    def __init__(self, codebook_size: int, dim: int, temperature: float = 0.03):
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.kaiming_uniform_(self.embedding.weight)
        self.temperature = temperature

    def codebook(self) -> Tensor:
        """Return the L2-normalised codebook, (K, d) float32, with gradient."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Map codes (B, N) int64 to normalised latents (B, N, d) float32."""
        return F.normalize(F.embedding(codes, self.embedding.weight).float(), dim=-1)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def similarities(self, latents: Tensor) -> Tensor:
        """Return the cosine similarity of every latent (B, N, d) and every code: (B, N, K) float32."""
        return linear(F.normalize(latents.float(), dim=-1), self.codebook())

    def probabilities(self, latents: Tensor, temperature: float | None = None) -> Tensor:
        """Return softmax(cosine / temperature), (B, N, K) float32; `temperature` overrides the quantizer's."""
        return (self.similarities(latents) / (temperature or self.temperature)).softmax(-1)

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """Return the codes of highest cosine similarity, (B, N) int64, without a (B, N, K) tensor."""
        if torch.compiler.is_compiling():  # chunks would fix the batch size
            return self.similarities(latents).argmax(-1)
        chunks = latents.flatten(0, -2).split(self._rows_per_chunk(latents))
        return torch.cat([self.similarities(chunk).argmax(-1) for chunk in chunks]).view(latents.shape[:-1])

    @torch.no_grad()
    def sampled(self, latents: Tensor, uniform: Tensor, temperature: float | None = None) -> Tensor:
        """Sample codes (B, N) int64 by inverse CDF with U[0, 1) values (B, N), without a (B, N, K) tensor."""
        rows = self._rows_per_chunk(latents)
        chunks = zip(latents.flatten(0, -2).split(rows), uniform.flatten().split(rows), strict=True)
        if latents.device.type == "cpu":
            codes = [sample_codes(self.probabilities(chunk, temperature), u) for chunk, u in chunks]
        else:
            # Dividing the codebook by the temperature is cheaper than dividing the scores.
            codebook = self.codebook() / (temperature or self.temperature)
            codes = [
                sample_in_blocks(linear(F.normalize(chunk.float(), dim=-1), codebook).softmax(-1), u)
                for chunk, u in chunks
            ]
        return torch.cat(codes).view(latents.shape[:-1])

    def _rows_per_chunk(self, latents: Tensor) -> int:
        return _ROWS_PER_CHUNK if latents.device.type == "cpu" else rows_per_chunk(len(self.embedding.weight))

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, latents: Tensor, uniform: Tensor | None = None, temperature: float | None = None) -> Quantized:
        """Quantize projected latents (B, N, d).

        The losses are mean squared errors between normalised vectors. The gradient of the codebook loss reaches the codebook
        only, that of the commitment loss the latents only.

        Args:
            uniform: (B, N) values of U[0, 1) that sample the codes by inverse CDF; None takes the nearest codes.
            temperature: of these samples; overrides the quantizer's.
        """
        normal = F.normalize(latents.float(), dim=-1)
        codes = self.nearest(normal) if uniform is None else self.sampled(normal, uniform, temperature)
        chosen = self.lookup(codes)
        return Quantized(
            latents=normal + (chosen - normal).detach(),
            codes=codes,
            codebook_loss=F.mse_loss(chosen, normal.detach()),
            commitment_loss=F.mse_loss(normal, chosen.detach()),
        )


def sample_codes(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Sample one index per row of (..., K) probabilities by inverse CDF with U[0, 1) values (...): int64 (...).

    With one given random number per sample, the result does not depend on how a batch is split over processes.
    """
    cdf = probabilities.cumsum(-1)
    # Scaled by the last entry, which is not exactly 1 because of rounding.
    threshold = uniform[..., None].to(cdf) * cdf[..., -1:]
    return torch.searchsorted(cdf, threshold, right=True).squeeze(-1).clamp_max(probabilities.shape[-1] - 1)


def add_counts(counts: Tensor, codes: Tensor) -> Tensor:
    """Add the histogram of codes of any shape to `counts` (K,) int64, in place, and return `counts`."""
    # torch.bincount would synchronise with the GPU to read the largest code.
    codes = codes.detach().flatten()
    return counts.index_add_(0, codes, torch.ones_like(codes))


def usage(codes: Tensor, codebook_size: int) -> dict[str, float]:
    """Return {"codes_used": share of the codebook that occurs, "perplexity": exp of the entropy of the code histogram}."""
    return usage_of_counts(torch.bincount(codes.flatten(), minlength=codebook_size))


def usage_of_counts(counts: Tensor) -> dict[str, float]:
    """Return `usage` of codes with the histogram `counts` (K,)."""
    share = counts.double() / counts.sum().clamp_min(1)
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    return {"codes_used": (share > 0).double().mean().item(), "perplexity": entropy.exp().item()}
