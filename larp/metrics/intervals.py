"""Intervals of 95 % of what is measured on clips: of shares of independent ones, and of means over clips that share a source.

Clips of one video, and UCF-101's clips of one group, which are cut from the same video, are not independent. Shapes: n clips.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from larp.data.datasets import UCF101_GROUP
from larp.data.listing import VideoItem

import torch
from torch import Tensor


def wilson(hits: float, count: float) -> list[float]:
    """Return the 95 % interval [low, high] of a binomial proportion (Wilson 1927)."""
    z, share = 1.96, hits / count
    middle = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return [max(0.0, (middle - reach) / (1 + z * z / count)), min(1.0, (middle + reach) / (1 + z * z / count))]


def sources(names: Iterable[str]) -> Tensor:
    """Return a number for the source of each video, int64 (n,): of UCF-101's group in its name, else of the name."""
    numbers: dict[str, int] = {}
    keys = (match[1] if (match := UCF101_GROUP.search(name)) else name for name in names)
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.int64)


def sources_of(items: Iterable[VideoItem]) -> Tensor:
    """Return `sources` of listed videos, whose group counts where the data name one."""
    return sources(item.group or item.name for item in items)


def clustered_share(hits: Tensor, groups: Tensor) -> list[float]:
    """Return Wilson's interval of the share of True in hits (n,), bool, of clips with these sources, int64 (n,).

    It is that of fewer independent clips: as many as would give the mean the variance that it has over sources. Where all are hits, or
    none, as many as there are sources.
    """
    values, number = hits.double(), len(groups.unique())
    mean, count = values.mean(), float(number)
    if 0 < mean < 1 and number > 1:
        apart = clustered_mean(values, torch.arange(len(values)))["interval_95"]
        low, high = clustered_mean(values, groups)["interval_95"]
        count = len(values) * min(1.0, ((apart[1] - apart[0]) / max(high - low, 1e-12)) ** 2)
    return wilson(mean.item() * count, count)


def clustered_mean(values: Tensor, groups: Tensor) -> dict[str, Any]:
    """Return the mean of values (n,) and its 95 % interval, clustered by group: clips of one video are not independent.

    groups: int64 (n,). The interval is None for fewer than two groups.
    """
    values = values.double()
    mean = values.mean().item()
    _, place = groups.unique(return_inverse=True)
    number = int(place.max()) + 1
    if number < 2:
        return {"mean": mean, "interval_95": None}
    sums = torch.zeros(number, dtype=torch.float64).index_add_(0, place, values - mean)
    reach = 1.96 * math.sqrt(sums.square().sum().item() * number / (number - 1)) / len(values)
    return {"mean": mean, "interval_95": [mean - reach, mean + reach]}
