"""The configuration of `blackpoint search`; free of torch, so that its help is instant."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import MISSING

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import OutputText
from blackpoint.data.files.rules import check_ranges, require
from blackpoint.sampling.choices import check_seed
from blackpoint.sampling.options import SamplingOptions
from blackpoint.sampling.runtime.tracking import WandbConfig
from blackpoint.sampling.samplers import SAMPLERS, check_sampler
from blackpoint.sampling.search.algorithms import (
    draft,
    fk_steering,
    halving,
    noise_optimisation,
    paths,
    random_search,
    tilt,
    zero_order,
)
from blackpoint.sampling.search.problem import Algorithm, Tilt
from blackpoint.sampling.verifiers.kind import EnsembleRule, RunForm, check_weights
from blackpoint.sampling.verifiers.load import ImageModelConfig, VerifierConfig

ALGORITHMS = {
    "random": random_search.ALGORITHM,
    "zero_order": zero_order.ALGORITHM,
    "paths": paths.ALGORITHM,
    "halving": halving.ALGORITHM,
    "draft": draft.ALGORITHM,
    "fk_steering": fk_steering.ALGORITHM,
    "noise_optimisation": noise_optimisation.ALGORITHM,
    "tilt": tilt.ALGORITHM,
}
"""The table of algorithms; the settings of each are a section of that name."""
if TYPE_CHECKING:
    AlgorithmName = str
else:
    AlgorithmName = Literal[tuple(ALGORITHMS)]


@dataclass
class PreviewConfig:
    """A sheet of x0-previews along the runs, beside each winner."""

    every: int = 0
    """Sampling steps between x0-previews, each a decode in the ledger; 0 is off. The runs that led
    in turn are the rows of images/NUMBER.previews.png."""

    def __post_init__(self) -> None:
        check_ranges(self, "previews.", every=">= 0")


@dataclass
class SearchOptions(SamplingOptions):
    """The keys of a search but for the settings of its algorithms."""

    output: OutputText = MISSING
    """Folder to write; the same command there continues a search that was stopped."""
    budget_nfe: int = MISSING
    """Most UNet evaluations per prompt, with those of both guidance branches and of the winner."""
    algorithm: AlgorithmName = "random"
    """Search algorithm (docs/search.md); random is best-of-N."""
    verifiers: dict[str, VerifierConfig] = field(default_factory=dict)
    """Verifiers whose scores the search maximises, by name; `ensemble` combines several."""
    held_out: dict[str, VerifierConfig] = field(default_factory=dict)
    """Verifiers that judge the winners but do not guide the search: they reveal hacking. Where a
    tilt leads and none is set, one that is at hand judges (docs/search.md)."""
    target: float | None = None
    """Score at which a prompt's search ends: images are run one after another until one reaches it,
    and budget_nfe is the most that they may cost. Not set: the whole budget is spent."""
    ensemble: EnsembleRule = "mean_rank"
    """How several verifiers rank candidates; fk_steering takes weighted_sum alone."""
    verifier_levels: dict[str, list[float]] = field(default_factory=dict)
    """Levels that a verifier scores, by its name: [from, to], both included, in shares of the
    sampling steps, 1 the final image. A look that no verifier's levels cover is scored by those
    without; a verifier of your own may declare its levels (docs/search.md)."""
    seed: int = 0
    """Decides every draw of the search, together with prompt, candidate, round and step."""
    limit: int | None = None
    """Use at most this many prompts."""
    offset: int = 0
    """Leave out so many prompts at the start."""
    compile: bool = False
    """Compile the UNet with torch.compile, at the first step of each batch size."""
    batch_size: int = 16
    """Candidates run at once, of any prompts; 0 finds it. Moves choices only among
    near-ties (docs/search.md)."""
    previews: PreviewConfig = field(default_factory=PreviewConfig)
    diversity: ImageModelConfig = field(default_factory=ImageModelConfig)
    """Features, such as those of facebook/dinov2-base, whose mean distance between winners, beside
    that of the plain images, tells diversity; pixels of thumbnails if it is not set."""
    wandb: WandbConfig = field(default_factory=lambda: WandbConfig(enabled=False))
    """Tables of winners and candidates at Weights & Biases."""


_Sections: Any = make_dataclass(
    "_Sections",
    [
        (name, algorithm.config, field(default_factory=algorithm.config))
        for name, algorithm in ALGORITHMS.items()
    ],
    namespace={"__doc__": ""},
)


@dataclass
class SearchConfig(_Sections, SearchOptions):
    """From prompts to the best image of each within a budget of network evaluations."""

    def __post_init__(self) -> None:
        check_ranges(self, "", budget_nfe=">= 1", num_steps=">= 1")
        require(self.batch_size >= 0, "batch_size", self.batch_size, "at least 1, or 0 to find it")
        check_seed("seed", self.seed)
        if self.random.first_seed is not None:
            check_seed("random.first_seed", self.random.first_seed, self.budget_nfe)
        if self.algorithm not in ALGORITHMS:
            raise UserError(f"algorithm={self.algorithm} is none; use {', '.join(ALGORITHMS)}")
        check_sampler(self.sampler, self.eta)
        check_names(self.verifiers, self.held_out)
        for name, verifier in self.held_out.items():
            check_judge(name, verifier)
        for name, verifier in self.verifiers.items():
            check_verifier(name, verifier, self)
        if len(self.verifiers) > 1:
            weights = [verifier.weight for verifier in self.verifiers.values()]
            check_weights(weights, self.ensemble)
        check_levels(self)
        check_target(self)
        if self.num_steps < self.declared.least_steps:
            raise UserError(
                f"num_steps={self.num_steps}: algorithm={self.algorithm} looks at runs before they "
                f"end, and needs at least {self.declared.least_steps}; use algorithm=random"
            )
        self.declared.check(self, self.settings)

    @property
    def declared(self) -> Algorithm:
        """Declarations of the algorithm."""
        return ALGORITHMS[self.algorithm]

    @property
    def settings(self) -> Any:
        """The section of the algorithm."""
        return getattr(self, self.algorithm)

    @property
    def step_tilt(self) -> Tilt | None:
        """How the noise of its runs' steps is tilted."""
        return self.declared.tilt(self, self.settings) if self.declared.tilt else None


