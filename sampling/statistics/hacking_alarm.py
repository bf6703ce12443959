"""Verifier hacking: the searched score rises while what nobody searched for gets worse.

A search takes the argmax of a verifier's score, faults of the verifier included (Ma et al. 2025:
verifier hacking). The alarm goes off where, with paired intervals over prompts, winners minus
baselines are

    searched score: above 0,   and   a held-out score, or the diversity: below 0.

Each interval holds at its level for itself: of many held-out scores that do not change, a share of
(1 - level) / 2 falls by chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, log2

import numpy as np

from blackpoint.sampling.errors import UserError
from blackpoint.sampling.statistics.estimates import (
    LEVEL,
    Estimate,
    Values,
    smallest_detectable_effect,
)
from blackpoint.sampling.statistics.paired import mean_difference

DIVERSITY = "diversity"


@dataclass(frozen=True)
class PairedScores:
    """A verifier's scores of the winners and of the baselines, one of each a prompt."""

    verifier: str
    winners: Values
    baselines: Values


@dataclass(frozen=True)
class Finding:
    """One score that fell while the searched one rose."""

    metric: str
    change: Estimate
    line: str


@dataclass(frozen=True)
class HackingAlarm:
    """What changed from the baselines to the winners, and what of it looks like hacking."""

    searched: str
    changes: dict[str, Estimate]
    """Winners minus baselines, by verifier (the searched one first) and diversity."""
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What to know when nothing was found, and what was left out."""

    @property
    def raised(self) -> bool:
        """Whether anything fell while the searched score rose."""
        return bool(self.findings)

    @property
    def lines(self) -> list[str]:
        """The result in words: a line for each finding, then the notes."""
        return [finding.line for finding in self.findings] + self.notes


def hacking_alarm(
    searched: PairedScores,
    held_out: Sequence[PairedScores],
    diversity: Estimate | None = None,
    level: float = LEVEL,
    seed: int = 0,
) -> HackingAlarm:
    """Says where the searched score rises and a held-out one, or diversity, falls.

    diversity: the change of the mean pairwise distance, from `diversity.diversity_change`. Prompts
    without two finite scores are left out of that verifier's interval, and a note counts them. With
    so few prompts that even all of them falling could be chance, nothing is found and a note says
    so.
    """
    names = [searched.verifier, *(scores.verifier for scores in held_out)]
    if len(set(names)) < len(names) or DIVERSITY in names:
        raise UserError(
            f"held_out: {', '.join(names)} with {DIVERSITY} are not all different; name each "
            "verifier once, the searched one not among the held-out"
        )
    notes: list[str] = []
    pairs = {scores.verifier: _finite_pairs(scores, notes) for scores in (searched, *held_out)}
    changes = {name: mean_difference(*pair, level, seed) for name, pair in pairs.items()}
    if diversity is not None:
        changes[DIVERSITY] = diversity
    needed = fewest_prompts(level)
    rise = changes[searched.verifier]
    rises = rise.low > 0 and rise.n >= needed
    findings = []
    for metric, change in changes.items():
        if change.n < needed:
            notes.append(f"{metric}: {change.n} prompts are too few to tell; {needed} are needed")
        elif metric != searched.verifier and rises and change.high < 0:
            what = metric if metric == DIVERSITY else f"held-out {metric}"
            line = (
                f"hacking: {searched.verifier} rises by {_shown(rise)} while {what} falls by "
                f"{_shown(change)}"
            )
            findings.append(Finding(metric, change, line))
        elif metric == searched.verifier and not rises:
            notes.append(f"{metric}, which was searched, does not rise: {_shown(change)}")
        elif metric != searched.verifier:
            notes.append(_quiet(metric, change, pairs, level))
    return HackingAlarm(searched.verifier, changes, findings, notes)


def fewest_prompts(level: float = LEVEL) -> int:
    """Returns from how many prompts on "all of them fell" is no chance: 2 / 2^n <= 1 - level."""
    return ceil(1 - log2(1 - level))


def _quiet(
    metric: str,
    change: Estimate,
    pairs: dict[str, tuple[np.ndarray, np.ndarray]],
    level: float,
) -> str:
    verb = "falls" if change.high < 0 else "rises" if change.low > 0 else "shows no change"
    line = f"{metric} {verb}: {_shown(change)}"
    if verb != "shows no change" or metric not in pairs:
        return line
    winners, baselines = pairs[metric]
    effect = smallest_detectable_effect(winners - baselines, level=level)
    return f"{line}; a change of {effect:.4g} would have shown with power 0.8"


def _shown(change: Estimate) -> str:
    return f"{change:+.4g} ({change.n} prompts)"


def _finite_pairs(scores: PairedScores, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scores of prompts where both are finite; two at least."""
    winners = np.asarray(scores.winners, dtype=np.float64)
    baselines = np.asarray(scores.baselines, dtype=np.float64)
    if winners.ndim != 1 or winners.shape != baselines.shape:
        raise UserError(
            f"{scores.verifier}: scores of shape {winners.shape} and {baselines.shape} are no "
            "pairs; give one of the winner and one of the baseline for each prompt, in the same "
            "order"
        )
    finite = np.isfinite(winners) & np.isfinite(baselines)
    num_left_out = int((~finite).sum())
    if finite.sum() < 2:
        raise UserError(
            f"{scores.verifier}: {finite.sum()} prompts have finite scores of winner and baseline; "
            "an interval needs two: score them again, or leave this verifier out"
        )
    if num_left_out:
        notes.append(f"{scores.verifier}: {num_left_out} prompts without finite scores left out")
    return winners[finite], baselines[finite]
