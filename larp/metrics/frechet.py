"""Frechet distance between two sets of features, from float64 moments that merge in any order.

Letters: n features of width D; a, b the two sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of outer products of a set of features, which is all that the Frechet distance needs.

    Merging the moments of shards gives the moments of the whole set, so any number of processes, in any order, yields
    the same figure up to float64 rounding.
    """

    count: int
    """Number of features seen."""
    sum: Tensor
    """(D,) float64."""
    outer: Tensor
    """(D, D) float64: the sum of f f^T."""

    @classmethod
    def empty(cls, dim: int) -> Moments:
        """The moments of no features of width `dim`: where an accumulation starts."""
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """The moments of `features` (n, D), any floating dtype; ValueError for another shape or non-finite values."""
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
        """These moments with `features` (n, D) added; a new object, the old one stays as it is."""
        return self + Moments.of(features)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together; ValueError if their widths differ."""
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
        """(D,) float64 mean; ValueError if no feature was seen."""
        if self.count == 0:
            raise ValueError("Moments of no features have no mean: no clip was read")
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64 covariance with division by n (StyleGAN-V and LARP; TATS divides by n - 1)."""
        return self.outer / self.count - torch.outer(self.mean, self.mean)

    def save(self, path: str | Path) -> None:
        """Write the moments to a safetensors file."""
        tensors = {"count": torch.tensor([self.count]), "sum": self.sum, "outer": self.outer}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path))

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Read moments that `save` wrote; ValueError naming the file if it holds anything else."""
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
    # Rounding leaves the null space of a rank-deficient covariance slightly negative.
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64.

    The square root is taken by two symmetric eigendecompositions: (S_a S_b)^(1/2) has the trace of
    (S_a^(1/2) S_b S_a^(1/2))^(1/2). ValueError if the widths differ or a set is empty. Source: Dowson and Landau 1982;
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
    """Standard deviation of the Frechet distance over `repeats` resamplings of the clips of both sets.

    a (n, D) and b (m, D) float features. `paired` samples the same rows from both sets (reconstructions beside their
    originals). Only the spread is returned, because resampling repeats clips and so shifts the distance itself upward.
    ValueError for fewer than 2 repeats, or for a paired sample from sets of different sizes.
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
    """Frechet distance between two disjoint samples of real features: what a perfect generator would score at this size.

    features (m, D). The samples have `num_clips` each, or m // 2 where there are not enough; the number used is returned
    beside the distance, because the floor falls about as 1 / n. ValueError for fewer than 4 features.
    """
    if len(features) < 4:
        raise ValueError(f"real-vs-real floor: at least 4 real clips are needed, got {len(features)}")
    size = min(num_clips, len(features) // 2)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    halves = (features[order[:size]], features[order[size : 2 * size]])
    return frechet_distance(*map(Moments.of, halves)), size
