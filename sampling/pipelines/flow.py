"""Flow matching as a process: x_t = (1 - t) x0 + t eps, the network says v = eps - x0.

    x0 = x_t - t v,   eps = x_t + (1 - t) v,   (alpha, sigma) = (1 - t, t)

(Lipman et al. 2023; Liu et al. 2023.) The levels are the scheduler's sigmas, by their place among
those of S steps: timesteps are rounded in some schedulers, and name no level.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.choices import Spacing
from blackpoint.sampling.grid import Prediction, SamplingGrid

Listing = Callable[[int], tuple[list[float], list[float]]]
"""Sampling steps S -> the scheduler's S timesteps and S + 1 sigmas."""


class Place(NamedTuple):
    """A timestep: the one of step `step` among those of `num_steps`."""

    step: int
    num_steps: int


class FlowLevels:
    """The levels of a flow-matching pipeline, as its scheduler lists them."""

    prediction_type = "flow"

    def __init__(self, listing: Listing) -> None:
        self._listing = listing
        self._grids: dict[int, SamplingGrid] = {}

    def grid(self, num_steps: int, sampler: str = "ddim") -> SamplingGrid:
        """Returns the levels of `num_steps` steps, the same for every sampler.

        Raises UserError where they are not as many, or do not fall.
        """
        if num_steps not in self._grids:
            timesteps, sigmas = self._listing(num_steps)
            falls = all(a > b for a, b in zip(sigmas, sigmas[1:], strict=False))
            if len(timesteps) != num_steps or len(sigmas) != num_steps + 1 or not falls:
                raise UserError(
                    f"num_steps={num_steps}: the pipeline's scheduler lists {len(timesteps)} "
                    f"timesteps and sigmas from {sigmas[0]:.4g} to {sigmas[-1]:.4g}, and a run "
                    "needs as many steps, whose sigmas fall; give another num_steps"
                )
            self._grids[num_steps] = SamplingGrid(
                tuple(Place(step, num_steps) for step in range(num_steps)),
                tuple(1 - sigma for sigma in sigmas),
                tuple(sigmas),
            )
        return self._grids[num_steps]

    def reader(self) -> Callable[[Tensor, Tensor, Place], Prediction]:
        """Returns the function (v, x_t, place) -> x0 and eps."""

        def read(v: Tensor, x_t: Tensor, place: Place) -> Prediction:
            alpha, sigma = self.grid(place.num_steps).level(place.step)
            return Prediction(x_t - sigma * v, x_t + alpha * v)

        return read

    @property
    def noisiest(self) -> Place:
        """The first timestep, t = 1 in most pipelines."""
        return Place(0, 1)

    def incompatibility(self) -> str | None:
        """Returns None: there is no terminal SNR that could be wrong."""
        return None

    def check_sound(self, allow_unsound: bool = False) -> None:
        """Accepts it."""

    def respaced(self, spacing: Spacing | None) -> "FlowLevels":
        """Returns itself; raises UserError for a spacing."""
        if spacing is not None:
            raise UserError(
                f"timestep_spacing={spacing}: a flow-matching pipeline has the levels of its "
                "scheduler; leave it out"
            )
        return self

    def respacing_note(self, spacing: Spacing | None) -> str | None:
        """Returns None."""
        return None


def listed(scheduler: object) -> tuple[list[float], list[float]]:
    """Reads timesteps and sigmas off a scheduler whose timesteps were set."""
    lists = [getattr(scheduler, name, None) for name in ("timesteps", "sigmas")]
    if any(each is None for each in lists):
        raise RunFailed(f"{type(scheduler).__name__} lists no timesteps and sigmas")
    timesteps, sigmas = ([float(value) for value in each] for each in lists if each is not None)
    return timesteps, sigmas


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config is of flow matching."""
    if str(config.get("_class_name", "")).startswith("FlowMatch"):
        return True
    return config.get("prediction_type") == "flow_prediction" or bool(config.get("use_flow_sigmas"))
