"""The page of the search study: held-out accuracy against NFE, paired over prompts.

Accuracy is the share of winners that the held-out reader reads as their prompt says. Differences of
two arms are paired over prompts (bootstrap); wins and losses have the exact test, corrected for all
comparisons with more steps (Holm).
"""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.statistics.estimates import (
    NUM_RESAMPLES,
    Estimate,
    bca_interval,
    proportion,
    smallest_detectable_effect,
)
from blackpoint.sampling.statistics.paired import count_outcomes, holm, mean_difference
from blackpoint.scripts.measurements.full_architecture_table import describe_machine
from blackpoint.scripts.studies.search_study_arms import (
    FEWEST_NFE,
    HACKED,
    MULTIPLES,
    NUM_STEPS,
    PLAIN,
    STEPS,
)

Rows = Sequence[dict[str, Any]]
Values = dict[tuple[str, float], np.ndarray]
STYLES = {
    STEPS: ("black", "s", "--"),
    "random": ("tab:blue", "o", "-"),
    "zero_order": ("tab:green", "^", "-"),
    "paths": ("tab:purple", "D", "-"),
    "halving": ("tab:red", "v", "-"),
    "fk_steering": ("tab:orange", "P", "-"),
}


def columns(rows: Rows, key: str) -> Values:
    """Returns a column of each arm, ordered by prompt."""
    found: dict[tuple[str, float], dict[int, float]] = {}
    for row in rows:
        if row["arm"] != HACKED:
            arm = (row["arm"], float(row["multiple"]))
            found.setdefault(arm, {})[row["prompt_index"]] = float(row[key])
    names = list(dict.fromkeys(name for name, _ in found))
    arms = sorted(found, key=lambda arm: (names.index(arm[0]), arm[1]))
    return {arm: np.array([v for _, v in sorted(found[arm].items())]) for arm in arms}


def write_page(output: Path, rows: Rows, records: dict[str, Any]) -> None:
    """Writes OUTPUT/results.md and OUTPUT/accuracy.png, as far as there are rows."""
    judged, scores, nfe = (columns(rows, key) for key in ("judged", "score", "nfe"))
    if (PLAIN, 1.0) not in judged:
        return
    plot(judged, nfe, output / "accuracy.png")
    num_prompts = len(judged[PLAIN, 1.0])
    levels = sorted((int(level), tau) for level, tau in records["kendall"].items())
    kendall = ", ".join(f"{tau:.2f} after {level}" for level, tau in levels)
    text = f"""# Results of `python -m blackpoint.scripts.studies.search_study`

{datetime.date.today().isoformat()}, {describe_machine()["machine"]}, one thread; {num_prompts}
prompts, seed 0, DDIM with {NUM_STEPS} trailing steps, guidance 1: {NUM_STEPS} NFE an image. "Read"
is the share of winners that the held-out reader reads as the prompt says; intervals are of 95 %.
Raw rows: rows.csv.gz; seconds and settings are in each search's folder.

![accuracy against NFE](accuracy.png)

{accuracy_table(judged, nfe)}

{steps_table(judged)}

## Halving

Kendall's tau of preview and final score: {kendall} of {NUM_STEPS} steps.

{halving_table(judged, scores, nfe, records["calibration_nfe"])}

## The alarm

{hacking(rows, records["hacking"])}
"""
    write_whole(output / "results.md", text)


def accuracy_table(judged: Values, nfe: Values) -> str:
    """Returns what each arm reads, and the difference from the plain image."""
    lines = [
        "| arm | images' worth | NFE an image | read | minus best-of-1 |",
        "|---|--:|--:|---|---|",
    ]
    for (arm, multiple), values in judged.items():
        share = proportion(int(values.sum()), len(values))
        gain = mean_difference(values, judged[PLAIN, 1.0])
        cost = nfe[arm, multiple].mean()
        lines.append(f"| {arm} | {multiple:g} | {cost:.1f} | {percent(share)} | {points(gain)} |")
    return "\n".join(lines)


def steps_table(judged: Values) -> str:
    """Compares every arm with one image of as many NFE, in more steps."""
    pairs = {
        (arm, multiple): (values, judged[STEPS, multiple])
        for (arm, multiple), values in judged.items()
        if arm != STEPS and (STEPS, multiple) in judged
    }
    outcomes = {key: count_outcomes(*pair) for key, pair in pairs.items()}
    names = {key: f"{key[0]} {key[1]:g}" for key in pairs}
    adjusted = holm({names[key]: outcome.p_value for key, outcome in outcomes.items()})
    lines = [
        "| arm | images' worth | minus more steps of that worth | wins, ties, losses | p (Holm) |"
        " smallest that n would find |",
        "|---|--:|---|---|--:|--:|",
    ]
    for key, (values, baseline) in pairs.items():
        found, counts = mean_difference(values, baseline), outcomes[key]
        least = smallest_detectable_effect(values - baseline)
        lines.append(
            f"| {key[0]} | {key[1]:g} | {points(found)} | "
            f"{counts.wins}, {counts.ties}, {counts.losses} | {adjusted[names[key]]:.2g} | "
            f"{100 * least:.1f} |"
        )
    return "\n".join(lines)


