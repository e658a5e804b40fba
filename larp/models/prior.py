"""The autoregressive prior that regularises the latent space during training of the tokenizer (arXiv 2410.21264, section 3.3).

A GPT over continuous latents instead of code ids: its gradient reaches the encoder through the straight-through latents. It is
not used at inference.

Shapes: B batch, N tokens, K codebook size, d code dimension.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from larp.config import check_positive, check_types
from larp.kernels.matmul import linear
from larp.models.codebook_scores import score_codes
from larp.models.layers import Block, Linear
from larp.models.noise import BatchNoise
from larp.models.quantizer import sample_codes

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (depth, heads, width) of the published sizes; the published tokenizer uses "gptc-S".
PRIOR_SIZES = {
    "XXS": (6, 4, 256),
    "XS": (6, 6, 384),
    "S": (12, 6, 384),
    "M": (12, 8, 512),
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
}


@dataclass(frozen=True)
class PriorConfig:
    """The AR prior."""

    enabled: bool = True
    """Train with the prior; off builds the tokenizer without it."""
    depth: int = 12
    heads: int = 6
    width: int = 384
    dropout: float = 0.1
    """Of embeddings, attention and residuals."""
    positions: int = 1024
    """Rows of the learned position table, at least the number of tokens."""
    rounds: int = 2
    """Scheduled-sampling rounds; 1 is teacher forcing only."""
    temperature: float = 1.0
    """Logits are cosine / temperature."""

    def __post_init__(self):
        check_types(self)
        if self.enabled:
            check_positive(self, "depth", "heads", "width", "positions", where="prior.")
            if self.width % self.heads:
                raise ValueError(f"prior.heads = {self.heads} does not divide prior.width = {self.width}")
        if self.rounds not in (1, 2):
            raise ValueError(f"prior.rounds is 1 or 2, got {self.rounds}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"prior.dropout must lie in [0, 1), got {self.dropout}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"prior.temperature must be positive and finite, got {self.temperature}")


class PriorResult(NamedTuple):
    """Loss in nats (mean over the rounds), and the accuracies of the teacher-forced round; scalars."""

    loss: Tensor
    top1: Tensor
    top5: Tensor


class ARPrior(nn.Module):
    """Predicts latent i+1 from latents 1..i; the logit of a code is the cosine similarity divided by the temperature."""

    def __init__(self, config: PriorConfig, dim: int):
        super().__init__()
        self.config = config
        self.input_proj = Linear(dim, config.width)
        self.pos_emb = nn.Parameter(torch.empty(1, config.positions, config.width).normal_(std=0.02))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, eps=1e-5, qkv_bias=True, causal=True, dropout=config.dropout)
            for _ in range(config.depth)
        )
        self.ln_f = nn.LayerNorm(config.width)
        self.head = Linear(config.width, dim)

    def predict(self, latents: Tensor) -> Tensor:
        """Map latents 1..N-1 (B, N-1, d) to normalised predictions of latents 2..N (B, N-1, d)."""
        x = self.input_proj(latents) + self.pos_emb[:, : latents.shape[1]]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return F.normalize(self.head(self.ln_f(x)).float(), dim=-1)

    def logits(self, latents: Tensor, codebook: Tensor) -> Tensor:
        """Return logits of all codes at positions 2..N, (B, N-1, K), from latents 1..N-1 and the normalised codebook (K, d)."""
        # Dividing the predictions by the temperature avoids a second (B, N, K) tensor.
        return linear(self.predict(latents) / self.config.temperature, codebook)

    def forward(
        self, latents: Tensor, codes: Tensor, codebook: Tensor, mix: float = 0.0, noise: BatchNoise | None = None
    ):
        """Return the PriorResult for quantised latents (B, N, d) of codes (B, N).

        Args:
            codebook: (K, d), normalised and detached.
            mix: share of the positions whose input in round 2 is replaced by a code sampled from round 1's predictions. 0
                skips the second round, which would repeat the first.
            noise: required if mix > 0.
        """
        inputs, targets = latents[:, :-1], codes[:, 1:]
        twice = self.config.rounds == 2 and mix > 0
        # Input j was predicted from input j-1. The first latent has no prediction and is never replaced.
        length = inputs.shape[1] - 1
        uniform = noise.uniform(length) if twice else None
        score = self._score if latents.device.type == "cpu" else self._score_in_chunks
        loss, accuracies, sampled = score(inputs, targets, codebook, uniform, with_accuracy=True)
        if twice:
            replace = (noise.uniform(length) < mix)[..., None]
            mixed = torch.where(replace, codebook[sampled].to(inputs), inputs[:, 1:])
            second, *_ = score(torch.cat([inputs[:, :1], mixed], dim=1), targets, codebook)
            loss = (loss + second) / 2
        return PriorResult(loss, *accuracies)

    def _score(
        self,
        inputs: Tensor,
        targets: Tensor,
        codebook: Tensor,
        uniform: Tensor | None = None,
        with_accuracy: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """Run one round: return its loss, (top-1, top-5) accuracies `with_accuracy`, and codes (B, N-2) sampled by `uniform`."""
        logits = self.logits(inputs, codebook)
        loss = cross_entropy(logits, targets)
        accuracies = sampled = None
        with torch.no_grad():
            if with_accuracy:
                top5 = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == targets[..., None]
                accuracies = top5[..., 0].float().mean(), top5.any(-1).float().mean()
            if uniform is not None:
                sampled = sample_codes(logits[:, :-1].softmax(-1), uniform)
        return loss, accuracies, sampled

    def _score_in_chunks(
        self,
        inputs: Tensor,
        targets: Tensor,
        codebook: Tensor,
        uniform: Tensor | None = None,
        with_accuracy: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """`_score` without a (B, N, K) tensor, which on a GPU would take most of the memory and of its bandwidth."""
        predictions = (self.predict(inputs) / self.config.temperature).flatten(0, 1)
        # The last prediction has no input of round 2 to replace.
        padded = None if uniform is None else F.pad(uniform, (0, 1)).flatten()
        loss, ranks, sampled = score_codes(predictions, codebook, targets.flatten(), padded, with_accuracy)
        accuracies = ((ranks < 1).float().mean(), (ranks < 5).float().mean()) if with_accuracy else None
        return loss, accuracies, None if uniform is None else sampled.view(targets.shape)[:, :-1]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of logits (B, S, K) against codes (B, S), in float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
