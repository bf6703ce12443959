"""KID: the unbiased MMD^2 of two sets of features under a cubic kernel.

MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_ij k(x_i, y_j)
k(x, y) = (x . y / d + 1)^3                                     (Binkowski et al. 2018)
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, stack

BATCH = 64


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Returns the unbiased MMD^2 of two sets of features, (N, d) and (M, d), with KID's kernel."""
    across = stack([_kernel(part, second).sum() for part in first.split(BATCH)]).sum()
    mean_across = float(across) / (len(first) * len(second))
    return kernel_mean(first) + kernel_mean(second) - 2 * mean_across


def subset_distance(
    first: Tensor, second: Tensor, num_subsets: int, subset_size: int, seed: int
) -> float:
    """Returns the mean MMD^2 of random subsets of both, as published; where neither has more rows
    than a subset, that of the whole.

    The subsets are those that torchmetrics draws after `torch.manual_seed(seed)`.
    """
    size = min(len(first), len(second), subset_size)
    if size == len(first) == len(second):
        return kernel_distance(first, second)
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(num_subsets):
        of_second = second[torch.randperm(len(second), generator=generator)[:size]]
        of_first = first[torch.randperm(len(first), generator=generator)[:size]]
        distances.append(kernel_distance(of_first, of_second))
    return float(np.mean(distances))


def distances_without(first: Tensor, second: Tensor, parts: Sequence[np.ndarray]) -> list[float]:
    """Returns `kernel_distance` of `first` without each of the parts, whose sums are taken once.

    parts: rows of `first`, each in one part.
    """
    owner = part_numbers(parts, len(first))
    across = first.new_zeros(len(parts))
    within = first.new_zeros(len(parts), len(parts))
    for rows, owners in zip(first.split(BATCH), owner.split(BATCH), strict=True):
        across.index_add_(0, owners, _kernel(rows, second).sum(dim=1))
        sums = first.new_zeros(len(rows), len(parts))
        sums.index_add_(1, owner, _kernel(rows, first))
        within.index_add_(0, owners, sums)
    same = first.new_zeros(len(parts)).index_add_(0, owner, _same(first))
    inner = kernel_mean(second)
    distances = []
    for number, part in enumerate(parts):
        count = len(first) - len(part)
        pairs = within.sum() - 2 * within[number].sum() + within[number, number]
        inside = float(pairs - (same.sum() - same[number])) / (count * (count - 1))
        rest = float(across.sum() - across[number]) / (count * len(second))
        distances.append(inside + inner - 2 * rest)
    return distances


def part_numbers(parts: Sequence[np.ndarray], count: int) -> Tensor:
    """Returns for each of `count` rows the number of the part that it is in, (count,) int64."""
    owner = torch.zeros(count, dtype=torch.long)
    for number, part in enumerate(parts):
        owner[torch.from_numpy(part)] = number
    return owner


def kernel_mean(rows: Tensor) -> float:
    """Returns the mean of k over all pairs of two different rows."""
    total = stack([_kernel(part, rows).sum() for part in rows.split(BATCH)]).sum()
    return float(total - _same(rows).sum()) / (len(rows) * (len(rows) - 1))


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3


def _same(rows: Tensor) -> Tensor:
    """Returns k(x, x) of each row."""
    return (rows.square().sum(dim=1) / rows.shape[1] + 1) ** 3
