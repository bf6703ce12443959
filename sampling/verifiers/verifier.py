"""What every verifier is: from images and their prompts to one score each, the higher the better.

Searches compare scores after rounding them to 1e-4, so that near-ties seldom turn on the batch or
the device (seldom, not never), and see no more of a verifier than this.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from blackpoint.data.files.errors import RunFailed

SCORE_DECIMALS = 4
"""Scores that agree in so many decimals are tied."""
Images = Float[Tensor, "n 3 h w"]


class Verifier(Protocol):
    """Scores images in [0, 1]; see `checked_scores` for what the answer must be."""

    name: str
    """Column of the score in every row and table."""
    preview_log_snr: float | None
    """log SNR of the x0-prediction that `score` wants beside the final image; None: none."""
    differentiable: bool
    """Whether gradients flow from the scores to the images."""

    def score(
        self, images: Images, prompts: Sequence[str], previews: Images | None = None
    ) -> Float[Tensor, " n"]:
        """Returns one score an image; an image's depends on the rest of the batch by
        rounding alone."""
        ...


def checked_scores(
    verifier: Verifier, images: Images, prompts: Sequence[str], previews: Images | None = None
) -> Float[Tensor, " n"]:
    """Returns the scores as float64 on the CPU; raises RunFailed for any other shape than (N,).

    Scores that are not finite are passed on: the search rejects those candidates and counts them.
    """
    scores = verifier.score(images, prompts, previews)
    if not isinstance(scores, torch.Tensor) or tuple(scores.shape) != (len(images),):
        found = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise RunFailed(
            f"verifier {verifier.name} returned {found} for {len(images)} images; it must return "
            f"one score an image, a tensor of shape ({len(images)},)"
        )
    return scores.detach().double().cpu()
