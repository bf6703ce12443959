"""FID, KID, precision, recall and Inception Score of a set of images, each with its interval.

Computed from rows that were measured image by image, so that they depend on no order and no batch;
the values equal torchmetrics' (FID, KID, IS) and torch-fidelity's (precision, recall: Kynkaanniemi
et al. 2019). The intervals are a jackknife's over groups of prompts with all their images:
resampling would put copies into the set, which these metrics mind. They are of the generated set;
the references are taken as they are.

FID of n images is biased upwards, and its interval is of its mean at this n; FID at infinite n is
extrapolated (frechet.py). KID is unbiased. IS of n images and k classes is biased downwards, by a
factor of up to exp(-(k - 1) / (2 n)) where all classes are likely.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.evaluation.metric import FID, Metric, Row
from blackpoint.sampling.statistics.estimates import FEWEST_GROUPS, Estimate, jackknife, proportion
from blackpoint.sampling.statistics.frechet import frechet_estimates, gaussian_of, lack_of_images
from blackpoint.sampling.statistics.kernel_distance import (
    distances_without,
    part_numbers,
    subset_distance,
)
from blackpoint.sampling.verifiers.reference import inception_score

KID, PRECISION, RECALL, IS = "KID", "precision", "recall", "IS"
if TYPE_CHECKING:
    from blackpoint.sampling.evaluation.metrics.sets import SetsConfig

FID_INFINITE = "FID at infinite n"
MOST_GROUPS = 20
IMAGES_PER_CLASS = 10
"""Images per class that a split of IS has at least; fewer bound it: IS <= images in a split."""
BATCH = 512
Groups = Sequence[int] | np.ndarray
"""Each image's prompt."""
Parts = Sequence[np.ndarray]
"""Numbers of the images of each part of a set, of which a jackknife leaves one out at a time."""


def feature_metrics(
    features: Tensor, reference: Tensor, groups: Groups, config: "SetsConfig", seed: int = 0
) -> list[Metric]:
    """Returns FID, KID, precision and recall of features (N, d) against references (M, d), float32.

    FID at infinite n is left out where `frechet.lack_of_images` says why. Raises UserError for
    fewer than two rows of either.
    """
    _check_rows(features, reference)
    ours, real = features.double(), reference.double()
    parts = jackknife_parts(groups)
    metrics = fid(ours, real, groups, seed) + [kid(ours, real, parts, config, seed)]
    if min(len(ours), len(real)) > config.neighbourhood:
        metrics += precision_recall(ours, real, parts, config.neighbourhood)
    return metrics


def fid(ours: Tensor, real: Tensor, groups: Groups, seed: int) -> list[Metric]:
    """Returns FID at this n and, where it can be extrapolated, at infinite n."""
    at_n, at_infinity = frechet_estimates(ours, gaussian_of(real), independent_groups(groups), seed)
    estimates = {FID: at_n} | ({} if at_infinity is None else {FID_INFINITE: at_infinity})
    return [Metric(name, "", estimate, "images", "lower") for name, estimate in estimates.items()]


def kid(ours: Tensor, real: Tensor, parts: Parts, config: "SetsConfig", seed: int) -> Metric:
    """Returns KID, the mean over subsets, with the interval of the whole set's distance."""
    value = subset_distance(ours, real, config.kid_subsets, config.kid_subset_size, seed)
    left_out = distances_without(ours, real, parts) if parts else []
    return Metric(KID, "", jackknife(value, left_out, len(ours)), "images", "lower")


def precision_recall(ours: Tensor, real: Tensor, parts: Parts, neighbourhood: int) -> list[Metric]:
    """Returns the shares of images in the references' balls, and of references in the images'.

    Without a part, recall keeps the other images' balls as they are in the whole set.
    """
    inside, covers = ball_counts(ours, real, neighbourhood, parts or [np.arange(len(ours))])
    total = covers.sum(axis=0)
    recalls = [float((total > cover).mean()) for cover in covers] if parts else []
    precisions = _without(parts, lambda kept: float(inside[kept].mean()))
    return [
        _share(PRECISION, float(inside.mean()), precisions, len(ours)),
        _share(RECALL, float((total > 0).mean()), recalls, len(ours)),
    ]


