"""Runs a stability study: its searches, the metrics of its sets, and the report.

OUTPUT/CHECKPOINT/N_steps/   one folder for each search, sets.safetensors, gallery/
OUTPUT/pairs.csv.gz          every (prompt, noise) with its seed and all scores
OUTPUT/chosen.csv            every method's and rival's quality, a row a prompt
OUTPUT/sets.json, peaks.json metrics of sets, peak memory
OUTPUT/report.html, results.md, *.svg
"""

import gzip
import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.data.files.plain import csv_text, finite
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.evaluation.stability import StabilityStudyConfig
from blackpoint.sampling.evaluation.stability_arms import Arm, arms, places
from blackpoint.sampling.evaluation.stability_findings import methods, rivals
from blackpoint.sampling.evaluation.stability_page import write_pages
from blackpoint.sampling.evaluation.stability_rows import Found, Noises, read_found
from blackpoint.sampling.evaluation.stability_sets import load_reference, set_metrics
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.prompts.prompt_set import read_prompt_set
from blackpoint.sampling.runtime.sharing import stopped
from blackpoint.sampling.runtime.tasks import Task
from blackpoint.sampling.sample import find_device
from blackpoint.sampling.search.folder import SETTINGS, check_folder, settled_formats
from blackpoint.sampling.search.judge import HACKING
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.sampling.search.setup import MAX_CHECKED, note
from blackpoint.sampling.verifiers.load import load_verifiers
from blackpoint.sampling.verifiers.models.image_model import load_classifier, load_features
from blackpoint.sampling.verifiers.reference import reference_pictures
from blackpoint.sampling.verifiers.verifier import of_images

PAIRS, CHOSEN, SETS, PEAKS = "pairs.csv.gz", "chosen.csv", "sets.json", "peaks.json"


def run_searches(config: StabilityStudyConfig, task: Task) -> None:
    """Runs every search that is not done; several processes share each one's prompts."""
    since = time.time() - 1
    todo = [(place, arm) for place in places(config) for arm in arms(config, place)]
    check_study(config, [arm for _, arm in todo])
    for number, (place, arm) in enumerate(todo, 1):
        for _, each in todo:  # another process may be ahead
            if reason := stopped(Path(each.config.output), since):
                raise RunFailed(reason)
        if (Path(arm.config.output) / HACKING).is_file():
            continue
        if task.rank == 0:
            print(
                f"{number}/{len(todo)} {place.folder}/{arm.name}: "
                f"{arm.config.budget_nfe} NFE a prompt",
                flush=True,
            )
        search_to_folder(arm.config, task, since)


def check_study(config: StabilityStudyConfig, searches: Sequence[Arm]) -> None:
    """Raises UserError for what would else be found after hours: folders, models, verifiers."""
    prompts = read_prompt_set(config.prompts, config.limit, config.offset)
    for arm in searches:
        check_folder(arm.config, Path(arm.config.output), prompts)
    outputs = [Path(arm.config.output) for arm in searches]
    if not all((output / HACKING).is_file() for output in outputs):
        asked, device = {"dtype": config.dtype, "tf32": config.tf32}, find_device(config.device)
        for output in outputs:  # what is left is not run in other formats than what is done
            settled_formats(asked, output / SETTINGS, device, note)
    if config.sets.reference is not None:
        reference_pictures(config.sets.reference, "sets.reference")
    for one, load in (
        (config.sets.features, load_features),
        (config.sets.classifier, load_classifier),
    ):
        if one.is_set:
            load(one.checkpoint, one.module, torch.device("cpu"), torch.float32)
    named = {name: replace(each, name=name) for name, each in config.quality.items()}
    quality = of_images(load_verifiers(named, torch.device("cpu")))
    for verifier in quality.values():
        check = getattr(verifier, "check_prompt", None)
        for prompt in itertools.islice(prompts, MAX_CHECKED if check else 0):
            check(prompt.text)  # type: ignore[misc]
    name = next(iter(quality))
    if "reward" in config.optimisations and not quality[name].differentiable:
        raise UserError(
            f"quality.{name}: gives no gradient, and optimisations=[reward] takes that of the "
            "first quality score; leave reward out, or put another score first"
        )
    for name, checkpoint in config.checkpoints.items():
        try:
            DiffusionModel.load(checkpoint, with_unet=False).process.check_sound()
        except UserError as error:
            raise UserError(f"checkpoints.{name}: {error}") from None


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
    reference = load_reference(config)
    sets = [set_metrics(found, output / found.place.folder, reference) for found in founds]
    write_whole(output / PAIRS, gzip.compress(csv_text(pair_rows(founds)).encode(), mtime=0))
    write_whole(output / CHOSEN, csv_text(chosen_rows(founds)))
    found_sets = {
        found.place.folder: [finite(asdict(each)) for each in own]
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
