"""What a stability study says: correlations, selection and optimisation beside their rivals.

All statistics are over prompts: a prompt's K noises give one rank correlation, or one chosen image,
and intervals are paired bootstraps over prompts. The expected quality of the most stable of k
noises, over all subsets of the K that were measured, needs no more sampling: with the noises sorted
by stability, worst first, the one of rank r (from 1) is the best of C(r-1, k-1) of C(K, k) subsets.
"""

from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from blackpoint.sampling.evaluation.stability_arms import Prices
from blackpoint.sampling.evaluation.stability_rows import Found, Scores
from blackpoint.sampling.statistics.estimates import Estimate, mean, smallest_detectable_effect
from blackpoint.sampling.statistics.paired import Outcomes, count_outcomes, holm, mean_difference

FEWEST = 3
"""Noises with finite scores that a rank correlation needs."""
SELECTION = "selection"
RANDOM, LEAST, BEST_OF = "random noise", "least stable noise", "best-of-N at equal NFE"


@dataclass(frozen=True)
class Correlation:
    """Mean over prompts of the rank correlation, within a prompt, of two scores of its noises."""

    first: str
    second: str
    spearman: Estimate
    kendall: Estimate
    detectable: float
    """Smallest mean Spearman that so many prompts would have shown with power 0.8."""


@dataclass(frozen=True)
class Versus:
    """One method beside one rival by one quality score, paired over prompts."""

    method: str
    nfe: int
    rival: str
    rival_nfe: int
    quality: str
    difference: Estimate
    outcomes: Outcomes
    adjusted_p_value: float
    """Holm's, over all rivals and quality scores of the method."""
    detectable: float


@dataclass(frozen=True)
class Choice:
    """The most stable of k noises by one score, over all subsets of the pool."""

    score: str
    num_noises: int
    nfe: int
    quality: dict[str, Estimate]
    gain: dict[str, Estimate]
    """Over the mean noise of the prompt."""


@dataclass(frozen=True)
class Cheaper:
    """A stability score beside the one that selects."""

    score: str
    nfe: int
    """Of one score, its run not counted."""
    agreement: Estimate
    """Mean Spearman with the score that selects."""
    correlation: Estimate
    """Mean Spearman with the quality score that plots show."""
    selection_nfe: int
    """Of choosing among all K noises by it."""
    loss: dict[str, Estimate]
    """Quality of the noise that it chooses minus that of the noise that the first one chooses."""


def correlations(found: Found) -> list[Correlation]:
    """Returns the table of every stability score with every quality score."""
    return [
        found_correlation
        for stability in found.stability
        for quality in found.quality
        if (found_correlation := correlation(found.pool.scores, stability, quality))
    ]


def correlation(scores: Scores, first: str, second: str) -> Correlation | None:
    """Returns the mean rank correlation; None where fewer than two prompts have one."""
    rhos, taus = [], []
    for x, y in zip(scores[first], scores[second], strict=True):
        finite = np.isfinite(x) & np.isfinite(y)
        x, y = x[finite], y[finite]
        if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
            continue
        rhos.append(float(stats.spearmanr(x, y).statistic))
        taus.append(float(stats.kendalltau(x, y).statistic))
    if len(rhos) < 2:
        return None
    return Correlation(
        first, second, mean(rhos), mean(taus), smallest_detectable_effect(np.array(rhos))
    )


def chosen(found: Found, score: str, num_noises: int | None = None, worst: bool = False) -> Scores:
    """Returns the quality, (P,), of the noise that a score chooses of the first noises."""
    values = found.pool.scores[score][:, :num_noises]
    return _at(found.pool.scores, found.quality, _argmax(-values if worst else values))


