"""FID and Inception Score of small sets, and the pictures that FID compares them with.

    FID = |mu_s - mu_r|^2 + tr C_s + tr C_r - 2 tr (C_r^1/2 C_s C_r^1/2)^1/2   (Heusel et al. 2017)
    IS  = exp mean_i KL(p_i | mean_j p_j)                                    (Salimans et al. 2016)

The last trace is the sum of the singular values of X_c C_r^1/2 / sqrt(n - 1), with X_c the centred
features: exact for sets of fewer images than features, whose covariance is singular, and for one
image, whose covariance is 0. FID of a small set is biased upwards: compare sets of one size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from data.images.decode import IMAGE_SUFFIXES, BadImage
from data.images.pictures import picture_files
from sampling.errors import UserError
from sampling.pictures import read_picture
from sampling.verifiers.models.image_model import ImageModel
from sampling.verifiers.models.pretrained import load_weights
from sampling.verifiers.verifier import Images


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


def frechet_distance(
    features: Float[Tensor, "n d"], reference: Gaussian, root: Tensor | None = None
) -> float:
    """Returns FID of features to the reference, whose root may be known; n may be 1."""
    rows = features.double()
    mean = rows.mean(dim=0)
    centred = (rows - mean) / max(len(rows) - 1, 1) ** 0.5
    overlap = torch.linalg.svdvals(centred @ (reference.root if root is None else root)).sum()
    traces = centred.square().sum() + reference.covariance.trace()
    return float((mean - reference.mean).square().sum() + traces - 2 * overlap)


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
