"""FID, KID and Inception Score of the images whose noises are most and least stable.

Each set has the same number of images of every prompt. The kernel distance (KID, Binkowski et al.
2018) is the unbiased MMD^2 with k(x, y) = (x . y / d + 1)^3; FID of small sets is biased upwards
and compares only sets of one size. Intervals are a jackknife's, which leaves out one prompt (or one
of fifty groups of prompts) with all its images: resampling would put copies into a set, and both
FID and KID mind copies.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from blackpoint.sampling.evaluation.stability import StabilityStudyConfig
from blackpoint.sampling.evaluation.stability_pictures import painted
from blackpoint.sampling.evaluation.stability_rows import Found
from blackpoint.sampling.sample import find_device
from blackpoint.sampling.statistics.estimates import FEWEST_GROUPS, Estimate, jackknife
from blackpoint.sampling.statistics.frechet import Gaussian, frechet_distance, gaussian_of
from blackpoint.sampling.statistics.kernel_distance import kernel_distance, kernel_mean
from blackpoint.sampling.verifiers.models.image_model import (
    ImageModel,
    load_classifier,
    load_features,
)
from blackpoint.sampling.verifiers.reference import (
    inception_score,
    picture_features,
    reference_pictures,
)

FEATURES, LOGITS = "features", "logits"
RANDOM = "random"
MOST_GROUPS = 50
"""Groups of prompts that a jackknife leaves out in turn."""
Rows = dict[str, Tensor]
"""What -> (N, d), a row an image."""


@dataclass(frozen=True)
class Reference:
    """Real pictures, and what is computed of them once."""

    features: Tensor  # (M, d)
    gaussian: Gaussian
    kernel_mean: float


@dataclass(frozen=True)
class SetMetric:
    """One metric of one set."""

    chosen: str
    metric: str
    num_images: int
    value: float
    difference: Estimate
    """From the set of random noises, n prompts."""


def sets_of(found: Found) -> dict[str, np.ndarray]:
    """Returns the noises of each set: the numbers, (P, m), of those that each score prefers."""
    count = found.config.sets.num_images
    stability = found.stability[0]
    shape = (len(found.pool.prompts), count)
    return {
        RANDOM: np.broadcast_to(np.arange(count), shape),
        f"most stable ({stability})": _best(found.pool.scores[stability], count),
        f"least stable ({stability})": _best(-found.pool.scores[stability], count),
        f"best by {found.first_quality}": _best(found.pool.scores[found.first_quality], count),
    }


def set_metrics(found: Found, folder: Path, reference: Reference | None) -> list[SetMetric]:
    """Paints what is not painted yet and measures every set; nothing where nothing is given."""
    config = found.config
    if not (config.sets.features.is_set or config.sets.classifier.is_set):
        return []
    sets = sets_of(found)
    wanted = sorted(
        {(row, int(k)) for each in sets.values() for row, line in enumerate(each) for k in line}
    )
    places = {pair: place for place, pair in enumerate(wanted)}
    rows = measured_rows(found, wanted, folder / "sets.safetensors")
    members = {
        name: np.array([[places[row, int(k)] for k in line] for row, line in enumerate(each)])
        for name, each in sets.items()
    }
    metrics = []
    for metric, key, of_set in _metrics(rows, reference):
        whole, left_out = {}, {}
        for name, own in members.items():
            whole[name], left_out[name] = _jackknife(rows[key], own, of_set)
        for name, own in members.items():
            change = whole[name] - whole[RANDOM]
            interval = jackknife(change, left_out[name] - left_out[RANDOM], len(own))
            metrics.append(SetMetric(name, metric, own.size, whole[name], interval))
    return metrics


def measured_rows(found: Found, pairs: list[tuple[int, int]], path: Path) -> Rows:
    """Paints (prompt row, noise) pairs and returns what the networks say; kept in `path`."""
    config = found.config
    named = [[int(found.pool.seeds[pair]), found.pool.prompts[pair[0]]] for pair in pairs]
    key = hashlib.blake2b(json.dumps([named, repr(config.sets)]).encode()).hexdigest()
    if path.is_file():
        kept = load_file(path)
        if bytes(kept.pop("key").tolist()).decode() == key:
            return kept
    device = find_device(config.device)
    readers: dict[str, ImageModel] = {}
    if config.sets.features.is_set:
        one = config.sets.features
        readers[FEATURES] = load_features(one.checkpoint, one.module, device, torch.float32)
    if config.sets.classifier.is_set:
        one = config.sets.classifier
        readers[LOGITS] = load_classifier(one.checkpoint, one.module, device, torch.float32)
    parts: dict[str, list[Tensor]] = {name: [] for name in readers}
    for images in painted(found, pairs):
        with torch.inference_mode():
            for name, reader in readers.items():
                parts[name].append(reader(images).double().cpu())
    rows = {name: torch.cat(each) for name, each in parts.items()}
    write_whole(path, save({**rows, "key": torch.tensor(list(key.encode()), dtype=torch.uint8)}))
    return rows


def load_reference(config: StabilityStudyConfig) -> Reference | None:
    """Reads the reference pictures; None without any."""
    source, one = config.sets.reference, config.sets.features
    if source is None:
        return None
    reader = load_features(one.checkpoint, one.module, find_device(config.device), torch.float32)
    features = picture_features(reference_pictures(source, "sets.reference"), reader)
    return Reference(features, gaussian_of(features), kernel_mean(features))


def _metrics(
    rows: Rows, reference: Reference | None
) -> list[tuple[str, str, Callable[[Tensor], float]]]:
    found: list[tuple[str, str, Callable[[Tensor], float]]] = []
    if reference is not None and FEATURES in rows:
        one = reference
        found.append(("FID", FEATURES, lambda own: frechet_distance(own, one.gaussian)))
        found.append(
            ("KID", FEATURES, lambda own: kernel_distance(own, one.features, one.kernel_mean))
        )
    if LOGITS in rows:
        found.append(("IS", LOGITS, inception_score))
    return found


def _jackknife(
    rows: Tensor, own: np.ndarray, of_set: Callable[[Tensor], float]
) -> tuple[float, np.ndarray]:
    """Returns a set's metric, and without each group of prompts in turn."""
    groups = np.array_split(np.arange(len(own)), min(len(own), MOST_GROUPS))
    left_out = [
        of_set(rows[np.delete(own, group, axis=0).ravel()])
        for group in groups
        if len(own) >= FEWEST_GROUPS
    ]
    return of_set(rows[own.ravel()]), np.array(left_out)


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(np.where(np.isfinite(scores), -scores, np.inf), axis=1, kind="stable")[
        :, :count
    ]
