"""Metrics of the whole set of images: FID, KID, precision, recall, Inception Score."""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import PathText
from blackpoint.data.files.rules import check_ranges
from blackpoint.sampling.evaluation.metric import (
    FEATURE_COLUMN,
    INCEPTION,
    LOGIT_COLUMN,
    Evaluated,
    Metric,
    MetricConfig,
    Numbers,
    Source,
)
from blackpoint.sampling.verifiers.load import ImageModelConfig

if TYPE_CHECKING:
    from blackpoint.sampling.prompts.prompt_set import Prompt


@dataclass
class SetsConfig(MetricConfig):
    """Metrics of the whole set of images: FID, KID, precision, recall, Inception Score."""

    reference: PathText | None = None
    """FID, KID, precision and recall: folder of real pictures. Their luminance is what open
    prompts' images are compared with. Of another size than ours, they are resized and cut."""
    inception: PathText | None = None
    """The Inception network of the published metrics: weights-inception-2015-12-05-6726825d.pth
    of torch-fidelity, or a hub id that holds it. It gives features and classes."""
    features: ImageModelConfig = field(default_factory=ImageModelConfig)
    """Other features, instead of Inception's, for FID, KID, precision and recall."""
    classifier: ImageModelConfig = field(default_factory=ImageModelConfig)
    """Another classifier, instead of Inception's, for the Inception Score."""
    kid_subsets: int = 100
    """Subsets that KID is the mean of."""
    kid_subset_size: int = 1000
    """Images in a subset of KID; all that there are, where there are fewer."""
    inception_score_splits: int = 10
    """Parts of the set that IS is the mean of; one part where a part would have fewer than ten
    images per class."""
    neighbourhood: int = 3
    """k of the k-nearest-neighbour balls of precision and recall."""

    def __post_init__(self) -> None:
        names = ("kid_subsets", "kid_subset_size", "inception_score_splits", "neighbourhood")
        check_ranges(self, "sets.", **dict.fromkeys(names, ">= 1"))
        if self.inception is not None and self.features.is_set and self.classifier.is_set:
            raise UserError(
                "sets.inception would have nothing to do: sets.features and sets.classifier stand "
                "in for it; leave one of the three out"
            )
        if self._has_features and self.reference is None and not self.has_classifier:
            raise UserError(
                "sets.features needs sets.reference, a folder of real pictures: FID, KID, "
                "precision and recall compare two sets"
            )
        if self.reference is not None and self.kid_subset_size < 2:
            raise UserError("sets.kid_subset_size=1: KID compares pairs; give at least 2")

    @property
    def _has_features(self) -> bool:
        return self.features.is_set or self.inception is not None

    @property
    def has_classifier(self) -> bool:
        """Whether classes of images are asked for."""
        return self.classifier.is_set or self.inception is not None

    def networks(self) -> dict[str, tuple[str, ...]]:
        """Returns the key of each network that is asked for, with the columns that it gives."""
        columns: dict[str, tuple[str, ...]] = {
            "features": (FEATURE_COLUMN,) if self.reference is not None else (),
            "classifier": (LOGIT_COLUMN,),
        }
        networks = {key: names for key, names in columns.items() if getattr(self, key).is_set}
        if self.inception is not None:
            rest = [names for key, names in columns.items() if key not in networks]
            networks[INCEPTION] = tuple(name for names in rest for name in names)
        return {key: names for key, names in networks.items() if names}

    def check(self, prompts: "Sequence[Prompt]", num_images: int) -> None:
        if self.networks() and num_images < 2:
            raise UserError(
                "sets: metrics of sets need at least two images, and one prompt with num_images=1 "
                "makes one; raise num_images, give more prompts, or leave sets out"
            )

    def sources(self) -> list[Source]:
        from blackpoint.sampling.evaluation.metrics.set_models import load_set_model
        from blackpoint.sampling.evaluation.rows import column_digest

        sources = []
        for key, columns in self.networks().items():
            source = self.inception if key == INCEPTION else asdict(getattr(self, key))
            digests = dict.fromkeys(columns, column_digest([key, source]))
            load = functools.partial(load_set_model, self, key, columns)
            sources.append(Source(f"sets.{key}", digests, load))
        return sources

    def numbers(self, evaluated: Evaluated) -> Numbers:
        from blackpoint.sampling.evaluation.metrics.set_metrics import (
            extrapolation_notes,
            feature_metrics,
            logit_metrics,
            stacked,
        )

        reference, rows, seed = evaluated.reference, evaluated.rows, evaluated.seed
        groups = [row["prompt_index"] for row in rows]
        metrics: list[Metric] = []
        notes: list[str] = []
        real = None if reference is None else reference.features
        if real is not None and evaluated.has(FEATURE_COLUMN):
            features = stacked(rows, FEATURE_COLUMN)
            metrics += feature_metrics(features, real, groups, self, seed)
            notes += extrapolation_notes(features, groups)
        if self.has_classifier and evaluated.has(LOGIT_COLUMN):
            metrics += logit_metrics(stacked(rows, LOGIT_COLUMN), groups, self, seed)
        if reference is not None and len(rows) <= self.neighbourhood:
            notes.append(f"precision and recall need more than {self.neighbourhood} images")
        return metrics, notes