def logit_metrics(
    logits: Tensor, groups: Groups, config: "SetsConfig", seed: int = 0
) -> list[Metric]:
    """Returns the Inception Score of logits (N, k), its interval within 1 and k.

    It is the mean over random splits, also where a part is left out of each of them; of one split
    where `num_splits` says so. Raises UserError for fewer than two images.
    """
    count, num_classes = logits.shape
    if count < 2:
        raise UserError(f"Inception Score: {count} image; a set has at least 2")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    splits = order.chunk(num_splits(count, num_classes, config.inception_score_splits))

    def score(kept: np.ndarray) -> float:
        is_kept = torch.zeros(count, dtype=torch.bool)
        is_kept[torch.from_numpy(kept)] = True
        rest = [split[is_kept[split]] for split in splits]
        return float(np.mean([inception_score(logits[rows]) for rows in rest if len(rows)]))

    value = score(np.arange(count))
    interval = jackknife(math.log(value), np.log(_without(jackknife_parts(groups), score)), count)
    low, high = (float(np.clip(np.exp(x), 1, num_classes)) for x in (interval.low, interval.high))
    return [Metric(IS, "", Estimate(value, low, high, count), "images", "higher")]


def extrapolation_notes(features: Tensor, groups: Groups) -> list[str]:
    """Says why there is no FID at infinite n; nothing where there is."""
    num_groups = len(np.unique(independent_groups(groups)))
    lack = lack_of_images(len(features), features.shape[1], num_groups)
    return [f"{FID_INFINITE} left out: {lack}"] if lack else []


def stacked(rows: Sequence[Row], column: str) -> Tensor:
    """Returns a column of rows of numbers as (N, d) float32."""
    return torch.from_numpy(np.stack([row[column] for row in rows]))


def num_splits(num_images: int, num_classes: int, wanted: int) -> int:
    """Returns into how many parts IS splits a set: as wanted, or one where these were too small."""
    return wanted if num_images >= IMAGES_PER_CLASS * num_classes * wanted else 1


def ball_counts(
    ours: Tensor, real: Tensor, neighbourhood: int, parts: Parts
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the counts behind precision and recall of parts of a set.

    Which generated images (N,) the references' balls hold, bool: leaving others out changes
    nothing, so precision is their mean. And how many images of each part have a reference in their
    ball, (parts, M): the balls are those of the whole set.
    """
    k = neighbourhood + 1  # the nearest is the row itself
    own_radius, real_radius = (
        torch.cat([torch.cdist(some, rows).kthvalue(k).values for some in rows.split(BATCH)])
        for rows in (ours, real)
    )
    inside = torch.empty(len(ours), dtype=torch.bool)
    covers = torch.zeros(len(parts), len(real), dtype=torch.int32)
    owner = part_numbers(parts, len(ours))
    for start in range(0, len(ours), BATCH):
        rows = slice(start, start + BATCH)
        across = torch.cdist(ours[rows], real)
        inside[rows] = (across <= real_radius).any(dim=1)
        covers.index_add_(0, owner[rows], (across <= own_radius[rows, None]).int())
    return inside.numpy(), covers.numpy()


def independent_groups(groups: Groups) -> np.ndarray:
    """Returns each image's prompt; of fewer than three prompts the images are their own."""
    numbers = np.asarray(groups)
    if len(np.unique(numbers)) < FEWEST_GROUPS:
        return np.arange(len(numbers))
    return numbers


def jackknife_parts(groups: Groups) -> list[np.ndarray]:
    """Splits images into parts of whole prompts, of which one at a time is left out.

    The images of a single prompt are their own. Returns the numbers of each part's images; nothing
    where an interval would rest on too few.
    """
    numbers = independent_groups(groups)
    kinds = np.unique(numbers)
    count = min(len(kinds), MOST_GROUPS)
    parts = [
        np.flatnonzero(np.isin(numbers, kinds[start::count])) for start in range(count)
    ]  # not a category at a time
    is_enough = count >= FEWEST_GROUPS and len(numbers) - max(map(len, parts)) >= 2
    return parts if is_enough else []


def _check_rows(features: Tensor, reference: Tensor) -> None:
    for name, rows in (("generated", features), ("reference", reference)):
        if len(rows) < 2:
            raise UserError(
                f"FID, KID, precision and recall: {len(rows)} {name} image; a set has at least 2"
            )
    if features.shape[1] != reference.shape[1]:
        raise UserError(
            f"features of {features.shape[1]} numbers and references of {reference.shape[1]}; "
            "measure both with one network"
        )


def _without(parts: Parts, of_kept: Callable[[np.ndarray], float]) -> list[float]:
    """Returns a metric of the set without each of the parts."""
    everything = np.arange(sum(map(len, parts)))
    return [of_kept(np.setdiff1d(everything, part)) for part in parts]


def _share(name: str, value: float, left_out: Sequence[float], n: int) -> Metric:
    """Makes the interval of a share of images, which stays within 0 and 1.

    Where nothing that is left out changes it, it is Wilson's of n images: they leave doubt.
    """
    interval = jackknife(value, left_out, n)
    if interval.low == interval.high:
        interval = proportion(round(value * n), n)
    low, high = (float(np.clip(bound, 0, 1)) for bound in (interval.low, interval.high))
    return Metric(name, "", Estimate(value, low, high, n), "images", "higher")
