"""The matrix products of decoding: few rows against large weights, where reading the weights is all the work.

Measured on this kind of work, one thread, 91 M weights in float32: two rows take 38 ms with `F.linear`, which reads the
weights once for each row, and 14 ms with weights that oneDNN has laid out for it, which it reads once for all rows.

These also give a row the same bits whatever the rows beside it and the number of threads. Clips depend on that: between 2 and 16
rows the last bits of `F.linear` differ, which moves 1.4 of the 1024 samples of a clip (8192 codes, that model, random weights).

Shapes: R rows, I input width, O output width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Literal["auto", "plain", "packed", "fused"]

# With the layout for 16 rows a row gets the same bits among 2 and among 64; with the one for a single row it does not.
_LAYOUT_ROWS = 16


class Plain:
    """A weight as it is: `x @ weight.T` by `F.linear`, on any device."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return F.linear(x, self.weight)


class Packed:
    """A copy of a weight in oneDNN's layout for few rows, on a CPU."""

    def __init__(self, weight: Tensor):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _LAYOUT_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        """Map (R, ..., I) to (R, ..., O)."""
        if x.numel() == x.shape[-1]:
            # A lone row would take another kernel, which adds up in another order.
            return self._product(torch.cat([x, x]))[:1]
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")

    @staticmethod
    def serves(weight: Tensor) -> bool:
        """Whether oneDNN is there, and takes weights of this device and dtype."""
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        # The operators that torch.compile uses; torch promises nothing about them.
        if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
            return False
        wide = weight.dtype == torch.float32
        return wide or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_product(weight: Tensor, kind: Weights = "auto") -> type[Plain] | type[Packed]:
    """Return how to multiply by weights such as this one: as `kind` says, or, for "auto", packed wherever that is possible.

    "fused" weights are plain ones to all but `larp.sampling.decoder_kernels`. Raises ValueError for an unknown kind, and for "packed" where
    the weights cannot be.
    """
    if kind not in ("auto", "plain", "packed", "fused"):
        raise ValueError(f"weights is {kind!r}; it must be 'auto', 'plain', 'packed' or 'fused'")
    # Not a matter of measurement: the two differ in the last bits, so a clip would depend on how busy the machine was.
    packable = Packed.serves(weight)
    if kind == "packed" and not packable:
        found = f"{weight.dtype} on {weight.device}"
        raise ValueError(f"weights='packed' needs float32 or bfloat16 on a CPU with oneDNN, not {found}: use 'auto'")
    return Packed if packable and kind in ("auto", "packed") else Plain
