"""Inception Score of a small set, and the pictures that FID compares a set with.

IS = exp mean_i KL(p_i | mean_j p_j)                                     (Salimans et al. 2016)
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.data.images.decode import IMAGE_SUFFIXES, BadImage
from blackpoint.data.images.pictures import picture_files
from blackpoint.sampling.runtime.pictures import read_picture
from blackpoint.sampling.statistics.frechet import Gaussian, gaussian_of
from blackpoint.sampling.verifiers.models.image_model import ImageModel
from blackpoint.sampling.verifiers.models.pretrained import load_weights
from blackpoint.sampling.verifiers.verifier import Images


def inception_score(logits: Float[Tensor, "n k"]) -> float:
    """Returns IS of a classifier's logits, of the set as one split."""
    log_p = logits.double().log_softmax(dim=1)
    log_mean = log_p.logsumexp(dim=0) - torch.tensor(float(len(logits))).double().log()
    divergences = (log_p.exp() * (log_p - log_mean)).sum(dim=1)
    return float(divergences.mean().exp())


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
    """Returns the features of pictures of any sizes, float64; raises UserError for other files."""
    return torch.cat([features(_picture(file)).double().cpu() for file in files])


def _picture(file: Path) -> Images:
    try:
        return read_picture(file)[None]
    except BadImage as error:
        raise UserError(f"reference: {file} is not a picture ({error}); take it away") from error
