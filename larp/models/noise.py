"""Random numbers that belong to the samples of a global batch, not to the process that happens to hold them."""

import torch
from torch import Tensor


class BatchNoise:
    """A stream of random tensors, row `i` of which is the same whatever the number of processes or micro batches.

    Every process samples the numbers of the whole global batch and keeps its own rows, so that one process with 16 clips and two
    processes with 8 take the same stochastic codes, sampling masks and label noise. Samples come from a CPU generator: a GPU and
    a CPU run see the same numbers.

    Args:
        seed, step: name the stream; the same pair gives the same numbers.
        total: rows of the global batch.
        offset, count: the rows of this micro batch, `offset + count <= total`.
        device: where the sampled rows are put.
    """

    def __init__(self, seed: int, step: int, total: int, offset: int = 0, count: int | None = None, device="cpu"):
        count = total - offset if count is None else count
        if not 0 <= offset <= offset + count <= total:
            raise ValueError(f"rows {offset}..{offset + count} do not lie in a global batch of {total}")
        self.total, self.rows, self.device = total, slice(offset, offset + count), torch.device(device)
        # Mixed, because neighbouring seeds of a Mersenne twister start alike.
        mixed = (seed * 0x9E3779B97F4A7C15 + (step + 1) * 0xBF58476D1CE4E5B9) % (1 << 63)
        self.generator = torch.Generator().manual_seed(mixed)

    def uniform(self, *shape: int) -> Tensor:
        """Return float32 values of U[0, 1), shape (count, *shape)."""
        return self._placed(torch.rand(self.total, *shape, generator=self.generator))

    def normal(self, *shape: int) -> Tensor:
        """Return float32 values of N(0, 1), shape (count, *shape)."""
        return self._placed(torch.randn(self.total, *shape, generator=self.generator))

    def _placed(self, sampled: Tensor) -> Tensor:
        """Our rows, on the device."""
        if self.device.type != "cuda":
            return sampled[self.rows].to(self.device)
        # From pageable memory the copy would wait for all that the device has still to do.
        return sampled[self.rows].pin_memory().to(self.device, non_blocking=True)
