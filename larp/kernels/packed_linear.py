"""Linear layers for decoding on a CPU: few rows times large weights, bound by the time to read the weights.

Measured with two rows, one thread and 91 M float32 weights: 38 ms by `F.linear`, which reads the weights once per row; 14 ms
with weights packed by oneDNN, which are read once for all rows.

With packed weights the result of a row is bitwise independent of the other rows and of the number of threads. Sampled clips
depend on that: between 2 and 16 rows the last bits of `F.linear` differ, which changes 1.4 of a clip's 1024 samples (same model,
8192 codes, random weights).

Shapes: R rows, I input width, O output width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Literal["auto", "plain", "packed", "fused"]

# A row's bits are the same among 2 and among 64 rows with the layout for 16 rows, but not with the one for a single row.
_LAYOUT_ROWS = 16


class PlainLinear:
    """`x @ weight.T` by `F.linear`, on any device."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return F.linear(x, self.weight)


class PackedLinear:
    """`x @ weight.T` with a copy of the weight in oneDNN's layout for few rows, on a CPU."""

    def __init__(self, weight: Tensor):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _LAYOUT_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        """Map (R, ..., I) to (R, ..., O)."""
        if x.numel() == x.shape[-1]:
            # A single row would take another kernel, which sums in another order.
            return self._matmul(torch.cat([x, x]))[:1]
        return self._matmul(x)

    def _matmul(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")

    @staticmethod
    def supports(weight: Tensor) -> bool:
        """Return whether oneDNN is available and supports the device and dtype of `weight`."""
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        # Private operators of torch, which torch.compile uses.
        if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
            return False
        is_float32 = weight.dtype == torch.float32
        return is_float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_linear(weight: Tensor, kind: Weights = "auto") -> type[PlainLinear] | type[PackedLinear]:
    """Return the class for weights of this device and dtype. "auto" packs where that is supported.

    "fused" gives plain weights, which `larp.sampling.decoder_kernels` reads. Raises ValueError for an unknown kind, and for
    "packed" where packing is not supported.
    """
    if kind not in ("auto", "plain", "packed", "fused"):
        raise ValueError(f"weights is {kind!r}; it must be 'auto', 'plain', 'packed' or 'fused'")
    # Not chosen by measurement: the two differ in the last bits, so a clip would depend on the load of the machine.
    packable = PackedLinear.supports(weight)
    if kind == "packed" and not packable:
        found = f"{weight.dtype} on {weight.device}"
        raise ValueError(f"weights='packed' needs float32 or bfloat16 on a CPU with oneDNN, not {found}: use 'auto'")
    return PackedLinear if packable and kind in ("auto", "packed") else PlainLinear
