"""TokenAdapter: the embedding rows and output-head rows of video ids, computed from the codebook of the video tokenizer.

The base model is never resized. Similar codes start with similar rows. Freely learned rows, initialised around the mean
of the base's rows, are the baseline (`kind="free"`).

Every parameter belongs to a submodule whose forward is called: under ZeRO-3 a bare nn.Parameter would be empty here.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import get_args

from larp_mllm.model.configuration import AdapterKind

import torch
from torch import Tensor, nn

# Standard deviation of the code logits at the first step, at most. Head rows as long as those of text give 5 with SmolLM2: 34 bits
# a code at the first step, where equal probabilities give 13, and still 17 twelve steps later (LOG.md).
_LOGIT_SPREAD = 0.5
_RANK = 32
# Per thread, since several may use one model. The rows of an adapter, by its id and theirs.
_KEPT: ContextVar[dict[tuple[int, str], Tensor] | None] = ContextVar("rows of adapters", default=None)


def residual_rank(kind: AdapterKind, hidden: int) -> int:
    """Return the rank of the residual of a new adapter; 0, a table, for the other kind and where it would save nothing."""
    return _RANK if kind == "codebook" and hidden > _RANK else 0


@contextmanager
def keeping_rows() -> Iterator[None]:
    """In the block, the rows of each adapter are computed once, where no gradients are recorded: weights must not change."""
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


class CodebookRows(nn.Module):
    """K rows of width `hidden`: MLP(codebook) + a learned residual, initialised to zero.

    The residual is the product of a table (K, rank) and a matrix (rank, hidden), which learns as fast as a table (K, hidden), the
    residual of rank 0, and is a fraction of its size (LOG.md). `offset` adds one learned vector to all rows. Output-head rows have
    none: it would shift all logits equally.
    """

    def __init__(self, code_dim: int, codebook_size: int, hidden: int, offset: bool, rank: int = 0):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(code_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden, bias=offset))
        self.residual = nn.Embedding(codebook_size, rank or hidden)
        self.expand = nn.Linear(rank, hidden, bias=False) if rank else nn.Identity()

    def forward(self, codebook: Tensor) -> Tensor:
        """Codebook (K, d) -> rows (K, hidden)."""
        indices = torch.arange(codebook.shape[0], device=codebook.device)
        return self.mlp(codebook) + self.expand(self.residual(indices))

    @torch.no_grad()
    def initialize(self, codebook: Tensor, embeddings: Tensor, most: Tensor | float = math.inf) -> None:
        """Initialise: residual zero; centred rows with the average norm of `embeddings` (rows, hidden), at most `most`."""
        first, last = self.mlp[0], self.mlp[2]
        for linear in (first, last):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(first.bias)
        nn.init.zeros_(self.residual.weight)
        if isinstance(self.expand, nn.Linear):
            nn.init.normal_(self.expand.weight, std=self.expand.in_features**-0.5)
        rows = self.mlp[1](first(codebook)) @ last.weight.T
        mean = rows.mean(0)
        scale = embeddings.norm(dim=-1).mean().clamp(max=most) / (rows - mean).norm(dim=-1).mean().clamp_min(1e-6)
        last.weight.mul_(scale)
        if last.bias is not None:
            last.bias.copy_(-mean * scale)


class FreeRows(nn.Module):
    """K learned rows of width `hidden`, initialised around the mean of the base model's rows."""

    def __init__(self, codebook_size: int, hidden: int):
        super().__init__()
        self.rows = nn.Embedding(codebook_size, hidden)

    def forward(self, codebook: Tensor) -> Tensor:
        """Codebook (K, d) -> rows (K, hidden); only the number of codes matters."""
        return self.rows(torch.arange(codebook.shape[0], device=codebook.device))

    @torch.no_grad()
    def initialize(self, codebook: Tensor, embeddings: Tensor, most: Tensor | float = math.inf) -> None:
        """Initialise: normal with the mean and standard deviation of `embeddings` (rows, hidden), the latter of norm `most` at most."""
        mean, std = embeddings.mean(0), embeddings.std(0)
        std = std * (most / std.norm()).clamp_max(1.0)
        self.rows.weight.copy_(mean + std * torch.randn_like(self.rows.weight))


