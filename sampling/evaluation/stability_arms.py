"""The searches that a stability study is made of, one folder each.

    pool           K noises of each prompt with every score: correlations, selection, ablation
    best_of        random search with the first quality score, at the NFE of the dearest method
    guidance_G     plain images at another guidance
    optimise_...   gradient ascent from the first noise

Noise k of a prompt is the same in all of them: its seed depends on nothing else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blackpoint.sampling.evaluation.stability import StabilityStudyConfig, standard_scores
from blackpoint.sampling.search.config import EnsembleRule, SearchConfig
from blackpoint.sampling.search.costs import BACKWARD_NFE
from blackpoint.sampling.verifiers.load import VerifierConfig

POOL, BEST_OF = "pool", "best_of"


@dataclass(frozen=True)
class Place:
    """One checkpoint at one number of sampling steps."""

    checkpoint: str
    num_steps: int

    @property
    def folder(self) -> str:
        """Where its searches lie, under the study's output."""
        return f"{self.checkpoint}/{self.num_steps}_steps"


@dataclass(frozen=True)
class Arm:
    """One search of all prompts."""

    name: str
    config: SearchConfig


def places(config: StabilityStudyConfig) -> list[Place]:
    """Returns every checkpoint at every number of steps, few steps first."""
    return [Place(name, steps) for steps in sorted(config.num_steps) for name in config.checkpoints]


def stability_scores(config: StabilityStudyConfig, num_steps: int) -> dict[str, VerifierConfig]:
    """Returns the stability scores at a number of steps; the first selects and is optimised."""
    return config.stability or standard_scores(num_steps)


def arms(config: StabilityStudyConfig, place: Place) -> list[Arm]:
    """Returns the searches of a place, the pool first."""
    prices = Prices(config, place.num_steps)
    first_quality = next(iter(config.quality))
    judges = {name: each for name, each in config.quality.items() if name != first_quality}
    searched = {first_quality: config.quality[first_quality]}
    scores = stability_scores(config, place.num_steps)
    make = _maker(config, place)
    found = [
        make(POOL, prices.pool(), verifiers=_led_by_first({**scores, **config.quality})),
        *(
            make(
                guidance_name(scale),
                prices.image(scale),
                verifiers=_led_by_first(config.quality),
                guidance_scale=scale,
            )
            for scale in config.rival_guidance_scales
            if scale != config.guidance_scale
        ),
    ]
    for kind in optimisations(config, place):
        wanted = searched if kind == "reward" else {"stability": next(iter(scores.values()))}
        settings = replace(
            config.optimisation,
            gradient="fixed_inverse" if kind == "fixed_inverse" else "full",
        )
        found.append(
            make(
                f"optimise_{kind}",
                prices.optimisation(kind),
                algorithm="noise_optimisation",
                verifiers=wanted,
                held_out=judges if kind == "reward" else dict(config.quality),
                noise_optimisation=settings,
                batch_size=config.gradient_batch_size,
            )
        )
    dearest = max([prices.selection(), *(arm.config.budget_nfe for arm in found[1:])])
    found.append(make(BEST_OF, dearest, verifiers=_led_by_first(config.quality)))
    return found


def _led_by_first(verifiers: Mapping[str, VerifierConfig]) -> dict[str, VerifierConfig]:
    """Returns verifiers of which the first alone decides; the others' scores are recorded."""
    weights = [1.0] + [0.0] * (len(verifiers) - 1)
    return {
        name: replace(each, weight=weight)
        for (name, each), weight in zip(verifiers.items(), weights, strict=True)
    }


def optimisations(config: StabilityStudyConfig, place: Place) -> list[str]:
    """Returns the gradients that are taken at a place."""
    through_runs = not config.optimised_num_steps or place.num_steps in config.optimised_num_steps
    return [kind for kind in config.optimisations if kind == "fixed_inverse" or through_runs]


def guidance_name(scale: float) -> str:
    """Returns the name of the plain images at a guidance."""
    return f"guidance_{scale:g}"


@dataclass(frozen=True)
class Prices:
    """NFE of one prompt by each method; both branches of guidance counted."""

    study: StabilityStudyConfig
    num_steps: int

    def image(self, guidance_scale: float | None = None, steps: int | None = None) -> int:
        """Returns the NFE of one image, or of its first `steps`."""
        scale = self.study.guidance_scale if guidance_scale is None else guidance_scale
        return (self.num_steps if steps is None else steps) * (1 if scale == 1 else 2)

    def score(self, name: str) -> int:
        """Returns the NFE of one stability score, its run not counted."""
        return _round_trip(self._scores()[name], self.num_steps)[0]

    def pool(self) -> int:
        """Returns the NFE of all noises with all scores; equal round trips are run once."""
        scores = self._scores().values()
        trips = {trip: nfe for nfe, trip in (_round_trip(each, self.num_steps) for each in scores)}
        return self.study.num_noises * (self.image() + sum(trips.values()))

    def selection(self, name: str | None = None, num_noises: int | None = None) -> int:
        """Returns the NFE of choosing among K noises by one score, the winner finished."""
        scores = self._scores()
        name = name or next(iter(scores))
        count = self.study.num_noises if num_noises is None else num_noises
        steps = min(scores[name].partial_steps or self.num_steps, self.num_steps)
        left = self.image(steps=self.num_steps - steps)
        return count * (self.image(steps=steps) + self.score(name)) + left

    def optimisation(self, kind: str) -> int:
        """Returns the NFE of all gradient steps; a row that is gone back through counts 3."""
        score = 0 if kind == "reward" else self.score(next(iter(self._scores())))
        factor = 1 if kind == "fixed_inverse" else 1 + BACKWARD_NFE
        return self.study.num_optimisation_steps * factor * (self.image() + score)

    def _scores(self) -> dict[str, VerifierConfig]:
        return stability_scores(self.study, self.num_steps)


def _round_trip(score: VerifierConfig, num_steps: int) -> tuple[int, tuple[Any, ...]]:
    """Returns the NFE of a score, and what names its round trip."""
    steps = min(score.partial_steps or num_steps, num_steps)
    iterations = 1 if score.inversion == "ddim" else score.num_iterations
    rows = 1 if score.inversion_guidance_scale == 1 else 2
    inverter = (score.inversion, score.num_iterations, score.model_time)
    trip = (inverter, score.inversion_guidance_scale, score.partial_steps)
    return steps * iterations * rows, trip


def _maker(config: StabilityStudyConfig, place: Place) -> Callable[..., Arm]:
    shared = {
        "checkpoint": config.checkpoints[place.checkpoint],
        "prompts": config.prompts,
        "num_steps": place.num_steps,
        "guidance_rescale": config.guidance_rescale,
        **{
            name: getattr(config, name)
            for name in (
                *("limit", "offset", "seed", "height", "width", "weights", "dtype", "device"),
                *("tf32", "attention", "channels_last", "batch_size"),
            )
        },
    }

    def make(name: str, budget_nfe: int, **settings: Any) -> Arm:
        output = str(Path(config.output) / place.folder / name)
        given = {"guidance_scale": config.guidance_scale, **shared, **settings}
        ensemble: EnsembleRule = "weighted_sum"  # no image is kept that cannot win by it
        return Arm(
            name, SearchConfig(output=output, budget_nfe=budget_nfe, ensemble=ensemble, **given)
        )

    return make
