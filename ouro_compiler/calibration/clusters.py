"""Groups along one axis: contiguous ones, and exact k-means of numbers.

In one dimension clusters are intervals of the sorted values, so that dynamic programming finds the
partition with the least sum of squared distances: nothing is drawn at random.
"""

from __future__ import annotations

import torch
from torch import Tensor


def contiguous_groups(length: int, count: int) -> Tensor:
    """Ids (length,) int64 of `count` runs of nearly equal length, the longer ones first.

    No more groups than there are entries: 197 in 8 are 25, 25, 25, 25, 25, 24, 24, 24.
    """
    count = min(count, length)
    sizes = torch.full((count,), length // count)
    sizes[: length % count] += 1
    return torch.repeat_interleave(torch.arange(count), sizes)


def kmeans(values: Tensor, count: int) -> Tensor:
    """Ids (n,) int64 of the best `count` clusters of values (n,), by centroid from small to large.

    Equal values share a cluster, so there may be fewer. Time grows with count * n^2, in n * count
    operations on vectors.
    """
    if count == 1:
        return torch.zeros(len(values), dtype=torch.int64)
    points, inverse, weight = torch.unique(
        values.double(), sorted=True, return_inverse=True, return_counts=True
    )
    size, count = len(points), min(count, len(points))
    zero = torch.zeros(1, dtype=torch.float64)
    points = points - points.mean()  # sums of squares stay small beside their differences
    mass = torch.cat([zero, weight.double().cumsum(0)])
    first = torch.cat([zero, (weight * points).cumsum(0)])
    second = torch.cat([zero, (weight * points.square()).cumsum(0)])
    # cost[j]: of the first j points in the clusters so far; start[c, j]: where the last one begins.
    cost = torch.full((size + 1,), float("inf"), dtype=torch.float64)
    cost[0] = 0.0
    start = torch.zeros(count, size + 1, dtype=torch.int64)
    for cluster in range(count):
        following = torch.full_like(cost, float("inf"))
        for end in range(cluster + 1, size + 1):
            begin = slice(cluster, end)
            total = first[end] - first[begin]
            spread = second[end] - second[begin] - total.square() / (mass[end] - mass[begin])
            candidates = cost[begin] + spread.clamp(min=0)
            best = int(candidates.argmin())
            following[end], start[cluster, end] = candidates[best], cluster + best
        cost = following
    ids = torch.empty(size, dtype=torch.int64)
    end = size
    for cluster in reversed(range(count)):
        begin_at = int(start[cluster, end])
        ids[begin_at:end] = cluster
        end = begin_at
    return ids[inverse]


def group_peaks(peak: Tensor, ids: Tensor) -> Tensor:
    """The largest of the magnitudes peak (n,) in each group, (G,), of ids (n,)."""
    most = torch.zeros(int(ids.max()) + 1)
    return most.scatter_reduce(0, ids, peak.float(), "amax")
