"""From a search's config to its model, verifiers, runner and problems."""

import functools
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.runtime.precision import set_tf32
from blackpoint.sampling.runtime.speed import prepare_unet
from blackpoint.sampling.runtime.tasks import Task
from blackpoint.sampling.sample import find_device
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.problem import Outcome, Problem, by_score
from blackpoint.sampling.search.runner import TrialRunner
from blackpoint.sampling.search.scoring import AnyVerifier
from blackpoint.sampling.verifiers.ensemble import combined
from blackpoint.sampling.verifiers.load import VerifierConfig, load_verifiers
from blackpoint.sampling.verifiers.verifier import (
    SetVerifier,
    TrajectoryVerifier,
    Verifier,
    of_images,
)

log = logging.getLogger(__name__)

MAX_CHECKED = 10_000
"""Prompts that verifiers are asked about before anything is run."""


@dataclass(frozen=True)
class Loaded:
    """The loaded parts of a search."""

    runner: TrialRunner
    held_out: dict[str, Verifier]
    oracles: list[SetVerifier]
    """Those of the verifiers that remember winners."""


def load(config: SearchConfig, prompts: Mapping[int, str], task: Task) -> Loaded:
    """Loads the model and all verifiers; raises UserError for a prompt that one cannot judge.

    The config's number formats are settled: none is auto.
    """
    device = find_device(config.device, task)
    set_tf32(config.tf32 is True)
    judges = load_judges({**config.verifiers, **config.held_out}, prompts.values(), device)
    verifiers = [judges[name] for name in config.verifiers]
    weights = {name: verifier.weight for name, verifier in config.verifiers.items()}
    if len(weights) == 1:
        weights = dict.fromkeys(weights, 1.0)
    model = load_model(config, device)
    runner = TrialRunner(model, prompts, config, verifiers, weights, config.batch_size or 1)
    if config.declared.form == "gradient":
        require_differentiable(model, *verifiers)
        runner.holds_inverse_fixed = config.settings.gradient == "fixed_inverse"
    oracles = [verifier for verifier in verifiers if isinstance(verifier, SetVerifier)]
    held_out = of_images({name: judges[name] for name in config.held_out})
    return Loaded(runner, held_out, oracles)


def load_judges(
    configs: Mapping[str, VerifierConfig], prompts: Iterable[str], device: torch.device
) -> dict[str, AnyVerifier]:
    """Loads verifiers under their names in the config, and asks them about the first prompts."""
    judges = load_verifiers(configs, device)
    checks = [getattr(verifier, "check_prompt", None) for verifier in judges.values()]
    for text in itertools.islice(prompts, MAX_CHECKED):
        for check in filter(None, checks):
            check(text)
    return judges


def load_model(config: SearchConfig, device: torch.device) -> DiffusionModel:
    """Loads the model and prepares its UNet for speed."""
    model = config.load_model(device, getattr(torch, config.dtype))
    model.process.check_sound()
    choice = prepare_unet(model.unet, config.attention, config.channels_last, config.compile)
    if choice:
        note(choice)
    return model


@functools.cache
def note(text: str) -> None:
    """Says something once, however many searches follow each other."""
    log.warning("note: %s", text)


def require_differentiable(model: DiffusionModel, verifier: AnyVerifier) -> None:
    """Raises UserError where no gradient comes from the score to the noise."""
    if not (isinstance(verifier, TrajectoryVerifier) or verifier.differentiable):
        raise UserError(
            f"verifiers.{verifier.name}: algorithm=noise_optimisation needs a gradient, and this "
            "verifier gives none; use another one, or another algorithm"
        )
    whole = [p.dtype for p in model.unet.parameters() if not p.dtype.is_floating_point]
    if whole:
        raise UserError(
            f"checkpoint: the UNet has weights in {whole[0]} (quantised), which no gradient goes "
            "through; algorithm=noise_optimisation needs a plain one"
        )
    for part in (model.unet, model.vae):
        if part is not None:
            part.requires_grad_(False)


def make_problem(
    config: SearchConfig, runner: TrialRunner, index: int, kendall: Mapping[int, float] | None
) -> Problem:
    """Returns the search problem of one prompt; kendall: see `Problem`."""

    def ensemble_ranking(outcomes: Sequence[Outcome]) -> list[float]:
        return rank_values(config, [outcome.scores for outcome in outcomes])

    return Problem(
        index,
        config.seed,
        runner.grid,
        runner.cost,
        config.budget_nfe,
        by_score if len(config.verifiers) == 1 else ensemble_ranking,
        runner.gradient_cost() if config.declared.form == "gradient" else 0,
        kendall,
    )


def rank_values(config: SearchConfig, scores: Sequence[Mapping[str, float]]) -> list[float]:
    """Returns the ensemble's score of each candidate, from its scores by verifier."""
    weights = [verifier.weight for verifier in config.verifiers.values()]
    rows = [[row[name] for name in config.verifiers] for row in scores]
    return combined(torch.tensor(rows).double(), config.ensemble, weights).tolist()
