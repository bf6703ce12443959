"""Verifier hacking: the searched score rises while held-out measures get worse.

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

from blackpoint.sampling.statistics.estimates import (
    LEVEL,
    Estimate,
    Values,
    smallest_detectable_effect,
)
from blackpoint.sampling.statistics.paired import mean_difference

DIVERSITY = "diversity"
FEWEST_PROMPTS = ceil(1 - log2(1 - LEVEL))
"""From so many prompts on "all of them fell" is no chance: 2 / 2^n <= 1 - LEVEL."""


@dataclass(frozen=True)
class PairedScores:
    """A verifier's scores of the winners and of the baselines, one per prompt."""

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
    """Changes from the baselines to the winners, and those that look like hacking."""

    searched: str
    changes: dict[str, Estimate]
    """Winners minus baselines, by verifier (the searched one first) and diversity."""
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Notes on power where nothing was found, and on left-out prompts."""

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
    seed: int = 0,
) -> HackingAlarm:
    """Says where the searched score rises and a held-out one, or diversity, falls.

    Verifiers have different names, and two prompts or more with finite scores of both; prompts
    without are left out of that verifier's interval, and a note counts them. diversity: the change
    of the mean pairwise distance, from `diversity.diversity_change`. With so few prompts that even
    all of them falling could be chance, nothing is found and a note says so.
    """
    notes: list[str] = []
    pairs = {scores.verifier: _finite_pairs(scores, notes) for scores in (searched, *held_out)}
    changes = {name: mean_difference(*pair, seed=seed) for name, pair in pairs.items()}
    if diversity is not None:
        changes[DIVERSITY] = diversity
    rise = changes[searched.verifier]
    rises = rise.low > 0 and rise.n >= FEWEST_PROMPTS
    findings = []
    for metric, change in changes.items():
        if change.n < FEWEST_PROMPTS:
            notes.append(
                f"{metric}: {change.n} prompts are too few to tell; {FEWEST_PROMPTS} are needed"
            )
        elif metric == searched.verifier:
            if not rises:
                notes.append(f"{metric}, which was searched, does not rise: {_shown(change)}")
        elif rises and change.high < 0:
            what = metric if metric == DIVERSITY else f"held-out {metric}"
            line = (
                f"hacking: {searched.verifier} rises by {_shown(rise)} while {what} falls by "
                f"{_shown(change)}"
            )
            findings.append(Finding(metric, change, line))
        else:
            notes.append(_quiet(metric, change, pairs.get(metric)))
    return HackingAlarm(searched.verifier, changes, findings, notes)


def _quiet(metric: str, change: Estimate, pair: tuple[np.ndarray, np.ndarray] | None) -> str:
    if change.high < 0 or change.low > 0:
        return f"{metric} {'falls' if change.high < 0 else 'rises'}: {_shown(change)}"
    line = f"{metric} shows no change: {_shown(change)}"
    if pair is None:
        return line
    effect = smallest_detectable_effect(pair[0] - pair[1])
    return f"{line}; a change of {effect:.4g} would have shown with power 0.8"


def _shown(change: Estimate) -> str:
    return f"{change:+.4g} ({change.n} prompts)"


def _finite_pairs(scores: PairedScores, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scores of prompts where both are finite."""
    winners, baselines = np.array([scores.winners, scores.baselines], dtype=np.float64)
    finite = np.isfinite(winners) & np.isfinite(baselines)
    if not finite.all():
        notes.append(f"{scores.verifier}: {(~finite).sum()} prompts without finite scores left out")
    return winners[finite], baselines[finite]
