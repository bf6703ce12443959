"""The page of the pixel study: the rows, paired differences, and what they could have shown.

Differences are paired over seeds: with k seeds their mean has the interval of Student's t with
k - 1 degrees of freedom, and the smallest effect that a two-sided test at 5 % finds with 80 % power
follows from the noncentral t.
"""

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blackpoint.sampling.statistics.estimates import paired_mean, smallest_detectable_effect
from blackpoint.scripts.measurements.full_architecture_table import describe_machine

NEITHER, SHIFT, SCALES, BOTH = "neither", "shift", "multi-scale", "both"
Values = dict[str, float]


@dataclass(frozen=True)
class Effect:
    """A contrast of the four arms: what it is called, and its value at one seed."""

    name: str
    of: Callable[[Values], float]


EFFECTS = (
    Effect("shift, mean of with and without multi-scale", lambda v: _main(v, SHIFT, SCALES)),
    Effect("multi-scale, mean of with and without shift", lambda v: _main(v, SCALES, SHIFT)),
    Effect("shift alone", lambda v: v[SHIFT] - v[NEITHER]),
    Effect("multi-scale alone", lambda v: v[SCALES] - v[NEITHER]),
    Effect("multi-scale, given the shift", lambda v: v[BOTH] - v[SHIFT]),
    Effect("both", lambda v: v[BOTH] - v[NEITHER]),
    Effect("interaction", lambda v: v[BOTH] - v[SHIFT] - v[SCALES] + v[NEITHER]),
)


def _main(v: Values, effect: str, other: str) -> float:
    return (v[effect] - v[NEITHER] + v[BOTH] - v[other]) / 2


def tables(rows: list[dict[str, Any]]) -> str:
    """Returns the tables of all seeds that have every arm."""
    by_seed: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], {})[row["arm"]] = row
    arms = (NEITHER, SHIFT, SCALES, BOTH)
    seeds = sorted(seed for seed, found in by_seed.items() if set(arms) <= set(found))
    lines: list[str] = []
    for key, title, scale in (("kid", "KID x 1000", 1e3), ("digits_read", "digits read, %", 1e2)):
        header = " | ".join(f"seed {seed}" for seed in seeds)
        lines += [f"| {title} | {header} | mean |", "|---|" + "--:|" * (len(seeds) + 1)]
        for arm in arms:
            values = [scale * by_seed[seed][arm][key] for seed in seeds]
            cells = " | ".join(f"{value:.2f}" for value in values)
            lines.append(f"| {arm} | {cells} | {sum(values) / len(values):.2f} |")
        lines += ["", f"| effect on {title} | mean | 95 % interval | smallest that n = "]
        lines[-1] += f"{len(seeds)} would find |"
        lines.append("|---|--:|--:|--:|")
        for effect in EFFECTS if len(seeds) > 1 else ():
            differences = [
                effect.of({arm: scale * by_seed[seed][arm][key] for arm in arms}) for seed in seeds
            ]
            found = paired_mean(differences)
            lines.append(
                f"| {effect.name} | {found.value:+.2f} | [{found.low:+.2f}, {found.high:+.2f}] | "
                f"{smallest_detectable_effect(differences):.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def write_page(output: Path, rows: list[dict[str, Any]], judge: dict[str, float]) -> None:
    """Writes OUTPUT/results.md: what was run, and the tables."""
    first = rows[0]
    speeds = [row["images_per_s"] for row in rows]
    slowest, fastest = min(speeds), max(speeds)
    accuracy = ", ".join(f"{name} {100 * share:.1f} %" for name, share in judge.items())
    text = f"""# Results of `python -m blackpoint.scripts.studies.pixel_study`

{datetime.date.today().isoformat()}, {describe_machine()["machine"]}; {len(rows)} runs of
{first["max_steps"]} steps of 32 images, one core each, {slowest:.0f} to {fastest:.0f} images/s.
{first["num_samples"]} samples a model, DDIM with {first["num_steps"]} steps, guidance
{first["guidance_scale"]:g}; KID against 500 held-out digits, on features of a classifier trained on
the training digits (held-out accuracy: {accuracy}). Lower KID is better, and it may be below 0: it
is unbiased. Raw rows: rows.csv.

{tables(rows)}"""
    (output / "results.md").write_text(text.rstrip() + "\n", encoding="utf-8")