def check_names(verifiers: Collection[str], held_out: Collection[str]) -> None:
    """Raises UserError without a verifier, or for names that would be mixed up."""
    if not verifiers:
        raise UserError(
            "verifiers is empty: name one to search with, such as verifiers.black.kind="
            "luminance verifiers.black.target=0, or verifiers.clip.kind=clip_score "
            "verifiers.clip.checkpoint=FOLDER"
        )
    both = sorted(set(verifiers) & set(held_out))
    if both:
        raise UserError(
            f"held_out.{both[0]} is among the verifiers too: a verifier that guides the search "
            "cannot judge the search; give it another name if it is another one"
        )
    if "diversity" in {*verifiers, *held_out}:
        raise UserError(
            "a verifier is called diversity, the name of a measure beside the held-out ones; give "
            "it another name"
        )


def check_judge(name: str, verifier: VerifierConfig) -> None:
    """Raises UserError for a held-out verifier that needs more than the winner's image."""
    if verifier.declared.needs != "image":
        raise UserError(
            f"held_out.{name}: kind={verifier.kind} {verifier.declared.looks}, and a winner is "
            "judged by its image alone; hold out another kind"
        )


def check_verifier(name: str, verifier: VerifierConfig, search: SearchOptions) -> None:
    """Raises UserError for a verifier that cannot judge the runs of the search."""
    kind, form = verifier.declared, ALGORITHMS[search.algorithm].form
    if kind.needs == "set" and search.held_out and form != "whole":
        raise UserError(
            f"verifiers.{name}: kind={verifier.kind} {kind.looks}, so a plain image beside each "
            f"winner, which held_out asks of algorithm={search.algorithm}, would be scored with "
            f"another set; use {named(('whole',))}, or leave held_out out"
        )
    if form not in kind.forms:
        runs = "whole runs" if kind.forms == ("whole",) else "runs from a noise of their own"
        raise UserError(
            f"verifiers.{name}: kind={verifier.kind} {kind.looks} and needs {runs}; algorithm="
            f"{search.algorithm} has none; use {named(kind.forms)}"
        )
    sampler = SAMPLERS[search.sampler]
    if kind.inverts and not (sampler.is_ddim and not sampler.fresh_noise(search.eta)):
        raise UserError(
            f"verifiers.{name}: kind={verifier.kind} inverts deterministic DDIM; use sampler=ddim "
            f"without eta, not sampler={search.sampler}"
        )
    check_partial_steps(name, verifier.partial_steps, search)


