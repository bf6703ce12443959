"""From a search's config to what it needs: model, verifiers, runner, problems, algorithm."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from data.files.errors import UserError
from sampling.guidance import Guidance
from sampling.model import DiffusionModel
from sampling.precision import set_tf32
from sampling.sample import find_device
from sampling.search.config import SearchConfig
from sampling.search.fk_steering import fk_steering
from sampling.search.halving import halving
from sampling.search.noise_optimisation import noise_optimisation
from sampling.search.paths import paths
from sampling.search.random_search import random_search
from sampling.search.runner import SearchSampling, TrialRunner
from sampling.search.search import MakeSearch
from sampling.search.trial import Problem, Ranking, by_score
from sampling.search.zero_order import zero_order
from sampling.speed import prepare_unet
from sampling.tasks import Task
from sampling.verifiers.ensemble import combined
from sampling.verifiers.load import load_verifiers
from sampling.verifiers.oracle import Oracle
from sampling.verifiers.stability import Stability
from sampling.verifiers.verifier import Verifier

log = logging.getLogger(__name__)

MAX_CHECKED = 10_000
"""Prompts that verifiers are asked about before anything is run."""


@dataclass(frozen=True)
class Loaded:
    """What a search runs with."""

    runner: TrialRunner
    held_out: dict[str, Verifier]
    oracles: list[Oracle]
    """Those of the verifiers that remember winners."""


def load(config: SearchConfig, prompts: Mapping[int, str], task: Task) -> Loaded:
    """Loads the model and all verifiers; raises UserError for a prompt that one cannot judge.

    The config's number formats are settled: none is auto.
    """
    device = find_device(config.device, task)
    set_tf32(config.tf32 is True)
    named = {**config.verifiers, **config.held_out}
    loaded = load_verifiers(
        {name: dataclasses.replace(each, name=name) for name, each in named.items()}, device
    )
    for verifier in loaded.values():
        check = getattr(verifier, "check_prompt", None)
        if check is not None:
            for text in itertools.islice(prompts.values(), MAX_CHECKED):
                check(text)
    verifiers = {name: loaded[name] for name in config.verifiers}
    dtype = getattr(torch, config.dtype)
    model = DiffusionModel.load(
        config.checkpoint, device, dtype, config.weights, variant=config.variant
    )
    model.process.check_sound()
    choice = prepare_unet(model.unet, config.attention, config.channels_last, config.compile)
    if choice:
        note(choice)
    sampling = SearchSampling(
        config.num_steps,
        Guidance(config.guidance_scale, config.guidance_rescale),
        config.sampler,
        config.eta,
        config.height,
        config.width,
        config.negative_prompt,
        config.clip_skip,
    )
    weights = {name: config.verifiers[name].weight for name in verifiers}
    weights = weights if len(weights) > 1 else dict.fromkeys(weights, 1.0)
    size = config.batch_size or 1
    runner = TrialRunner(model, prompts, sampling, list(verifiers.values()), weights, size)
    if config.algorithm == "noise_optimisation":
        require_differentiable(model, *verifiers.values())
        runner.holds_inverse_fixed = config.noise_optimisation.gradient == "fixed_inverse"
    oracles = [verifier for verifier in verifiers.values() if isinstance(verifier, Oracle)]
    return Loaded(runner, {name: loaded[name] for name in config.held_out}, oracles)


@functools.cache
def note(text: str) -> None:
    """Says something once, however many searches follow each other."""
    log.warning("note: %s", text)


def require_differentiable(model: DiffusionModel, verifier: Verifier) -> None:
    """Raises UserError where no gradient comes from the score to the noise."""
    if not (verifier.differentiable or isinstance(verifier, Stability)):
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


def is_reproducible(config: SearchConfig) -> bool:
    """Tells whether a seed alone re-makes an image that starts from it."""
    is_stochastic = config.sampler == "euler_ancestral" or (config.eta or 0) > 0
    return config.algorithm in ("random", "zero_order", "halving") and not is_stochastic


def make_problem(config: SearchConfig, runner: TrialRunner, index: int) -> Problem:
    """Returns the search problem of one prompt."""
    ranking = ranking_of(config)
    whole = config.algorithm == "noise_optimisation"
    gradient_cost = runner.gradient_cost() if whole else 0
    budget = config.budget_nfe
    return Problem(index, config.seed, runner.grid, runner.cost, budget, ranking, gradient_cost)


def ranking_of(config: SearchConfig) -> Ranking:
    """Returns how candidates are compared: by the one verifier, or by the ensemble's rule."""
    if len(config.verifiers) == 1:
        return by_score
    return lambda outcomes: rank_values(config, [outcome.scores for outcome in outcomes])


def rank_values(config: SearchConfig, scores: Sequence[Mapping[str, float]]) -> list[float]:
    """Returns what the ensemble's rule makes of each candidate's scores."""
    weights = [each.weight for each in config.verifiers.values()]
    rows = [[each[name] for name in config.verifiers] for each in scores]
    return combined(torch.tensor(rows).double(), config.ensemble, weights).tolist()


def algorithm(config: SearchConfig, kendall: dict[int, float] | None) -> MakeSearch:
    """Returns the algorithm with its settings."""
    match config.algorithm:
        case "random":
            return lambda problem: random_search(problem, config.random)
        case "zero_order":
            return lambda problem: zero_order(problem, config.zero_order)
        case "paths":
            return lambda problem: paths(problem, config.paths)
        case "halving":
            return lambda problem: halving(problem, config.halving, kendall)
        case "noise_optimisation":
            return lambda problem: noise_optimisation(problem, config.noise_optimisation)
        case "fk_steering":
            return lambda problem: fk_steering(problem, config.fk_steering)
