"""The page about the full-size runs: figures beside the arithmetic, machine and versions."""

import json
import shlex
from typing import Any

from blackpoint.sampling.report.page import Page, Section
from blackpoint.sampling.statistics.table import Table

IMPORTS = "imports alone"
TITLES = {
    "sd15": "Stable Diffusion 1.5",
    "sd21_base": "Stable Diffusion 2.1 base",
    "sd21": "Stable Diffusion 2.1",
    "small": "the same blocks, a tenth as wide (a rehearsal)",
    "small_21": "the same blocks as 2.1's, a tenth as wide (a rehearsal)",
}
INTRODUCTION = """\
`make full-architecture`: folders of the published architectures with random weights go through
every verb, each a process of its own, computing in float32: training from cached latents (16x16,
batch 1, fused AdamW, gradient checkpointing, average on), sampling at 64x64 latents with guidance.

- *peak*: largest resident memory of the process, mapped files included, in GB of 10^9 bytes.
- *not droppable*: the part of it that no file backs, looked at ten times per second.
- *arithmetic*: what the verb must hold; *over* is the peak without the imports, divided by it.
  A second copy of the weights would add .2 to training and .6 to .8 to the other verbs.
- *file*: between the base folder and a single file, both in float16, and back."""


def markdown(results: dict[str, Any]) -> str:
    """Writes the page: one table per architecture."""
    sections = [_section(name, result) for name, result in results.items()]
    return Page("Full architectures", [INTRODUCTION, *sections]).markdown()


def _written(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value


def _section(name: str, result: dict[str, Any]) -> Section:
    imports_gb = result["verbs"][IMPORTS]["peak_rss_gb"]
    counts = ", ".join(f"{part} {count:,}" for part, count in result["parameters"].items())
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    settings = shlex.join(f"{key}={_written(v)}" for key, v in result["settings"].items())
    lines = []
    for verb, row in result["verbs"].items():
        expected = row["arithmetic_gb"] or None
        over = (row["peak_rss_gb"] - imports_gb) / expected if expected else None
        peaks = (row["peak_rss_gb"], row["peak_anonymous_gb"])
        lines.append((verb, row["seconds"], *peaks, expected, over, row["holds"]))
    sizes = dict.fromkeys(["peak, GB", "not droppable, GB", "arithmetic, GB", "over"], ".2f")
    architecture, _, variant = name.partition(" ")
    return Section(
        TITLES[architecture] + (f", {variant}" if variant else ""),
        [
            f"Parameters: {counts}. {result['date']}, {result['machine']}; {versions}.\n"
            f"`python -m blackpoint.scripts.measurements.full_architecture {settings}`",
            Table.of({"verb": "", "seconds": ".0f", **sizes, "of": ""}, lines),
        ],
    )
