"""From a search's config to its model, verifiers, runner and problems."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.runtime.precision import set_tf32
from blackpoint.sampling.runtime.speed import prepare_unet
from blackpoint.sampling.runtime.tasks import Task
from blackpoint.sampling.sample import find_device
from blackpoint.sampling.samplers import SAMPLERS
from blackpoint.sampling.search.config import EnsembleRule, SearchConfig
from blackpoint.sampling.search.problem import Problem, Ranking, by_score
from blackpoint.sampling.search.runner import SearchSampling, TrialRunner
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
    verifiers = {name: judges[name] for name in config.verifiers}
    runner = TrialRunner(
        load_model(config, device),
        prompts,
        sampling_of(config),
        list(verifiers.values()),
        weights_of(config.verifiers),
        config.batch_size or 1,
    )
    if config.declared.form == "gradient":
        require_differentiable(runner.model, *verifiers.values())
        runner.holds_inverse_fixed = config.settings.gradient == "fixed_inverse"
    oracles = [verifier for verifier in verifiers.values() if isinstance(verifier, SetVerifier)]
    held_out = of_images({name: judges[name] for name in config.held_out})
    return Loaded(runner, held_out, oracles)


def load_judges(
    configs: Mapping[str, VerifierConfig], prompts: Iterable[str], device: torch.device
) -> dict[str, AnyVerifier]:
    """Loads verifiers under their names in the config, and asks them about the first prompts."""
    named = {name: dataclasses.replace(options, name=name) for name, options in configs.items()}
    judges = load_verifiers(named, device)
    checks = [getattr(verifier, "check_prompt", None) for verifier in judges.values()]
    for text in itertools.islice(prompts, MAX_CHECKED):
        for check in filter(None, checks):
            check(text)
    return judges


def load_model(config: SearchConfig, device: torch.device) -> DiffusionModel:
    """Loads the model and prepares its UNet for speed."""
    dtype = getattr(torch, config.dtype)
    model = DiffusionModel.load(
        config.checkpoint,
        device,
        dtype,
        config.weights,
        variant=config.variant,
        single_file=config.single_file,
        loras=config.lora,
    )
    model.process.check_sound()
    choice = prepare_unet(model.unet, config.attention, config.channels_last, config.compile)
    if choice:
        note(choice)
    return model


def sampling_of(config: SearchConfig) -> SearchSampling:
    """Returns how the config samples candidates."""
    return SearchSampling(
        config.num_steps,
        Guidance(config.guidance_scale, config.guidance_rescale),
        config.sampler,
        config.eta,
        config.height,
        config.width,
        config.negative_prompt,
        config.clip_skip,
    )


def weights_of(verifiers: Mapping[str, VerifierConfig]) -> dict[str, float]:
    """Returns the weights of the verifiers in a score; that of a single one is 1."""
    if len(verifiers) == 1:
        return dict.fromkeys(verifiers, 1.0)
    return {name: verifier.weight for name, verifier in verifiers.items()}


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


def is_reproducible(config: SearchConfig) -> bool:
    """Tells whether a seed alone re-makes an image that starts from it."""
    fresh_noise = SAMPLERS[config.sampler].fresh_noise(config.eta)
    return config.declared.is_reproducible and not fresh_noise


def make_problem(
    config: SearchConfig, runner: TrialRunner, index: int, kendall: Mapping[int, float] | None
) -> Problem:
    """Returns the search problem of one prompt; kendall: see `Problem`."""
    return Problem(
        index,
        config.seed,
        runner.grid,
        runner.cost,
        config.budget_nfe,
        ranking_of(config.verifiers, config.ensemble),
        runner.gradient_cost() if config.declared.form == "gradient" else 0,
        kendall,
    )


def ranking_of(verifiers: Mapping[str, VerifierConfig], rule: EnsembleRule) -> Ranking:
    """Returns how candidates are compared: by the one verifier, or by the ensemble's rule."""
    if len(verifiers) == 1:
        return by_score
    return lambda outcomes: rank_values(verifiers, rule, [outcome.scores for outcome in outcomes])


def rank_values(
    verifiers: Mapping[str, VerifierConfig],
    rule: EnsembleRule,
    scores: Sequence[Mapping[str, float]],
) -> list[float]:
    """Returns the ensemble's score of each candidate."""
    weights = [verifier.weight for verifier in verifiers.values()]
    rows = [[row[name] for name in verifiers] for row in scores]
    return combined(torch.tensor(rows).double(), rule, weights).tolist()