def best_of(found: Found, nfe: int) -> Scores:
    """Returns the quality of what random search finds for so many NFE a prompt."""
    count = max(1, nfe // Prices(found.config, found.place.num_steps).image())
    values = found.best_of.scores[found.first_quality][:, :count]
    return _at(found.best_of.scores, found.quality, _argmax(values))


def methods(found: Found) -> dict[str, tuple[int, Scores]]:
    """Returns NFE a prompt and qualities of selection and of each optimisation."""
    prices = Prices(found.config, found.place.num_steps)
    first = found.stability[0]
    kinds = {
        f"optimisation, {ascent.kind}": (prices.optimisation(ascent.kind), ascent.quality)
        for ascent in found.ascents
    }
    return {SELECTION: (prices.selection(), chosen(found, first)), **kinds}


def rivals(found: Found, nfe: int) -> dict[str, tuple[int, Scores]]:
    """Returns NFE a prompt and qualities of what a method is compared with."""
    prices, config = Prices(found.config, found.place.num_steps), found.config
    plain = _at(found.pool.scores, found.quality, np.zeros(len(found.pool.prompts), dtype=int))
    known = {
        RANDOM: (prices.image(), plain),
        LEAST: (prices.selection(), chosen(found, found.stability[0], worst=True)),
        BEST_OF: (nfe - nfe % prices.image(), best_of(found, nfe)),
    }
    for scale, noises in found.guided.items():
        first = {name: noises.scores[name][:, 0] for name in found.quality}
        known[f"random noise, guidance {scale:g}"] = (prices.image(scale), first)
    if config.guidance_scale in config.rival_guidance_scales:  # name it as the others are
        known[f"random noise, guidance {config.guidance_scale:g}"] = known.pop(RANDOM)
    return known


def comparisons(found: Found) -> list[Versus]:
    """Compares each method with each rival; wins, ties, losses and differences over prompts."""
    lines = []
    for method, (nfe, values) in methods(found).items():
        pairs = {
            (rival, quality): (rival_nfe, *_finite(values[quality], others[quality]))
            for rival, (rival_nfe, others) in rivals(found, nfe).items()
            for quality in found.quality
        }
        outcomes = {key: count_outcomes(a, b) for key, (_, a, b) in pairs.items()}
        adjusted = holm({" ".join(key): each.p_value for key, each in outcomes.items()})
        lines += [
            Versus(
                method,
                nfe,
                rival,
                rival_nfe,
                quality,
                mean_difference(a, b),
                outcomes[rival, quality],
                adjusted[f"{rival} {quality}"],
                smallest_detectable_effect(a - b) if len(a) > 1 else float("nan"),
            )
            for (rival, quality), (rival_nfe, a, b) in pairs.items()
        ]
    return lines


def ablation(found: Found) -> list[Choice]:
    """Returns what the best of k noises is worth, by each stability score and the first quality."""
    prices, scores = Prices(found.config, found.place.num_steps), found.pool.scores
    lines = []
    for score in [*found.stability, found.first_quality]:
        for count in counts(found.config.num_noises):
            is_stability = score in found.stability
            nfe = prices.selection(score, count) if is_stability else count * prices.image()
            quality, gain = {}, {}
            for name in found.quality:
                expected = expected_of_best(scores[score], scores[name], count)
                plain = np.array([np.mean(row[np.isfinite(row)]) for row in scores[name]])
                own, all_noises = _finite(expected, plain)
                quality[name] = mean(own)
                gain[name] = mean_difference(own, all_noises)
            lines.append(Choice(score, count, nfe, quality, gain))
    return lines


def counts(num_noises: int) -> list[int]:
    """Returns 1, 2, 5, 10, ... up to K, K itself too."""
    steps = [each for power in range(6) for each in (10**power, 2 * 10**power, 5 * 10**power)]
    return [*(each for each in steps if each < num_noises), num_noises]


def expected_of_best(score: np.ndarray, quality: np.ndarray, count: int) -> np.ndarray:
    """Returns E[quality of the best by `score`] of `count` noises of each prompt, (P,).

    Of all its noises where fewer have numbers; nan where none has.
    """
    expected = []
    for x, y in zip(score, quality, strict=True):
        finite = np.isfinite(x) & np.isfinite(y)
        x, y = x[finite], y[finite]
        ranks, taken = np.arange(len(x)), min(count, len(x))
        weights = np.exp(_log_choose(ranks, taken - 1) - _log_choose(len(x), taken))
        order = np.lexsort((-ranks, x))  # of equal scores the earlier noise wins
        expected.append(float((weights * y[order]).sum()) if taken else float("nan"))
    return np.array(expected)


def cheaper(found: Found) -> list[Cheaper]:
    """Compares every stability score with the one that selects, by what each costs."""
    prices, scores = Prices(found.config, found.place.num_steps), found.pool.scores
    reference, judge = found.stability[0], found.quality[min(1, len(found.quality) - 1)]
    full, lines = chosen(found, reference), []
    for name in found.stability:
        agreement = correlation(scores, name, reference)
        with_quality = correlation(scores, name, judge)
        if agreement is None or with_quality is None:
            continue
        own = chosen(found, name)
        loss = {each: mean_difference(*_finite(own[each], full[each])) for each in found.quality}
        lines.append(
            Cheaper(
                name,
                prices.score(name),
                agreement.spearman,
                with_quality.spearman,
                prices.selection(name),
                loss,
            )
        )
    return lines


def _log_choose(n: np.ndarray | int, k: int) -> np.ndarray:
    """Returns log C(n, k); -inf where k > n."""
    n = np.asarray(n, dtype=np.float64)
    short = n < k
    found = special.gammaln(n + 1) - special.gammaln(k + 1)
    found = found - special.gammaln(np.where(short, 1, n - k + 1))
    return np.where(short, -np.inf, found)


def _argmax(values: np.ndarray) -> np.ndarray:
    """Returns the best of each row; a noise without a number never wins."""
    return np.where(np.isfinite(values), values, -np.inf).argmax(axis=1)


def _at(scores: Scores, names: list[str], places: np.ndarray) -> Scores:
    rows = np.arange(len(places))
    return {name: scores[name][rows, places] for name in names}


def _finite(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    finite = np.isfinite(first) & np.isfinite(second)
    return first[finite], second[finite]
