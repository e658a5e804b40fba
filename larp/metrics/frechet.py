"""Frechet distance between two sets of features, from float64 moments that can be merged in any order.

Shapes: n features of width D.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from larp.files import replacing

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of outer products of a set of features.

    Merging the moments of shards gives those of the whole set, so that the Frechet distance does not depend on the number
    of processes, up to float64 rounding.
    """

    count: int
    """Number of features."""
    sum: Tensor
    """(D,) float64."""
    outer: Tensor
    """(D, D) float64: the sum of f f^T."""

    @classmethod
    def empty(cls, dim: int) -> Moments:
        """Return the moments of an empty set of features of width `dim`."""
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Return the moments of floating-point features (n, D). Raises ValueError for other shapes and non-finite values."""
        if features.ndim != 2:
            raise ValueError(f"Moments: features must have shape (n, D), got {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            bad = int((~torch.isfinite(features)).any(dim=1).sum())
            raise ValueError(
                f"Moments: {bad} of {len(features)} features are not finite; check the clips that gave them"
            )
        wide = features.detach().to("cpu", torch.float64)
        return cls(len(wide), wide.sum(dim=0), wide.T @ wide)

    def update(self, features: Tensor) -> Moments:
        """Return new moments with `features` (n, D) added."""
        return self + Moments.of(features)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets together. Raises ValueError if their widths differ."""
        if self.dim != other.dim:
            raise ValueError(f"Moments of widths {self.dim} and {other.dim} do not merge: use one feature extractor")
        return Moments(self.count + other.count, self.sum + other.sum, self.outer + other.outer)

    __add__ = merge

    @property
    def dim(self) -> int:
        """Width D of the features."""
        return len(self.sum)

    @property
    def mean(self) -> Tensor:
        """Mean, (D,) float64. Raises ValueError for an empty set."""
        if self.count == 0:
            raise ValueError("Moments of no features have no mean: no clip was read")
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Covariance, (D, D) float64, divided by n as in StyleGAN-V and LARP (TATS divides by n - 1)."""
        return self.outer / self.count - torch.outer(self.mean, self.mean)

    def save(self, path: str | Path) -> None:
        """Write the moments to a safetensors file."""
        tensors = {"count": torch.tensor([self.count]), "sum": self.sum, "outer": self.outer}
        with replacing(path) as part:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Read moments written by `save`. Raises ValueError for other files."""
        try:
            with safe_open(str(path), framework="pt") as stored:
                count, total, outer = (stored.get_tensor(name) for name in ("count", "sum", "outer"))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path}: not a file of moments ({error}); delete it and extract the features again"
            ) from error
        return cls(int(count), total, outer)


def _symmetric_sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    # Rounding makes eigenvalues of a rank-deficient covariance slightly negative.
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return the squared Frechet distance |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64.

    The trace of the square root is that of (S_a^(1/2) S_b S_a^(1/2))^(1/2), computed by two symmetric
    eigendecompositions. Raises ValueError if the widths differ or a set is empty. Source: Dowson and Landau 1982;
    Unterthiner et al. 2018 (FVD).
    """
    if a.dim != b.dim:
        raise ValueError(f"Frechet distance needs features of one width, got {a.dim} and {b.dim}")
    difference = a.mean - b.mean
    root = _symmetric_sqrt(a.covariance)
    product = root @ b.covariance @ root
    overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return float(difference @ difference + a.covariance.trace() + b.covariance.trace() - 2 * overlap)


def bootstrap_deviation(a: Tensor, b: Tensor, repeats: int, seed: int, paired: bool = False) -> float:
    """Return the standard deviation of the Frechet distance over `repeats` bootstrap samples of both sets.

    The mean of the bootstrap distances is not an estimate of the distance, because repeated clips increase it.

    Args:
        a, b: float features (n, D) and (m, D).
        repeats: number of samples, at least 2.
        seed: of the samples.
        paired: sample the same rows of both sets, for reconstructions and their originals.

    Raises ValueError for fewer than 2 repeats, and for paired sets of different sizes.
    """
    if repeats < 2:
        raise ValueError(f"bootstrap: repeats must be at least 2, got {repeats}")
    if paired and len(a) != len(b):
        raise ValueError(f"bootstrap: paired sets must have one size, got {len(a)} and {len(b)}")
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(repeats):
        rows_a = torch.randint(len(a), (len(a),), generator=generator)
        rows_b = rows_a if paired else torch.randint(len(b), (len(b),), generator=generator)
        distances.append(frechet_distance(Moments.of(a[rows_a]), Moments.of(b[rows_b])))
    return float(torch.tensor(distances, dtype=torch.float64).std())


def real_floor(features: Tensor, num_clips: int, seed: int) -> tuple[float, int]:
    """Return the Frechet distance between two disjoint samples of real features (m, D), and their size.

    It is the expected score of a perfect generator at this sample size, and decreases about as 1 / n. Each sample has
    `num_clips` features, or m // 2 if there are too few. Raises ValueError for fewer than 4 features.
    """
    if len(features) < 4:
        raise ValueError(f"real-vs-real floor: at least 4 real clips are needed, got {len(features)}")
    size = min(num_clips, len(features) // 2)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    halves = (features[order[:size]], features[order[size : 2 * size]])
    return frechet_distance(*map(Moments.of, halves)), size
