"""The matrix products of decoding: few rows against large weights, where reading the weights is all the work.

Measured on this kind of work, one thread, 91 M weights in float32: two rows take 38 ms with `F.linear`, which reads the
weights once for each row, and 14 ms with weights that oneDNN has laid out for it, which it reads once for all rows.

Shapes: R rows, I input width, O output width.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Literal["auto", "plain", "packed"]

# With the layout for 16 rows a row gets the same bits among 2 and among 64; with the one for a single row it does not.
_LAYOUT_ROWS = 16
# How much faster plain weights must be measured to be taken: the choice changes the last bits, so noise must not make it.
_CLEARLY = 1.3


class Plain:
    """A weight as it is: `x @ weight.T` by `F.linear`, on any device."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return F.linear(x, self.weight)


class Packed:
    """A copy of a weight in oneDNN's layout for few rows, on a CPU; a row's bits do not depend on the rows beside it."""

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


def choose_product(weights: Sequence[Tensor], rows: int, kind: Weights = "auto") -> type[Plain] | type[Packed]:
    """Return how to multiply: as `kind` says, or, for "auto", packed unless plain is clearly faster for such weights.

    Args:
        weights: those of one block, (O, I) each; "auto" times them.
        rows: how many rows a product will have.

    Raises ValueError for an unknown kind, and for "packed" where the weights cannot be.
    """
    if kind not in ("auto", "plain", "packed"):
        raise ValueError(f"weights is {kind!r}; it must be 'auto', 'plain' or 'packed'")
    packable = all(Packed.serves(weight) for weight in weights)
    if kind == "packed" and not packable:
        found = f"{weights[0].dtype} on {weights[0].device}"
        raise ValueError(f"weights='packed' needs float32 or bfloat16 on a CPU with oneDNN, not {found}: use 'auto'")
    if kind == "plain" or not packable:
        return Plain
    if kind == "packed":
        return Packed
    inputs = [weight.new_ones(rows, weight.shape[1]) for weight in weights]
    made = {product: [product(weight) for weight in weights] for product in (Plain, Packed)}
    runs = [lambda own=own: [multiply(x) for multiply, x in zip(own, inputs, strict=True)] for own in made.values()]
    plain, packed = (min(times) for times in timed(runs))
    return Plain if plain * _CLEARLY < packed else Packed


def timed(runs: Sequence[Callable[[], object]], repeats: int = 5) -> list[list[float]]:
    """Return the seconds of each of some runs, `repeats` of each in turn, so that a busy moment hits all of them."""
    seconds: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, own in zip(runs, seconds, strict=True):
            began = time.perf_counter()
            run()
            if repeat > 0:  # the first one warms up
                own.append(time.perf_counter() - began)
    return seconds


def best_threads(run: Callable[[], object]) -> int:
    """Return the present number of threads if it does `run` clearly faster than 1 at this moment, else 1.

    On a busy machine threads that wait for each other take several times as long as one.
    """
    most = torch.get_num_threads()
    if most == 1:
        return 1

    def with_threads(count: int) -> None:
        with threads(count):
            run()

    one, many = timed([lambda: with_threads(1), lambda: with_threads(most)])
    return most if median(many) * 1.1 < median(one) else 1


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch's CPU kernels run on `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
