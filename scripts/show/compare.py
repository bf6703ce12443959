"""The page of `blackpoint report compare=[A,B]`: two checkpoints or runs side by side.

The same prompts and seed with each, by the process that each was trained for; of two runs also
their figures, the settings in which they differ and their losses.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blackpoint.data.files.plain import read_json
from blackpoint.data.files.whole_file import write_whole
from blackpoint.data.files.yaml_text import read_yaml_file
from blackpoint.sampling.prompts.brightness_target import luminance_target
from blackpoint.sampling.prompts.prompt_set import read_prompts
from blackpoint.sampling.report.page import Facts, Figure, Gallery, Page, Section
from blackpoint.sampling.report.training_page import at_a_glance, shown_settings, subject
from blackpoint.sampling.report.training_plots import compared_losses
from blackpoint.sampling.report.training_series import Series
from blackpoint.sampling.statistics.table import Table
from blackpoint.scripts.show.config import ShowConfig
from blackpoint.scripts.show.models import Models
from blackpoint.train.records.metrics_file import read_metrics

PROMPTS = [
    "a solid black background",
    "a solid white background",
    "a starless night sky",
    "a snowfield under an overcast sky",
]
"""Of configs/prompts/brightness.jsonl, where neither the config nor the second run has any."""
NUM_PROMPTS = 8


def write_comparison(
    path: Path, names: Sequence[str], prompts: object, device: str, asked: Mapping[str, Any]
) -> None:
    """Samples both checkpoints and writes the page.

    prompts: as those of `blackpoint sample`, or None; asked: other keys of it, with their values.
    """
    models = Models(ShowConfig(names[1], base=names[0], device=device))
    prompts = read_prompts(prompts) if prompts else models.prompts or PROMPTS
    shown = [
        [models.sample(side, prompts=[prompt], **asked) for prompt in prompts[:NUM_PROMPTS]]
        for side in range(2)
    ]
    settings = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in asked.items())
    page = Page(
        "blackpoint: two checkpoints",
        [
            Facts("", dict(zip(("first", "second"), models.about(), strict=True))),
            Gallery(
                "The same prompts and seed",
                [(n, [one["image"] for one in row]) for n, row in zip(names, shown, strict=True)],
                f"Each by its own process; {settings}. A click enlarges; the slider uncovers the "
                "first.",
                prompts[:NUM_PROMPTS],
                before="line",
            ),
            luminance_table(names, prompts, shown),
            runs_section(names),
        ],
    )
    write_whole(path, page.html())


def luminance_table(
    names: Sequence[str], prompts: Sequence[str], shown: Sequence[Sequence[Mapping[str, Any]]]
) -> Table:
    """Shows the mean luminance of each image beside what its prompt asks of the whole image."""
    rows = []
    for prompt, *pair in zip(prompts, *shown, strict=False):
        target = luminance_target(prompt)
        asked = target.value if target and target.where == "image" else None
        levels = {name: one["luminance"] for name, one in zip(names, pair, strict=True)}
        rows.append({"prompt": prompt, **levels, "asked for": asked})
    columns = {"prompt": "", **dict.fromkeys(names, ".3f"), "asked for": ".2f"}
    return Table(rows, columns, "Mean luminance", "0 is black, 1 white.")


def runs_section(names: Sequence[str]) -> Section | None:
    """Compares two training runs; None where one of them is none."""
    folders = [Path(name) for name in names]
    if not all((folder / "metrics.csv").is_file() for folder in folders):
        return None
    metrics: list[Series] = [read_metrics(folder / "metrics.csv") for folder in folders]
    files = [folder / "config.yaml" for folder in folders]
    configs: list[Any] = [(read_yaml_file(f) or {}) if f.is_file() else {} for f in files]
    figures = [
        subject(config, read_json(folder / "environment.json")) | at_a_glance(series)
        for config, folder, series in zip(configs, folders, metrics, strict=True)
    ]
    settings = [shown_settings(config) for config in configs]
    losses = compared_losses(dict(zip(names, metrics, strict=True)))
    return Section(
        "The two trainings",
        [
            _table("Figures", names, figures, only_different=False),
            Figure("Losses", losses, "Training, smoothed; dashed: validation."),
            _table("Settings that differ", names, settings, only_different=True),
        ],
    )


def _table(
    title: str, names: Sequence[str], pair: Sequence[Mapping[str, str]], only_different: bool
) -> Table:
    rows = [
        {"": key} | {name: one.get(key, "") for name, one in zip(names, pair, strict=True)}
        for key in dict.fromkeys(key for one in pair for key in one)
        if not only_different or pair[0].get(key) != pair[1].get(key)
    ]
    return Table(rows, dict.fromkeys(["", *names], ""), title)
