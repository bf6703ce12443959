"""FID, KID, precision, recall and Inception Score of a set of images, each with its interval.

The values are torchmetrics' (FID, KID, IS) and torch-fidelity's (precision, recall: Kynkaanniemi et
al. 2019) on rows that were measured image by image, so that they depend on no order and no batch.
The intervals are a jackknife's that leaves out one group of prompts, with all its images, in turn:
resampling would put copies into the set, which these metrics mind. They are of the generated set;
the references are taken as they are. FID of a small set is biased upwards: compare equal n.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from sampling.errors import UserError
from sampling.evaluation.kernel_distance import kernel_distance, kernel_mean
from sampling.evaluation.metrics import SetsConfig
from sampling.evaluation.statistics import LEVEL, Estimate
from sampling.verifiers.oracle import gaussian_of, inception_score

FID, KID, PRECISION, RECALL, IS = "FID", "KID", "precision", "recall", "IS"
MOST_GROUPS = 20
FEWEST_GROUPS = 3
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

    groups: each image's prompt. Raises UserError for fewer than two rows of either.
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
    gaussian = gaussian_of(real)
    root, real_kernel = gaussian.root, kernel_mean(real)

    def fid(kept: np.ndarray) -> float:
        part = gaussian_of(own[kept])
        overlap = torch.linalg.eigvalsh(root @ part.covariance @ root).clamp(min=0).sqrt().sum()
        apart = (part.mean - gaussian.mean).square().sum()
        return float(apart + part.covariance.trace() + gaussian.covariance.trace() - 2 * overlap)

    size = min(len(own), len(real), config.kid_subset_size)
    fid_metric = FrechetInceptionDistance(feature=_Rows(own.shape[1]))
    kid_metric = KernelInceptionDistance(
        feature=_Rows(own.shape[1]), subsets=config.kid_subsets, subset_size=size
    )
    for rows, is_real in ((real, True), (own, False)):
        for part in rows.split(BATCH):
            fid_metric.update(part, real=is_real)
            kid_metric.update(part, real=is_real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kid = float(kid_metric.compute()[0])
    found = [
        _metric(FID, float(fid_metric.compute()), fid, groups, True),
        _metric(KID, kid, lambda kept: kernel_distance(own[kept], real, real_kernel), groups, True),
    ]
    if min(len(own), len(real)) > config.neighbourhood:
        precision, recall = precision_recall(own, real, config.neighbourhood)
        balls = _Balls(own, real, config.neighbourhood)
        found += [
            _metric(PRECISION, precision, balls.precision, groups, False),
            _metric(RECALL, recall, balls.recall, groups, False),
        ]
    return found


def logit_metrics(
    logits: Tensor, groups: Sequence[int] | np.ndarray, config: SetsConfig, seed: int = 0
) -> list[SetMetric]:
    """Returns the Inception Score of logits (N, k); raises UserError for fewer than two."""
    if len(logits) < 2:
        raise UserError(f"Inception Score: {len(logits)} image; a set has at least 2")
    splits = config.inception_score_splits
    metric = InceptionScore(
        feature=_Rows(logits.shape[1]), splits=splits if len(logits) >= 2 * splits else 1
    )
    metric.update(logits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        value = float(metric.compute()[0])
    return [_metric(IS, value, lambda kept: inception_score(logits[kept]), groups, False)]


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


class _Balls:
    """Precision and recall of parts of the set, from distances that are computed once.

    Precision asks of each generated image whether the references' balls hold it; leaving others out
    changes nothing, so it is a mean. Recall's balls are those of the whole set that remain.
    """

    def __init__(self, own: Tensor, real: Tensor, neighbourhood: int) -> None:
        k = neighbourhood + 1
        across = torch.cdist(own, real)
        own_radius = torch.cdist(own, own).kthvalue(k).values
        real_radius = torch.cdist(real, real).kthvalue(k).values
        self._inside = (across <= real_radius).any(dim=1).double().numpy()
        self._covers = (across <= own_radius[:, None]).numpy()  # (N, M)

    def precision(self, kept: np.ndarray) -> float:
        """Returns the share of the kept images that lie among the references."""
        return float(self._inside[kept].mean())

    def recall(self, kept: np.ndarray) -> float:
        """Returns the share of references that lie among the kept images."""
        return float(self._covers[kept].any(axis=0).mean())


def _metric(
    name: str, value: float, of_kept: Subset, groups: Sequence[int] | np.ndarray, lower: bool
) -> SetMetric:
    numbers = np.asarray(groups)
    kinds = np.unique(numbers)
    if len(kinds) < FEWEST_GROUPS:  # one prompt: its images are the groups
        numbers = np.arange(len(numbers))
        kinds = numbers
    count = min(len(kinds), MOST_GROUPS)
    parts = [kinds[start::count] for start in range(count)]  # not a category at a time
    kept = [np.flatnonzero(~np.isin(numbers, part)) for part in parts]
    if count < FEWEST_GROUPS or min(map(len, kept)) < 2:
        nothing = Estimate(value, float("nan"), float("nan"), len(numbers))
        return SetMetric(name, nothing, lower)
    left_out = np.array([of_kept(each) for each in kept])
    error = float(np.sqrt((count - 1) * left_out.var()))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, count - 1)) * error
    return SetMetric(name, Estimate(value, value - half, value + half, len(numbers)), lower)