def halving_table(judged: Values, scores: Values, nfe: Values, calibration_nfe: int) -> str:
    """Returns which share of best-of-32's gain halving keeps, by both readers."""
    few, whole, plain = ("halving", FEWEST_NFE * 32), ("random", 32.0), (PLAIN, 1.0)
    if few not in judged or whole not in judged:
        return "(not there yet)"
    own, beside = nfe[few].mean(), calibration_nfe / len(nfe[few])
    cost = (own + beside) / nfe[whole].mean()
    lines = [
        f"It spends {own:.0f} NFE an image, and {beside:.1f} more on measuring the correlations "
        f"({calibration_nfe} in all, once, and in no other table here). At these {100 * cost:.0f} "
        "% of best-of-32's NFE it keeps, of the gain over best-of-1,",
        "",
    ]
    for name, values in (("held-out reading", judged), ("searched score", scores)):
        share = ratio(values[few] - values[plain], values[whole] - values[plain])
        lines.append(
            f"- {name}: {100 * share.value:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"
        )
    return "\n".join(lines)


def ratio(part: np.ndarray, whole: np.ndarray, seed: int = 0) -> Estimate:
    """Estimates a ratio of means with a bootstrap interval over prompts, paired."""
    rows = np.random.default_rng(seed).integers(len(part), size=(NUM_RESAMPLES, len(part)))
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = part[rows].mean(axis=1) / whole[rows].mean(axis=1)
    value = float(part.mean() / whole.mean())
    influence = (part - value * whole) / whole.mean()
    return Estimate(value, *bca_interval(value, resampled, [influence]), len(part))


def hacking(rows: Rows, alarms: Sequence[dict[str, Any]]) -> str:
    """Says what searching for darkness did."""
    own = [row for row in rows if row["arm"] == HACKED]
    if not own:
        return "(not there yet)"
    before = proportion(int(sum(float(row["plain_judged"]) for row in own)), len(own))
    after = proportion(int(sum(float(row["judged"]) for row in own)), len(own))
    found = [finding["line"] for alarm in alarms for finding in alarm["findings"]]
    lines = [f"- {line}" for line in found] or ["- it stays silent"]
    return "\n".join(
        [
            f'{len(own)} prompts that end in "on a black background", best of 32 for darkness '
            "(the mean luminance of the image, target 0):",
            "",
            *lines,
            f"- read: {percent(before)} of the plain images, {percent(after)} of the winners",
        ]
    )


def plot(judged: Values, nfe: Values, path: Path) -> None:
    """Draws accuracy against NFE, a line an algorithm, with intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    names = [name for name in STYLES if any(arm == name for arm, _ in judged)]
    for number, name in enumerate(names):
        color, marker, line = STYLES[name]
        points_of = sorted((m for arm, m in judged if arm == name))
        shares = [proportion(int(judged[name, m].sum()), len(judged[name, m])) for m in points_of]
        shift = 1.03 ** (number - len(names) / 2)  # so that intervals do not hide one another
        axes.errorbar(
            [nfe[name, m].mean() * shift for m in points_of],
            [100 * share.value for share in shares],
            [
                [100 * max(0.0, share.value - share.low) for share in shares],  # 0 but for rounding
                [100 * max(0.0, share.high - share.value) for share in shares],
            ],
            color=color,
            marker=marker,
            linestyle=line,
            capsize=3,
            label=name.replace("_", " "),
        )
    plain = 100 * judged[PLAIN, 1.0].mean()
    axes.axhline(plain, color="gray", linewidth=1, linestyle=":")
    axes.text(NUM_STEPS * MULTIPLES[-1], plain, "one image of 6 steps", ha="right", va="bottom")
    axes.set_xscale("log", base=2)
    ticks = [NUM_STEPS * multiple for multiple in MULTIPLES]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("NFE an image")
    axes.set_ylabel("winners that the held-out reader reads, %")
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=40)
    axes.legend(loc="lower center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def percent(share: Estimate) -> str:
    """Writes a share in percent."""
    return f"{100 * share.value:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def points(found: Estimate) -> str:
    """Writes a difference of shares in percentage points."""
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
