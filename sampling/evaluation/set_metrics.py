"""FID, KID, precision, recall and Inception Score of a set of images, each with its interval.

The values equal torchmetrics' (FID, KID, IS) and torch-fidelity's (precision, recall: Kynkaanniemi
et al. 2019) on rows that were measured image by image, so that they depend on no order and no
batch. The intervals are a jackknife's over groups of prompts with all their images: resampling
would put copies into the set, which these metrics mind. They are of the generated set; the
references are taken as they are.

FID of n images is biased upwards, and its interval is of its mean at this n; FID at infinite n is
extrapolated (frechet.py). KID is unbiased. IS of n images and k classes is biased downwards, by a
factor of up to exp(-(k - 1) / (2 n)) where all classes are likely.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from data.files.errors import UserError
from sampling.evaluation.frechet import frechet_estimates
from sampling.evaluation.kernel_distance import distances_without, part_numbers
from sampling.evaluation.metrics import SetsConfig
from sampling.evaluation.statistics import FEWEST_GROUPS, Estimate, jackknife, proportion
from sampling.verifiers.reference import gaussian_of, inception_score

FID, KID, PRECISION, RECALL, IS = "FID", "KID", "precision", "recall", "IS"
FID_INFINITE = "FID at infinite n"
MOST_GROUPS = 20
IMAGES_PER_CLASS = 10
"""Images a class that a split of IS has at least; fewer bound it: IS <= images in a split."""
BATCH = 512
Subset = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class SetMetric:
    """One metric of the set."""

    name: str
    estimate: Estimate
    """n counts the generated images."""
    lower_is_better: bool


class _Rows(nn.Module):
    """Stands in for the network where its answers are the input."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, rows: Tensor) -> Tensor:
        return rows


