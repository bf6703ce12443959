"""The hacking alarm: when it goes off, when it does not, and what it says."""

import numpy as np
import torch

from blackpoint.sampling.statistics.diversity import diversity_change
from blackpoint.sampling.statistics.estimates import Estimate, smallest_detectable_effect
from blackpoint.sampling.statistics.hacking_alarm import FEWEST_PROMPTS, PairedScores, hacking_alarm
from blackpoint.sampling.statistics.paired import mean_difference


def scores(verifier: str, shift: float, n: int = 60, seed: int = 0) -> PairedScores:
    rng = np.random.default_rng([seed, *verifier.encode()])
    baselines = rng.normal(5, 2, n)
    return PairedScores(verifier, baselines + shift + rng.normal(0, 0.1, n), baselines)


def test_a_held_out_score_that_falls_raises_the_alarm() -> None:
    searched, falling, rising = scores("clip", 0.5), scores("reader", -0.3), scores("taste", 0.2)
    found = hacking_alarm(searched, [falling, rising])
    assert found.raised
    assert list(found.changes) == ["clip", "reader", "taste"]
    change = found.changes["reader"]
    assert change == mean_difference(falling.winners, falling.baselines)
    assert [(finding.metric, finding.change) for finding in found.findings] == [("reader", change)]
    rise = found.changes["clip"]
    assert found.lines[0] == (
        f"hacking: clip rises by {rise.value:+.4g} [{rise.low:+.4g}, {rise.high:+.4g}] (60 prompts)"
        f" while held-out reader falls by {change.value:+.4g} [{change.low:+.4g}, "
        f"{change.high:+.4g}] (60 prompts)"
    )
    assert found.lines[1].startswith("taste rises: +0.")


def test_a_searched_score_that_does_not_rise_is_no_hacking() -> None:
    found = hacking_alarm(scores("clip", -0.5), [scores("reader", -0.3)])
    assert not found.raised
    assert found.lines[0].startswith("clip, which was searched, does not rise: -0.")
    assert found.lines[1].startswith("reader falls: -0.")


def test_no_change_says_what_change_would_have_shown() -> None:
    held_out = scores("reader", 0.0)
    found = hacking_alarm(scores("clip", 0.5), [held_out])
    assert not found.raised
    effect = smallest_detectable_effect(held_out.winners - held_out.baselines)
    (line,) = found.lines
    assert line.startswith("reader shows no change: ")
    assert line.endswith(f"a change of {effect:.4g} would have shown with power 0.8")


def test_diversity_that_falls_raises_the_alarm() -> None:
    rng = np.random.default_rng(0)
    baseline = torch.from_numpy(rng.normal(size=(60, 4)))
    fall = diversity_change(0.5 * baseline, baseline)
    found = hacking_alarm(scores("clip", 0.5), [], fall)
    assert [finding.metric for finding in found.findings] == ["diversity"]
    assert "while diversity falls by -" in found.lines[0]
    kept = hacking_alarm(scores("clip", 0.5), [], Estimate(-0.1, -0.3, 0.1, 60))
    assert not kept.raised
    assert kept.lines == ["diversity shows no change: -0.1 [-0.3, +0.1] (60 prompts)"]


def test_too_few_prompts_raise_no_alarm() -> None:
    """Six is the first number of prompts of which all fall by chance in less than 5 %."""
    assert FEWEST_PROMPTS == 6
    few = hacking_alarm(scores("clip", 0.9, n=5), [scores("reader", -0.9, n=5)])
    assert not few.raised
    assert few.lines == [
        "clip: 5 prompts are too few to tell; 6 are needed",
        "reader: 5 prompts are too few to tell; 6 are needed",
    ]
    assert hacking_alarm(scores("clip", 0.9, n=6), [scores("reader", -0.9, n=6)]).raised


def test_false_alarms_are_rare() -> None:
    raised = sum(
        hacking_alarm(scores("clip", 0.5, 30, s), [scores("reader", 0.0, 30, s)], seed=s).raised
        for s in range(100)
    )
    assert raised <= 10  # 2.5 expected; more than 10 happens once in 20,000


def test_scores_that_are_not_finite_are_left_out_and_counted() -> None:
    held_out = scores("reader", -0.3)
    held_out.winners[3] = float("nan")
    held_out.baselines[7] = float("inf")
    found = hacking_alarm(scores("clip", 0.5), [held_out])
    assert found.raised and found.changes["reader"].n == 58
    assert "reader: 2 prompts without finite scores left out" in found.lines
