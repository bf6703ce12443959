"""Oracle: the metric of a whole set, FID or Inception Score, which is searched image by image.

    score(candidate) = (n + 1) [ m(winners + candidate) - m(winners) ],  m = -FID or IS

the greedy contribution to the n winners kept so far (Ma et al. 2025 search with the metric itself,
an upper bound that no other verifier passes). The factor keeps contributions of one size as the
set grows; it does not change which candidate is best. Of an empty set FID counts as 0 and IS as 1,
so IS cannot tell the first candidates apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import PathText
from blackpoint.sampling.verifiers.kind import VerifierKind, VerifierOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from blackpoint.sampling.statistics.frechet import Gaussian
    from blackpoint.sampling.verifiers.models.image_model import ImageModel
    from blackpoint.sampling.verifiers.verifier import Images


@dataclass
class OracleConfig(VerifierOptions):
    """Keys of kind=oracle."""

    metric: Literal["fid", "is"] = "fid"
    """oracle: Frechet distance to the reference, or the Inception Score."""
    reference: PathText | None = None
    """oracle: folder of pictures, or .safetensors with mean and covariance of their features."""


class Oracle:
    """Verifier that remembers the winners; `keep` tells it of each."""

    preview_log_snr: float | None = None
    differentiable = False

    def __init__(
        self, features: ImageModel, reference: Gaussian | None, config: OracleConfig
    ) -> None:
        self.name, self._batch_size = config.column, config.batch_size
        self._features, self._reference = features, reference
        self._kept: list[Tensor] = []

    def score(
        self, images: Images, prompts: Sequence[str], previews: Images | None = None
    ) -> Tensor:
        """Returns each image's gain over the winners kept so far, in float64.

        NaN for an image whose features are not finite.
        """
        import torch

        before = self._value(self._kept)
        gains = [
            self._value([*self._kept, row]) - before if row.isfinite().all() else math.nan
            for row in self._rows(images)
        ]
        return (len(self._kept) + 1) * torch.tensor(gains, dtype=torch.float64)

    def keep(self, image: Tensor) -> None:
        """Adds a winner, (3, H, W), to the set that later candidates are judged with."""
        self._kept += self._rows(image[None])

    def _value(self, rows: list[Tensor]) -> float:
        import torch

        from blackpoint.sampling.statistics.frechet import frechet_distance
        from blackpoint.sampling.verifiers.reference import inception_score

        if self._reference is None:
            return inception_score(torch.stack(rows)) if rows else 1.0
        return -frechet_distance(torch.stack(rows), self._reference) if rows else 0.0

    def _rows(self, images: Images) -> list[Tensor]:
        import torch

        with torch.no_grad():
            parts = [self._features(part).double().cpu() for part in images.split(self._batch_size)]
        rows = [row for part in parts for row in part]
        if self._reference is not None and rows and len(rows[0]) != len(self._reference.mean):
            raise UserError(
                f"reference: its statistics are of {len(self._reference.mean)} features and this "
                f"model gives {len(rows[0])}; make them with the same model"
            )
        return rows


def load(config: OracleConfig, device: torch.device, dtype: torch.dtype) -> Oracle:
    """Loads a classifier for IS; features and the reference for FID."""
    from blackpoint.sampling.verifiers.models.image_model import load_classifier, load_features
    from blackpoint.sampling.verifiers.reference import load_reference

    source = (config.checkpoint, config.module, device, dtype)
    if config.reference is None:
        return Oracle(load_classifier(*source), None, config)
    features = load_features(*source)
    return Oracle(features, load_reference(config.reference, features), config)


def check(config: OracleConfig) -> None:
    """Raises UserError unless FID alone has a reference."""
    if (config.reference is None) == (config.metric == "fid"):
        raise UserError(
            f"reference={config.reference}: metric=fid needs one (a folder of pictures or "
            ".safetensors) and metric=is has none"
        )


KIND = VerifierKind(
    load, OracleConfig, check, has_model=True, needs="set", looks="scores a set that grows"
)
