"""From a search's config to its model, verifiers, runner and problems."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.grid import SampleState
from blackpoint.sampling.pipelines.painter import Painter
from blackpoint.sampling.runtime.precision import set_tf32
from blackpoint.sampling.runtime.tasks import Task
from blackpoint.sampling.sample import find_device
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.costs import BACKWARD_NFE, Costs, Ledger
from blackpoint.sampling.search.driver import check_budget, open_search
from blackpoint.sampling.search.problem import Correlation, Outcome, Problem, Trial, by_score
from blackpoint.sampling.search.runner import TrialRunner
from blackpoint.sampling.search.scoring import AnyVerifier, covered_levels, scored_by, shown_levels
from blackpoint.sampling.verifiers.ensemble import combined
from blackpoint.sampling.verifiers.load import VerifierConfig, load_verifiers
from blackpoint.sampling.verifiers.verifier import (
    SetVerifier,
    TrajectoryVerifier,
    Verifier,
    of_images,
    takes_latents,
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
    runner = TrialRunner(
        model,
        prompts,
        config,
        verifiers,
        weights,
        config.batch_size or 1,
        config.verifier_levels,
    )
    if config.declared.form == "gradient":
        require_differentiable(config.algorithm, model, *verifiers)
        runner.holds_inverse_fixed = config.settings.gradient == "fixed_inverse"
    elif tilt := config.step_tilt:
        guides = [verifier for verifier in verifiers if weights[verifier.name]]
        require_differentiable(config.algorithm, model, *guides, whole=tilt.gradient == "x_t")
        check_gradients(config.algorithm, runner, guides, next(iter(prompts.values())))
        runner.tilt_steps(tilt)
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


def load_model(config: SearchConfig, device: torch.device) -> Painter:
    """Loads the model and prepares it for speed."""
    model = config.load_model(device, getattr(torch, config.dtype))
    model.process.check_sound()
    choice = model.prepare(config.attention, config.channels_last, config.compile)
    if choice:
        note(choice)
    return model


@functools.cache
def note(text: str) -> None:
    """Says something once, however many searches follow each other."""
    log.warning("note: %s", text)


def require_differentiable(
    algorithm: str, model: Painter, *verifiers: AnyVerifier, whole: bool = True
) -> None:
    """Raises UserError where no gradient comes from a score to the image, or, where the `whole` run
    is differentiated, through the network."""
    for verifier in verifiers:
        if not (isinstance(verifier, TrajectoryVerifier) or verifier.differentiable):
            raise no_gradient(algorithm, verifier)
    model.load_encoders()
    network, *others = model.loaded_parts()
    integers = [p.dtype for p in network.parameters() if not p.dtype.is_floating_point]
    if integers and whole:
        raise UserError(
            f"checkpoint: the network has weights in {integers[0]} (quantised), which no gradient "
            f"goes through; algorithm={algorithm} needs a plain one"
        )
    for part in (network, *others):
        part.requires_grad_(False)


def check_gradients(
    algorithm: str, runner: TrialRunner, guides: Sequence[AnyVerifier], prompt: str
) -> None:
    """Raises UserError for a verifier whose scores carry no gradient, whatever it declares."""
    latents = runner.draw([0]).to(runner.model.device)
    image = runner.model.decode(latents).requires_grad_()
    latents.requires_grad_()
    for verifier in guides:
        assert not isinstance(verifier, TrajectoryVerifier)
        given = latents if takes_latents(verifier) else image
        if not verifier.score(given, [prompt]).requires_grad:
            raise no_gradient(algorithm, verifier)


def no_gradient(algorithm: str, verifier: AnyVerifier) -> UserError:
    """Returns the error for a verifier that no gradient comes from."""
    return UserError(
        f"verifiers.{verifier.name}: algorithm={algorithm} needs a gradient, and this verifier "
        "gives none; use another one, or another algorithm"
    )


def make_problem(
    config: SearchConfig, runner: TrialRunner, index: int, kendall: Mapping[int, Correlation] | None
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
        config.target,
        kendall,
    )


def rank_values(config: SearchConfig, scores: Sequence[Mapping[str, float]]) -> list[float]:
    """Returns the ensemble's score of each candidate, from its scores by verifier, which have been
    given at one level."""
    names = [name for name in config.verifiers if all(name in row for row in scores)]
    weights = [config.verifiers[name].weight for name in names]
    rows = [[row[name] for name in names] for row in scores]
    return combined(torch.tensor(rows).double(), config.ensemble, weights).tolist()


def planned(config: SearchConfig, costs_of: Callable[[int | None], Costs]) -> Ledger:
    """Returns the costs of one prompt within its budget: its algorithm, walked without a network,
    every score being 0. `costs_of` gives those of runs in a number of steps, None for the config's.
    """
    settings, declared, verifiers = config.settings, config.declared, config.verifiers
    inverts = {name: each for name, each in verifiers.items() if each.declared.inverts}
    loaded: list[Any] = [*load_verifiers(inverts, torch.device("cpu")).values()]
    measured = list({verifier.measurement: verifier for verifier in loaded}.values())
    tilt = config.step_tilt
    through = tilt is not None and tilt.gradient == "x_t"

    @functools.cache
    def costs_in(num_steps: int | None = None) -> Costs:
        return replace(costs_of(num_steps), measured=measured, goes_back_in_steps=through)

    def cost(first: int, stop: int, num_steps: int | None = None) -> int:
        return costs_in(num_steps).nfe(first, stop)

    @functools.cache
    def scored(level: int, steps: int) -> list[VerifierConfig]:
        shares = config.verifier_levels.items()
        covered = {name: covered_levels(levels, steps) for name, levels in shares}
        return [verifiers[name] for name in scored_by([*verifiers], covered, level, steps)]

    grid = costs_in().grid
    of_runs = [each for each in verifiers.values() if each.declared.needs == "trajectory"]
    num_previews = len({each.preview_log_snr for each in of_runs if not each.declared.inverts})
    ascends = declared.form == "gradient"
    goes_back = ascends and settings.gradient == "full"
    price = ascends * cost(0, config.num_steps) * (1 + BACKWARD_NFE * goes_back)
    problem = Problem(0, config.seed, grid, cost, config.budget_nfe, gradient_cost=price)
    check_budget(problem, declared.least_nfe(problem, settings))
    search = open_search(problem, lambda each: declared.start(each, settings))
    ledger, noise = Ledger(), torch.ones(1, 1, 1, 1)

    def outcome(trial: Trial) -> Outcome:
        before, costs = ledger.nfe, costs_in(trial.num_steps)
        steps = costs.grid.num_steps
        ledger.count(1, costs.run_rows(trial.first_step, trial.stop), goes_back)
        ledger.count(1, costs.score_rows(trial.stop), goes_back)
        looks = trial.may_win or len(inverts) < len(verifiers)
        shown = shown_levels(config.previews.every, trial.first_step, trial.stop, steps)
        if trial.goal == "preview" and looks:  # that picture is there already
            shown = [level for level in shown if level != trial.stop]
        ledger.decoded_images += looks + num_previews + len(shown) * (not ascends)
        ledger.verifier_calls += len(scored(trial.stop, steps))
        ledger.verifier_gradients += goes_back
        ledger.backward_rows += costs.backward_rows(trial.first_step, trial.stop)
        for step in costs.tilted_steps(trial.first_step, trial.stop) if tilt else ():
            leads = scored(step + 1, steps)
            guides = sum(one.weight != 0 or len(verifiers) == 1 for one in leads)
            ledger.decoded_images += guides > 0
            ledger.verifier_calls += guides
            ledger.verifier_gradients += guides
        state = SampleState(torch.zeros_like(noise), trial.stop, noise)
        return Outcome(trial, 0.0, ledger.nfe - before, state)

    while not search.is_done:
        search.take([outcome(trial) for trial in search.pending])
    return ledger
