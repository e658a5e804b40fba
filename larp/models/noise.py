"""Random numbers that do not depend on how a global batch is split into processes and micro batches."""

import torch
from torch import Tensor


class BatchNoise:
    """A stream of random tensors with one row per clip of the global batch.

    Every process samples all rows of the global batch and selects its own. One process with 16 clips and two with 8 thus use the
    same stochastic codes, sampling masks and label noise. The generator is on the CPU, so that CPU and GPU runs use the same
    numbers.

    Args:
        seed, step: identify the stream; the same pair gives the same numbers.
        total: rows of the global batch.
        offset, count: the rows of this micro batch, `offset + count <= total`.
        device: of the returned tensors.
    """

    def __init__(self, seed: int, step: int, total: int, offset: int = 0, count: int | None = None, device="cpu"):
        count = total - offset if count is None else count
        if not 0 <= offset <= offset + count <= total:
            raise ValueError(f"rows {offset}..{offset + count} do not lie in a global batch of {total}")
        self.total, self.rows, self.device = total, slice(offset, offset + count), torch.device(device)
        # Mixed, because similar seeds of a Mersenne twister give similar first numbers.
        mixed = (seed * 0x9E3779B97F4A7C15 + (step + 1) * 0xBF58476D1CE4E5B9) % (1 << 63)
        self.generator = torch.Generator().manual_seed(mixed)

    def uniform(self, *shape: int) -> Tensor:
        """Sample float32 values of U[0, 1), shape (count, *shape)."""
        return self._select_rows(torch.rand(self.total, *shape, generator=self.generator))

    def normal(self, *shape: int) -> Tensor:
        """Sample float32 values of N(0, 1), shape (count, *shape)."""
        return self._select_rows(torch.randn(self.total, *shape, generator=self.generator))

    def _select_rows(self, sampled: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return sampled[self.rows].to(self.device)
        # A copy from pageable memory would wait for all pending work of the device.
        return sampled[self.rows].pin_memory().to(self.device, non_blocking=True)
