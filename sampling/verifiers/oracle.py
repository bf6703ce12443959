"""Oracle: the metric of a whole set, FID or Inception Score, which is searched image by image.

    score(candidate) = (n + 1) [ m(winners + candidate) - m(winners) ],  m = -FID or IS

the greedy contribution to the n winners kept so far (Ma et al. 2025 search with the metric itself,
an upper bound that no other verifier passes). The factor keeps contributions of one size as the
set grows; it does not change which candidate is best. Of an empty set FID counts as 0 and IS as 1,
so IS cannot tell the first candidates apart.

    FID = |mu_s - mu_r|^2 + tr C_s + tr C_r - 2 tr (C_r^1/2 C_s C_r^1/2)^1/2   (Heusel et al. 2017)
    IS  = exp mean_i KL(p_i | mean_j p_j)                                    (Salimans et al. 2016)

The last trace is the sum of the singular values of X_c C_r^1/2 / sqrt(n - 1), with X_c the centred
features: exact for sets of fewer images than features, whose covariance is singular, and for one
image, whose covariance is 0. FID of a small set is biased upwards: compare sets of one size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.data.images.decode import IMAGE_SUFFIXES, BadImage
from blackpoint.data.images.pictures import picture_files
from blackpoint.sampling.runtime.pictures import read_picture
from blackpoint.sampling.verifiers.image_model import ImageModel
from blackpoint.sampling.verifiers.pretrained import load_weights
from blackpoint.sampling.verifiers.verifier import Images

Metric = Literal["fid", "is"]


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of the features of the reference images, float64."""

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]

    @property
    def root(self) -> Float[Tensor, "d d"]:
        """The symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


class Oracle:
    """Verifier that remembers the winners; `keep` tells it of each."""

    preview_log_snr: float | None = None
    differentiable = False

    def __init__(
        self,
        features: ImageModel,
        reference: Gaussian | None,
        name: str = "oracle",
        batch_size: int = 16,
    ) -> None:
        self.name = name
        self._features = features
        self._reference = reference
        self._root = None if reference is None else reference.root
        self._batch_size = batch_size
        self._kept: Tensor | None = None

    @torch.no_grad()
    def score(
        self, images: Images, prompts: Sequence[str], previews: Images | None = None
    ) -> Float[Tensor, " n"]:
        """Returns what each image alone would add to the winners kept so far.

        NaN for an image whose features are not finite.
        """
        rows = self._rows(images)
        kept = rows[:0] if self._kept is None else self._kept
        before = self._value(kept)
        values = [
            self._value(torch.cat([kept, row[None]])) - before if row.isfinite().all() else math.nan
            for row in rows
        ]
        return (len(kept) + 1) * torch.tensor(values, dtype=torch.float64)

    @torch.no_grad()
    def keep(self, image: Float[Tensor, "3 h w"]) -> None:
        """Adds a winner to the set that later candidates are judged with."""
        row = self._rows(image[None])
        self._kept = row if self._kept is None else torch.cat([self._kept, row])

    def value(self) -> float:
        """Returns FID (the lower the better) or IS of the winners kept so far."""
        if self._kept is None:
            raise UserError("oracle: no image is kept yet, so the set has no FID or IS")
        value = self._value(self._kept)
        return value if self._reference is None else -value

    def _value(self, rows: Float[Tensor, "n d"]) -> float:
        if self._reference is None:
            return inception_score(rows) if len(rows) else 1.0
        return -_frechet_distance(rows, self._reference, self._root) if len(rows) else 0.0

    def _rows(self, images: Images) -> Float[Tensor, "n d"]:
        parts = [self._features(part).double().cpu() for part in images.split(self._batch_size)]
        rows = torch.cat(parts)
        if self._reference is not None and rows.shape[1] != len(self._reference.mean):
            raise UserError(
                f"reference: its statistics are of {len(self._reference.mean)} features and this "
                f"model gives {rows.shape[1]}; make them with the same model"
            )
        return rows


def frechet_distance(
    features: Float[Tensor, "n d"], reference: Gaussian, root: Tensor | None = None
) -> float:
    """Returns FID of features to the reference, whose root may be known; n may be 1."""
    root = reference.root if root is None else root
    return _frechet_distance(features.double(), reference, root)


def inception_score(logits: Float[Tensor, "n k"]) -> float:
    """Returns IS of a classifier's logits, of the set as one split."""
    log_p = logits.double().log_softmax(dim=1)
    log_mean = log_p.logsumexp(dim=0) - torch.tensor(float(len(logits))).double().log()
    divergences = (log_p.exp() * (log_p - log_mean)).sum(dim=1)
    return float(divergences.mean().exp())


def gaussian_of(features: Float[Tensor, "n d"]) -> Gaussian:
    """Returns mean and covariance (divisor n - 1) of at least two rows of features."""
    rows = features.double()
    return Gaussian(rows.mean(dim=0), torch.atleast_2d(rows.T.cov()))


@torch.no_grad()
def load_reference(path: str, features: ImageModel) -> Gaussian:
    """Reads `mean` and `covariance` from .safetensors, or measures a folder of pictures."""
    source = Path(path)
    if source.suffix == ".safetensors":
        stored = load_weights(source, "reference", "give statistics or a folder of pictures")
        if not {"mean", "covariance"} <= set(stored):
            raise UserError(
                f"reference={path} holds {', '.join(sorted(stored)) or 'nothing'}; it must hold "
                "mean (d,) and covariance (d, d) of the same model's features"
            )
        return Gaussian(stored["mean"].double(), stored["covariance"].double())
    return gaussian_of(picture_features(reference_pictures(path), features))


def reference_pictures(path: str, field: str = "reference") -> list[Path]:
    """Lists the pictures of a folder; raises UserError, naming `field`, for fewer than two."""
    try:
        files = picture_files(Path(path)) if Path(path).is_dir() else []
    except OSError as error:
        raise UserError(
            f"{field}={path}: {error.filename} can't be read ({error.strerror}); get the right to "
            "read it, or take it away"
        ) from None
    if len(files) < 2:
        other = ", or a .safetensors with mean and covariance" if field == "reference" else ""
        raise UserError(
            f"{field}={path} holds {len(files)} pictures ({', '.join(IMAGE_SUFFIXES)}); a set is "
            f"compared with a set: give a folder of many{other}"
        )
    return files


@torch.no_grad()
def picture_features(files: Sequence[Path], features: ImageModel) -> Float[Tensor, "n d"]:
    """Returns the features of pictures of any sizes, float64; raises UserError for what is none."""
    return torch.cat([features(_picture(file)).double().cpu() for file in files])


def _picture(file: Path) -> Images:
    try:
        return read_picture(file)[None]
    except BadImage as error:
        raise UserError(f"reference: {file} is not a picture ({error}); take it away") from error


def _frechet_distance(rows: Tensor, reference: Gaussian, root: Tensor | None) -> float:
    mean = rows.mean(dim=0)
    centred = (rows - mean) / max(len(rows) - 1, 1) ** 0.5
    overlap = torch.linalg.svdvals(centred @ root).sum()
    traces = centred.square().sum() + reference.covariance.trace()
    return float((mean - reference.mean).square().sum() + traces - 2 * overlap)