class TokenAdapter(nn.Module):
    """Input and output rows of the video ids of a model: two controls (video_start, video_end) and K codes.

    The codebook, float (K, d), is a buffer and saved with the model. `rank` is that of `CodebookRows`; `scale` that of the base's
    embedding, which input rows get as well. Raises ValueError for an unknown kind.
    """

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        hidden: int,
        kind: AdapterKind = "codebook",
        rank: int = 0,
        scale: float = 1.0,
    ):
        super().__init__()
        if kind not in get_args(AdapterKind):
            raise ValueError(f"adapter kind must be one of {', '.join(get_args(AdapterKind))}, got {kind!r}")
        self.register_buffer("codebook", torch.zeros(codebook_size, code_dim))
        if kind == "codebook":
            self.code_input = CodebookRows(code_dim, codebook_size, hidden, offset=True, rank=rank)
            self.code_output = CodebookRows(code_dim, codebook_size, hidden, offset=False, rank=rank)
        else:
            self.code_input, self.code_output = FreeRows(codebook_size, hidden), FreeRows(codebook_size, hidden)
        self.scale = scale
        self.control_input = nn.Embedding(2, hidden)
        self.control_output = nn.Embedding(2, hidden)

    @torch.no_grad()
    def initialize(
        self, codebook: Tensor, input_embeddings: Tensor, output_embeddings: Tensor, hidden_norm: Tensor | float = 0.0
    ) -> None:
        """Initialise from the codebook (K, d) and the base model's embedding and head rows (V, hidden).

        hidden_norm: average norm of the hidden states that the head gets. The larger, the shorter the head rows of codes, so that
        they begin nearly equally probable; 0: as long as the base's.

        Raises ValueError for a codebook of another shape.
        """
        if tuple(codebook.shape) != tuple(self.codebook.shape):
            raise ValueError(
                f"the adapter was built for a codebook {tuple(self.codebook.shape)}, got {tuple(codebook.shape)}: pass its shape"
            )
        self.codebook.copy_(codebook)
        self.code_input.initialize(self.codebook, input_embeddings)
        norm = torch.as_tensor(hidden_norm, device=output_embeddings.device)
        most = _LOGIT_SPREAD * output_embeddings.shape[-1] ** 0.5 / norm  # infinite for 0
        self.code_output.initialize(self.codebook, output_embeddings, most)
        for controls, rows in ((self.control_input, input_embeddings), (self.control_output, output_embeddings)):
            controls.weight.copy_(rows.mean(0) + rows.std(0) * torch.randn_like(controls.weight))

    def input_rows(self) -> Tensor:
        """What the base's decoder gets for video_start, video_end and the codes, (2 + K, hidden)."""
        return self._kept("input", self._input_rows)

    def control_rows(self) -> Tensor:
        """The head rows of video_start and video_end, (2, hidden)."""
        return self._controls(self.control_output)

    def code_rows(self) -> Tensor:
        """The head rows of the codes, (K, hidden): the code logits are hidden states @ rows.T."""
        return self._kept("codes", lambda: self.code_output(self.codebook))

    def _input_rows(self) -> Tensor:
        rows = torch.cat([self._controls(self.control_input), self.code_input(self.codebook)])
        # Rounded as bases do that multiply by a tensor of their own dtype.
        return rows if self.scale == 1.0 else rows * torch.full((), self.scale, dtype=rows.dtype, device=rows.device)

    def _controls(self, table: nn.Embedding) -> Tensor:
        return table(torch.arange(2, device=self.codebook.device))

    def _kept(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        # A compiled graph computes its own.
        kept = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else _KEPT.get()
        if kept is None:
            return compute()
        key = id(self), name
        if key not in kept:
            kept[key] = compute()
        return kept[key]
