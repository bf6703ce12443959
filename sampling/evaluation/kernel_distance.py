"""The kernel distance of two sets of features: the unbiased MMD^2 behind KID.

MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_ij k(x_i, y_j)
k(x, y) = (x . y / d + 1)^3                                     (Binkowski et al. 2018)
"""

from torch import Tensor, stack

BATCH = 64


def kernel_distance(first: Tensor, second: Tensor, second_mean: float | None = None) -> float:
    """Returns the unbiased MMD^2 of two sets of features, (N, d) and (M, d), with KID's kernel.

    second_mean: `kernel_mean(second)` where it is known.
    """
    across = stack([_kernel(part, second).sum() for part in first.split(BATCH)]).sum()
    within = kernel_mean(second) if second_mean is None else second_mean
    return kernel_mean(first) + within - 2 * float(across) / (len(first) * len(second))


def kernel_mean(rows: Tensor) -> float:
    """Returns the mean of k over all pairs of two different rows."""
    total = stack([_kernel(part, rows).sum() for part in rows.split(BATCH)]).sum()
    same = (rows.square().sum(dim=1) / rows.shape[1] + 1) ** 3
    return float(total - same.sum()) / (len(rows) * (len(rows) - 1))


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3
