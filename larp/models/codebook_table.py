"""Embedding tables that are computed from the tokenizer's codebook, so that similar codes have similar rows.

Shapes: K codebook size, d code dimension, D width, E further ids.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CodebookTable(nn.Module):
    """Rows (K + E, D) of a table: an MLP of the codebook (K, d), a buffer that is saved with the model, and E learned rows.

    `weight` is what `nn.Embedding` and `nn.Linear` have under this name. All rows share the MLP, so that a code that is rare
    in training learns from its neighbours, and a table takes no more memory on disk than the codebook.
    """

    def __init__(self, codebook_size: int, code_dim: int, width: int, extra: int = 0):
        super().__init__()
        self.register_buffer("codebook", torch.zeros(codebook_size, code_dim))
        self.mlp = nn.Sequential(nn.Linear(code_dim, width), nn.GELU(), nn.Linear(width, width, bias=False))
        self.extra = nn.Embedding(extra, width) if extra else None
        # A step of Adam moves all weights of a row at once: unscaled, a row would move `width` times as far as in a table.
        # This lies between the two, and learned fastest (LOG.md).
        self.scale = width**-0.5

    @property
    def weight(self) -> Tensor:
        """The rows (K + E, D)."""
        rows = self.mlp(self.codebook) * self.scale
        if self.extra is None:
            return rows
        # Called, not read: under ZeRO-3 a weight exists in its module's forward only.
        learned = self.extra(torch.arange(self.extra.num_embeddings, device=rows.device))
        return torch.cat([rows, learned.to(rows)])

    @torch.no_grad()
    def initialize(self, codebook: Tensor, std: float) -> None:
        """Take over a codebook (K, d), and give the rows, centred, the standard deviation `std`."""
        self.codebook.copy_(codebook)
        first, last = self.mlp[0], self.mlp[2]
        # Rows of a codebook of any scale, d values of variance 1: each hidden unit bends somewhere among them.
        nn.init.normal_(first.weight).div_(self.codebook.std().clamp_min(1e-6) * codebook.shape[1] ** 0.5)
        nn.init.normal_(first.bias)
        nn.init.normal_(last.weight)
        rows = self.mlp(self.codebook) * self.scale
        last.weight.mul_(std / (rows - rows.mean(0)).std().clamp_min(1e-6))
        if self.extra is not None:
            nn.init.normal_(self.extra.weight, std=std)


class CodebookEmbedding(CodebookTable):
    """Embeddings of codes."""

    def forward(self, codes: Tensor) -> Tensor:
        """Map ids int64 (...) to (..., D)."""
        return F.embedding(codes, self.weight)


class CodebookHead(CodebookTable):
    """Logits of codes."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., D) to logits (..., K)."""
        return F.linear(hidden, self.weight)