def check_levels(search: SearchOptions) -> None:
    """Raises UserError for levels of no verifier, or that are none."""
    for name, shares in search.verifier_levels.items():
        key = f"verifier_levels.{name}"
        if name not in search.verifiers:
            raise UserError(f"{key} is of none of the verifiers, {', '.join(search.verifiers)}")
        are_shares = len(shares) == 2 and 0 <= shares[0] <= shares[1] <= 1
        require(are_shares, key, shares, "[from, to], shares of the sampling steps, 0 to 1")


def check_target(search: SearchOptions) -> None:
    """Raises UserError for a target that no score can reach, or no score is compared with."""
    if search.target is None:
        return
    target, algorithm = search.target, ALGORITHMS[search.algorithm]
    require(math.isfinite(target), "target", target, "a finite number, or left out")
    if not algorithm.takes_target:
        names = [name for name, each in ALGORITHMS.items() if each.takes_target]
        raise UserError(
            f"target={target:g}: algorithm={search.algorithm} spends most of its budget before its "
            f"first image, so ending there saves little; use {', '.join(names)}"
        )
    if len(search.verifiers) > 1 and search.ensemble != "weighted_sum":
        raise UserError(
            f"target={target:g}: ensemble={search.ensemble} ranks candidates among each other, "
            "and a target is compared with a score; use ensemble=weighted_sum"
        )
    if target > (highest := highest_score(search)):
        raise UserError(
            f"target={target:g}: no image reaches it, the highest score of "
            f"{', '.join(search.verifiers)} is {highest:g}; lower it"
        )


def highest_score(search: SearchOptions) -> float:
    """Returns the highest score that an image can have, infinity where verifiers declare none."""
    configs = list(search.verifiers.values())
    weights = [config.weight for config in configs] if len(configs) > 1 else [1.0]
    tops = [config.declared.highest(config) for config in configs]
    return sum(w * top if w > 0 else math.inf for w, top in zip(weights, tops, strict=True) if w)


def check_partial_steps(name: str, partial_steps: int | None, search: SearchOptions) -> None:
    """Raises UserError for a partial inversion of runs that are not whole, or too short."""
    if partial_steps is None:
        return
    if partial_steps > search.num_steps:
        raise UserError(
            f"verifiers.{name}.partial_steps={partial_steps} is more than num_steps="
            f"{search.num_steps}: a run is inverted over the steps that it was sampled in; give "
            f"at most {search.num_steps}"
        )
    if ALGORITHMS[search.algorithm].form != "whole":
        raise UserError(
            f"verifiers.{name}: partial_steps goes with {named(('whole',), 'and')}; algorithm="
            f"{search.algorithm} inverts each run from where it looks at it; leave it out"
        )


def named(forms: tuple[RunForm, ...], word: str = "or") -> str:
    """Names the algorithms that run candidates so, for verifiers that no tilt can follow."""
    names = [name for name, one in ALGORITHMS.items() if one.form in forms and not one.tilt]
    return f"{', '.join(names[:-1])} {word} {names[-1]}" if len(names) > 1 else names[0]
