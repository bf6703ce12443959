"""Runs a stability study: its searches, the metrics of its sets, and the report.

OUTPUT/CHECKPOINT/N_steps/   one folder for each search, sets.safetensors, gallery/
OUTPUT/pairs.csv.gz          every (prompt, noise) with its seed and all scores
OUTPUT/chosen.csv            every method's and rival's quality, a row a prompt
OUTPUT/sets.json, peaks.json metrics of sets, peak memory
OUTPUT/report.html, results.md, *.svg
"""

import csv
import gzip
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sampling.evaluation.stability import StabilityStudyConfig
from sampling.evaluation.stability_arms import arms, places
from sampling.evaluation.stability_findings import methods, rivals
from sampling.evaluation.stability_page import write_pages
from sampling.evaluation.stability_rows import Found, Noises, read_found
from sampling.evaluation.stability_sets import check_reference, set_metrics
from sampling.search.judgement import HACKING
from sampling.search.run import search_to_folder
from sampling.tasks import Task
from sampling.whole_file import write_whole

PAIRS, CHOSEN, SETS, PEAKS = "pairs.csv.gz", "chosen.csv", "sets.json", "peaks.json"


def run_searches(config: StabilityStudyConfig, task: Task) -> None:
    """Runs every search that is not done; several processes share each one's prompts."""
    check_reference(config)
    todo = [(place, arm) for place in places(config) for arm in arms(config, place)]
    for number, (place, arm) in enumerate(todo, 1):
        if (Path(arm.config.output) / HACKING).is_file():
            search_to_folder(arm.config, Task())  # refuses a folder of other settings
            continue
        if task.rank == 0:
            print(
                f"{number}/{len(todo)} {place.folder}/{arm.name}: "
                f"{arm.config.budget_nfe} NFE a prompt",
                flush=True,
            )
        search_to_folder(arm.config, task)


def report(
    config: StabilityStudyConfig,
    peaks: Mapping[str, Mapping[str, float]],
    settings: Mapping[str, str],
) -> tuple[Path, list[str]]:
    """Measures the sets and writes rows and report of searches that are done.

    Returns the path of the page and what came out, as lines.
    """
    output = Path(config.output)
    founds = [read_found(config, place) for place in places(config)]
    sets = [set_metrics(found, output / found.place.folder) for found in founds]
    write_whole(output / PAIRS, gzip.compress(_csv(pair_rows(founds)).encode(), mtime=0))
    write_whole(output / CHOSEN, _csv(chosen_rows(founds)))
    found_sets = {
        found.place.folder: [asdict(each) for each in own]
        for found, own in zip(founds, sets, strict=True)
    }
    write_whole(output / SETS, json.dumps(found_sets, indent=1) + "\n")
    return write_pages(config, founds, sets, peaks, settings)


def pair_rows(founds: Sequence[Found]) -> Iterable[dict[str, Any]]:
    """Yields a row for every noise that was painted; scores to 6 digits."""
    for found in founds:
        guided = {f"guidance_{scale:g}": each for scale, each in found.guided.items()}
        for search, noises in {"pool": found.pool, "best_of": found.best_of, **guided}.items():
            for row, prompt in enumerate(noises.prompts):
                yield from _noise_rows(found, search, noises, row, prompt)


def _noise_rows(
    found: Found, search: str, noises: Noises, row: int, prompt: int
) -> Iterable[dict[str, Any]]:
    names = [*found.stability, *found.quality]
    for number, seed in enumerate(noises.seeds[row]):
        yield {
            "checkpoint": found.place.checkpoint,
            "num_steps": found.place.num_steps,
            "search": search,
            "prompt_index": prompt,
            "noise": number,
            "seed": int(seed),
        } | {
            name: f"{noises.scores[name][row, number]:.6g}" if name in noises.scores else ""
            for name in names
        }


def chosen_rows(founds: Sequence[Found]) -> Iterable[dict[str, Any]]:
    """Yields what each method and rival of each method paints for each prompt."""
    for found in founds:
        for method, (nfe, values) in methods(found).items():
            sides = {"": (nfe, values)} | rivals(found, nfe)
            for rival, (price, own) in sides.items():
                for row, prompt in enumerate(found.pool.prompts):
                    yield {
                        "checkpoint": found.place.checkpoint,
                        "num_steps": found.place.num_steps,
                        "method": method,
                        "rival": rival,
                        "nfe": price,
                        "prompt_index": prompt,
                    } | {name: f"{own[name][row]:.6g}" for name in found.quality}


def _csv(rows: Iterable[dict[str, Any]]) -> str:
    rows = list(rows)
    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