def feature_metrics(
    features: Tensor,
    reference: Tensor,
    groups: Sequence[int] | np.ndarray,
    config: SetsConfig,
    seed: int = 0,
) -> list[SetMetric]:
    """Returns FID, KID, precision and recall of features (N, d) against references (M, d), float32.

    FID at infinite n is left out where `frechet.lack_of_images` says why. groups: each image's
    prompt. Raises UserError for fewer than two rows of either.
    """
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
    own, real = features.double(), reference.double()
    parts = jackknife_parts(groups)
    of_set, at_infinity = frechet_estimates(
        own, gaussian_of(real), independent_groups(groups), seed
    )
    size = min(len(own), len(real), config.kid_subset_size)
    kid_metric = KernelInceptionDistance(
        feature=_Rows(own.shape[1]), subsets=config.kid_subsets, subset_size=size
    )
    for rows, is_real in ((real, True), (own, False)):
        for part in rows.split(BATCH):
            kid_metric.update(part, real=is_real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kid = float(kid_metric.compute()[0])
    left_out = distances_without(own, real, parts) if parts else []
    found = [SetMetric(FID, of_set, True)]
    if at_infinity is not None:
        found.append(SetMetric(FID_INFINITE, at_infinity, True))
    found.append(SetMetric(KID, jackknife(kid, left_out, len(own)), True))
    if min(len(own), len(real)) > config.neighbourhood:
        precision, recall = precision_recall(own, real, config.neighbourhood)
        inside, covers = ball_counts(own, real, config.neighbourhood, parts)
        precisions = _without(parts, lambda kept: float(inside[kept].mean()))
        recalls = [float((covers.sum(axis=0) > each).mean()) for each in covers] if parts else []
        found += [
            _share(PRECISION, precision, precisions, len(own)),
            _share(RECALL, recall, recalls, len(own)),
        ]
    return found


def logit_metrics(
    logits: Tensor, groups: Sequence[int] | np.ndarray, config: SetsConfig, seed: int = 0
) -> list[SetMetric]:
    """Returns the Inception Score of logits (N, k), its interval within 1 and k.

    It is the mean over random splits, also where a part is left out of each of them; of one split
    where `num_splits` says so. Raises UserError for fewer than two images.
    """
    count, num_classes = logits.shape
    if count < 2:
        raise UserError(f"Inception Score: {count} image; a set has at least 2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.randperm(count)
    splits = order.chunk(num_splits(count, num_classes, config.inception_score_splits))

    def score(kept: np.ndarray) -> float:
        is_kept = torch.zeros(count, dtype=torch.bool)
        is_kept[torch.from_numpy(kept)] = True
        own = [split[is_kept[split]] for split in splits]
        return float(np.mean([inception_score(logits[each]) for each in own if len(each)]))

    value = score(np.arange(count))
    left_out = np.log(_without(jackknife_parts(groups), score))
    found = jackknife(math.log(value), left_out, count)
    low, high = (float(np.clip(np.exp(x), 1, num_classes)) for x in (found.low, found.high))
    return [SetMetric(IS, Estimate(value, low, high, count), False)]


def num_splits(num_images: int, num_classes: int, wanted: int) -> int:
    """Returns into how many parts IS splits a set: as wanted, or one where these were too small."""
    return wanted if num_images >= IMAGES_PER_CLASS * num_classes * wanted else 1


def precision_recall(
    features: Tensor, reference: Tensor, neighbourhood: int
) -> tuple[float, float]:
    """Returns torch-fidelity's precision and recall of features against references."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    found = prc_features_to_metric(
        features,
        reference,
        prc_neighborhood=neighbourhood,
        prc_batch_size=10_000,
        save_cpu_ram=True,
        verbose=False,
    )
    return found["precision"], found["recall"]


def ball_counts(
    own: Tensor, real: Tensor, neighbourhood: int, parts: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what precision and recall of parts of a set follow from.

    Which generated images (N,) the references' balls hold, bool: leaving others out changes
    nothing, so precision is their mean. And how many images of each part have a reference in their
    ball, (parts, M): the balls are those of the whole set.
    """
    k = neighbourhood + 1  # the nearest is the row itself
    own_radius, real_radius = (
        torch.cat([torch.cdist(some, rows).kthvalue(k).values for some in rows.split(BATCH)])
        for rows in (own, real)
    )
    inside = torch.empty(len(own), dtype=torch.bool)
    covers = torch.zeros(len(parts), len(real), dtype=torch.int32)
    owner = part_numbers(parts, len(own))
    for start in range(0, len(own), BATCH):
        rows = slice(start, start + BATCH)
        across = torch.cdist(own[rows], real)
        inside[rows] = (across <= real_radius).any(dim=1)
        if parts:
            covers.index_add_(0, owner[rows], (across <= own_radius[rows, None]).int())
    return inside.numpy(), covers.numpy()


def independent_groups(groups: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns each image's prompt; of fewer than three prompts the images are their own."""
    numbers = np.asarray(groups)
    if len(np.unique(numbers)) < FEWEST_GROUPS:
        return np.arange(len(numbers))
    return numbers


def jackknife_parts(groups: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """Splits images into parts of whole prompts, of which one at a time is left out.

    groups: each image's prompt; the images of a single prompt are their own. Returns the places of
    each part's images; nothing where an interval would rest on too few.
    """
    numbers = independent_groups(groups)
    kinds = np.unique(numbers)
    count = min(len(kinds), MOST_GROUPS)
    parts = [
        np.flatnonzero(np.isin(numbers, kinds[start::count])) for start in range(count)
    ]  # not a category at a time
    is_enough = count >= FEWEST_GROUPS and len(numbers) - max(map(len, parts)) >= 2
    return parts if is_enough else []


def _without(parts: Sequence[np.ndarray], of_kept: Subset) -> list[float]:
    """Returns a metric of the set without each of the parts."""
    everything = np.arange(sum(map(len, parts)))
    return [of_kept(np.setdiff1d(everything, part)) for part in parts]


def _share(name: str, value: float, left_out: Sequence[float], n: int) -> SetMetric:
    """Makes the interval of a share of images, which stays within 0 and 1.

    Where nothing that is left out changes it, it is Wilson's of n images: they leave doubt.
    """
    found = jackknife(value, left_out, n)
    if found.low == found.high:
        wilson = proportion(round(value * n), n)
        found = Estimate(value, wilson.low, wilson.high, n)
    low, high = (float(np.clip(bound, 0, 1)) for bound in (found.low, found.high))
    return SetMetric(name, Estimate(value, low, high, n), False)
