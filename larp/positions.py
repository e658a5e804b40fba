"""Fixed sin-cos position tables (arXiv 2410.21264, reference implementation)."""

import torch
from torch import Tensor


def sincos_1d(length: int, dim: int, positions: Tensor | None = None) -> Tensor:
    """Return a (length, dim) float32 table: `[sin, cos]` over dim/2 frequencies 10000^(-i / (dim/2)).

    Raises ValueError if dim is odd. Tables are computed in float64 and rounded once.
    """
    if dim % 2:
        raise ValueError(f"a sin-cos table needs an even width, got {dim}")
    positions = torch.arange(length, dtype=torch.float64) if positions is None else positions.double()
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions[:, None] * omega[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_3d(grid: tuple[int, int, int], dim: int) -> Tensor:
    """Return a (t*h*w, dim) float32 table: 2-D sin-cos over (h, w) plus 1-D sin-cos over t, patches t-major.

    The first half of the 2-D channels encodes the column, the second half the row. Raises ValueError unless 4 divides dim.
    """
    if dim % 4:
        raise ValueError(f"a 3-D sin-cos table needs a width that 4 divides, got {dim}")
    t, h, w = grid
    columns = sincos_1d(w, dim // 2)[None].expand(h, w, -1)
    rows = sincos_1d(h, dim // 2)[:, None].expand(h, w, -1)
    plane = torch.cat([columns, rows], dim=-1).reshape(1, h * w, dim)
    return (plane + sincos_1d(t, dim)[:, None]).reshape(t * h * w, dim)
