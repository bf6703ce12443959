"""The protocol of verifiers: from images and prompts to one score each, the higher the better.

Searches compare scores after rounding them to 1e-4, so that near-ties seldom turn on the batch or
the device (seldom, not never), and see no more of a verifier than this.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.grid import Denoise, SamplingGrid
from blackpoint.sampling.pipelines.painter import Levels
from blackpoint.sampling.verifiers.kind import VerifierOptions

Images = Float[Tensor, "n 3 h w"]
Latents = Float[Tensor, "n c h w"]


class Verifier(Protocol):
    """Scores images in [0, 1]; see `checked_scores` for the rules of the answer.

    Two more attributes may be there. `takes_latents`, if true: `score` is given x0 (n, c, h, w) as
    the model has it, not decoded. `log_snr_range`, a pair: the noise levels that it is trained for,
    as log SNR of the state whose x0-prediction it scores; (-inf, 2.0) leaves the final image, whose
    log SNR is inf, to others. None, or no such attribute: every level (sampling/search/scoring.py).
    """

    name: str
    """Column of the score in every row and table."""
    preview_log_snr: float | None
    """log SNR of the x0-prediction that `score` wants beside the final image; None: none."""
    differentiable: bool
    """Whether gradients flow from the scores to the images."""

    def score(
        self, images: Images, prompts: Sequence[str], previews: Images | None = None
    ) -> Float[Tensor, " n"]:
        """Returns one score per image; an image's depends on the rest of the batch by
        rounding alone."""
        ...


@runtime_checkable
class SetVerifier(Verifier, Protocol):
    """Scores an image by the set of winners that it would join."""

    def keep(self, image: Float[Tensor, "3 h w"]) -> None:
        """Adds a winner to the set."""
        ...


@runtime_checkable
class TrajectoryVerifier(Protocol):
    """Scores runs by their noise and by the network's evaluations of their latents, not by images.

    What is measured by more network evaluations is shared by verifiers with the same `measurement`.
    """

    name: str
    guidance_scale: float
    """Guidance of those evaluations; 1 is off."""

    @property
    def measurement(self) -> Hashable:
        """Names the measurement."""
        ...

    def prepare(self, process: Levels) -> None:
        """Tells it, once, the process of the runs."""
        ...

    def level(self, stop: int) -> int:
        """Returns the level whose latents it wants of a run to level `stop`."""
        ...

    def evaluations(self, stop: int) -> int:
        """Returns the network evaluations of one score, guidance not counted."""
        ...

    def measure(self, x: Latents, level: int, denoise: Denoise, grid: SamplingGrid) -> Any:
        """Evaluates the network on the states of runs at `level`."""
        ...

    def score_measured(self, noise: Latents, measured: Any) -> Float[Tensor, " n"]:
        """Returns the score of each run from its noise and its measurements."""
        ...


def takes_latents(verifier: Verifier | TrajectoryVerifier) -> bool:
    """Whether a verifier scores x0 without decoding it."""
    return bool(getattr(verifier, "takes_latents", False))


def of_images(verifiers: Mapping[str, Verifier | TrajectoryVerifier]) -> dict[str, Verifier]:
    """Returns the verifiers of images; configs have refused those of runs where an image is all.

    Raises UserError for one of latents.
    """
    for name, verifier in verifiers.items():
        if takes_latents(verifier):
            raise UserError(
                f"verifier {name} takes latents, and it is given decoded images here; use one "
                "that scores images"
            )
    return {
        name: verifier
        for name, verifier in verifiers.items()
        if not isinstance(verifier, TrajectoryVerifier)
    }


class ImageVerifier:
    """A verifier made of a function of images and prompts, called a batch at a time.

    With `preview_log_snr` the function takes previews, too, or None where a run has none there.
    """

    def __init__(
        self,
        config: VerifierOptions,
        scores: Callable[..., Tensor],
        differentiable: bool = True,
        check_prompt: Callable[[str], object] = lambda prompt: None,
        preview_log_snr: float | None = None,
        takes_latents: bool = False,
        log_snr_range: tuple[float, float] | None = None,
    ) -> None:
        self.takes_latents, self.log_snr_range = takes_latents, log_snr_range
        self.name, self.differentiable = config.column, differentiable
        self.preview_log_snr = preview_log_snr
        self.check_prompt = check_prompt
        """Raises UserError for a prompt that it cannot judge."""
        self._scores, self._batch_size = scores, config.batch_size

    def score(
        self, images: Images, prompts: Sequence[str], previews: Images | None = None
    ) -> Float[Tensor, " n"]:
        """Returns one score per image."""
        if len(images) != len(prompts):
            raise RunFailed(f"{len(images)} images cannot be scored against {len(prompts)} prompts")
        parts = []
        for start in range(0, len(images), self._batch_size):
            rows = slice(start, start + self._batch_size)
            batch: list[Any] = [images[rows], prompts[rows]]
            if self.preview_log_snr is not None:
                batch.append(None if previews is None else previews[rows])
            parts.append(one_per_image(self._scores(*batch), len(batch[1]), self.name))
        return torch.cat(parts) if parts else images.new_zeros(0)


def checked_scores(
    verifier: Verifier, images: Images, prompts: Sequence[str], previews: Images | None = None
) -> Float[Tensor, " n"]:
    """Returns the scores as float64 on the CPU; raises RunFailed for any other shape than (N,).

    Scores that are not finite are passed on: the search rejects those candidates and counts them.
    """
    scores = one_per_image(verifier.score(images, prompts, previews), len(images), verifier.name)
    return scores.detach().double().cpu()


def one_per_image(answer: Any, num_images: int, name: str) -> Float[Tensor, " n"]:
    """Returns a verifier's answer as a tensor; raises RunFailed unless it is one score an image."""
    try:
        scores = torch.as_tensor(answer)
    except (TypeError, ValueError, RuntimeError):
        scores = None
    if scores is None or tuple(scores.shape) != (num_images,):
        returned = type(answer).__name__ if scores is None else tuple(scores.shape)
        raise RunFailed(
            f"verifier {name} returned {returned} for {num_images} images; it must return one "
            f"score per image, of shape ({num_images},)"
        )
    return scores
