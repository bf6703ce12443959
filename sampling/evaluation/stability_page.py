"""The report of a stability study: one self-contained HTML page, and the same in Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.evaluation.stability import StabilityStudyConfig
from blackpoint.sampling.evaluation.stability_findings import (
    Versus,
    ablation,
    cheaper,
    comparisons,
    correlations,
)
from blackpoint.sampling.evaluation.stability_pictures import gallery
from blackpoint.sampling.evaluation.stability_plots import (
    ablation_plot,
    correlation_plot,
    cost_plot,
    title_of,
)
from blackpoint.sampling.evaluation.stability_rows import Found
from blackpoint.sampling.evaluation.stability_sets import SetMetric
from blackpoint.sampling.evaluation.stability_tables import (
    Table,
    ablation_table,
    cheaper_table,
    conclusion,
    correlation_table,
    cost_table,
    costs,
    name_of,
    set_table,
    versus_table,
)
from blackpoint.sampling.report.report import page_template
from blackpoint.sampling.report.training_page import embedded

TEMPLATE = Path(__file__).with_name("stability.html.j2")
WIDEST_PX = 256
REPORT, RESULTS = "report.html", "results.md"
TITLE = "Are stable noises better noises?"
NOTES = {
    "correlations": "Mean over prompts of the rank correlation over each prompt's noises, with the "
    "95 % bootstrap interval over prompts. Would have shown: the smallest mean Spearman that so "
    "many prompts find with power 0.8.",
    "versus": "Paired over prompts: difference of means with the 95 % bootstrap interval; wins, "
    "ties and losses with the exact binomial test, corrected by Holm over all lines of a method. "
    "Best-of-N searches with the first quality score, which it therefore raises; the others hold "
    "out.",
    "ablation": "Expected {quality} of the best of k noises minus that of a mean noise of the "
    "prompt, over all subsets of the pool; 95 % interval over prompts.",
    "cheaper": "Each score beside the first. Per 1000 NFE: the Spearman before it over what a "
    "score costs, none where its interval is not above 0. NFE of selection counts the runs as far "
    "as the score needs them, the scores, and the winner's remaining steps.",
    "sets": "FID and KID to the reference pictures (lower is better), IS (higher is better); every "
    "set has as many images of every prompt. Differences from the set of random noises with "
    "jackknife intervals over prompts. FID of n images is biased upwards, and "
    "its interval is at this n: compare only here. KID is unbiased.",
    "costs": "NFE: a row that a gradient goes back through counts 3. Seconds as the study ran it, "
    "in its batches; selection's are its share of the pool's, where every image is decoded and "
    "judged. Memory: of a process that does it for one prompt, one noise at a time.",
}


@dataclass
class Section:
    """Pictures and tables of one place."""

    title: str
    captions: list[str] = field(default_factory=list)
    lines: list[tuple[str, list[str]]] = field(default_factory=list)
    tables: list[tuple[str, str, Table]] = field(default_factory=list)


def write_pages(
    config: StabilityStudyConfig,
    founds: Sequence[Found],
    sets: Sequence[Sequence[SetMetric]],
    peaks: Mapping[str, Mapping[str, float]],
    settings: Mapping[str, str],
) -> tuple[Path, list[str]]:
    """Writes report.html and results.md into the study's output.

    Returns the path of the page and the conclusions as lines.
    """
    output, judge = Path(config.output), judge_of(config)
    tables = {found.place: correlations(found) for found in founds}
    choices = {found.place: ablation(found) for found in founds}
    versus: dict[str, list[Versus]] = {}
    sections, conclusions = [], []
    for found, metrics in zip(founds, sets, strict=True):
        place, title = found.place, title_of(found.place)
        versus[title] = comparisons(found)
        captions, lines = gallery(found, output / place.folder / "gallery")
        section = Section(
            title,
            captions,
            [(name, [embedded(path, WIDEST_PX) for path in own]) for name, own in lines],
        )
        section.tables = [
            (
                f"Does stability rank as quality does? ({found.pool.num_pairs} pairs)",
                NOTES["correlations"],
                correlation_table(tables[place]),
            ),
            (
                "Selection and optimisation beside their rivals",
                NOTES["versus"],
                versus_table(versus[title]),
            ),
            (
                "What a cheaper score loses",
                NOTES["cheaper"],
                cheaper_table(cheaper(found), found.quality, name_of(judge)),
            ),
            (
                "From how many noises?",
                NOTES["ablation"].format(quality=name_of(judge)),
                ablation_table(choices[place], judge),
            ),
            ("Cost", NOTES["costs"], cost_table(costs(found, dict(peaks.get(place.folder, {}))))),
        ]
        if metrics:
            section.tables.append(("Sets of images", NOTES["sets"], set_table(metrics)))
        sections.append(section)
        conclusions.append((title, conclusion(place, tables[place], versus[title], found)))
    drawn = {
        "correlations": (
            "Rank correlation of stability and quality",
            "Dots: mean over prompts of the rank correlation within a prompt; lines: 95 % "
            "intervals over prompts. Right of 0, more stable noises paint better.",
            correlation_plot(tables),
        ),
        "ablation": (
            "How many noises to choose from",
            f"Expected {name_of(judge)} of the best of k noises by each score, over all subsets of "
            f"the pool; the last curve is best-of-k by {name_of(founds[0].first_quality)}.",
            ablation_plot(choices, judge),
        ),
        "cost": (
            "Quality against NFE",
            f"Mean {name_of(judge)} over prompts with 95 % intervals. Best-of-N searches with "
            f"{name_of(founds[0].first_quality)}.",
            cost_plot(founds, judge),
        ),
    }
    introduction = introduction_of(config, founds)
    page = page_template(TEMPLATE).render(
        title=TITLE,
        introduction=introduction,
        conclusions=conclusions,
        figures=list(drawn.values()),
        sections=sections,
        settings=settings,
    )
    write_whole(output / REPORT, page)
    for name, (_, _, svg) in drawn.items():
        write_whole(output / f"{name}.svg", svg)
    write_whole(output / RESULTS, markdown(introduction, conclusions, drawn, sections, settings))
    return output / REPORT, [f"{t}: {line}" for t, lines in conclusions for line in lines]


def markdown(
    introduction: Sequence[str],
    conclusions: Sequence[tuple[str, list[str]]],
    drawn: Mapping[str, tuple[str, str, str]],
    sections: Sequence[Section],
    settings: Mapping[str, str],
) -> str:
    """Writes the page as Markdown; its plots are files beside it."""
    parts = [f"# {TITLE}", *introduction, "## What came out"]
    for title, lines in conclusions:
        parts += [f"### {title}", "\n".join(f"- {line}" for line in lines)]
    for name, (heading, caption, _) in drawn.items():
        parts += [f"## {heading}", f"![{heading}]({name}.svg)", caption]
    for section in sections:
        parts.append(f"## {section.title}")
        for heading, note, table in section.tables:
            parts += [f"### {heading}", note, table.markdown()]
    parts += ["## Settings", "\n".join(f"- {name}: {value}" for name, value in settings.items())]
    return "\n\n".join(parts) + "\n"


def introduction_of(config: StabilityStudyConfig, founds: Sequence[Found]) -> list[str]:
    """Says what was asked and measured."""
    count = len(founds[0].pool.prompts)
    pairs = ", ".join(f"{found.pool.num_pairs} ({title_of(found.place)})" for found in founds)
    return [
        "Qi et al. 2024 (arXiv 2407.14041) claim that a noise which inversion finds again, a fixed "
        "point of painting and inverting, gives a better image, and choose or optimise noises by "
        "that. Here stability and quality are measured on the same noises, and selection and "
        "optimisation stand beside what costs as much.",
        f"{count} prompts with {config.num_noises} noises each; (prompt, noise) pairs: {pairs}. "
        "Statistics are over prompts.",
    ]


def judge_of(config: StabilityStudyConfig) -> str:
    """Returns the quality score that plots show: the first that nobody searches with."""
    names = list(config.quality)
    return names[min(1, len(names) - 1)]
