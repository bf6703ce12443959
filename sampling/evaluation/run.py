"""`blackpoint evaluate`: from a config to images, rows and every metric, in a folder.

evaluation.json    what was sampled; another checkpoint or setting is refused in the same folder
images.parquet     one row per image: prompt, seed, luminance, scores, NFE, seconds
features.parquet   rows of numbers behind the metrics of sets
images/            the first images as PNG
metrics.json, metrics.csv, metrics.md   every metric with n and interval

Several processes share the batches and meet in the folder; which one samples a batch changes
nothing.
"""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.plain import json_object
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.choices import PLAIN_FORMATS
from blackpoint.sampling.evaluation.config import (
    RESULT_INVARIANT_KEYS,
    MetricsConfig,
    metric_keys,
    metrics_of,
)
from blackpoint.sampling.evaluation.generate import ImageGenerator, jobs_of
from blackpoint.sampling.evaluation.image_rows import ImageRows
from blackpoint.sampling.evaluation.measures import DECIMALS, Measures, load_measures
from blackpoint.sampling.evaluation.metric import FEATURE_COLUMN, Evaluated, MetricConfig
from blackpoint.sampling.evaluation.metrics.noise_invariance import KeptDependences
from blackpoint.sampling.evaluation.metrics.reference_set import Reference, measure_reference
from blackpoint.sampling.evaluation.rows import (
    PARTS,
    REFERENCE,
    REFERENCES,
    SETTINGS,
    Row,
    column_digest,
    join_rows,
)
from blackpoint.sampling.evaluation.summary import JSON_FILE, Summary, summarise, write_summary
from blackpoint.sampling.prompts.prompt_set import Prompt, read_prompt_set
from blackpoint.sampling.runtime.precision import FORMATS, set_tf32, settled_formats
from blackpoint.sampling.runtime.sharing import telling_stop, wait_until
from blackpoint.sampling.runtime.tasks import Task, this_task
from blackpoint.sampling.sample import find_device

log = logging.getLogger(__name__)


def evaluate_to_folder(config: MetricsConfig, task: Task | None = None) -> Summary | None:
    """Samples and measures missing images; returns the metrics, None in all but the first process.

    Raises UserError for wrong input before anything is written.
    """
    task, since = task or this_task(), time.time() - 1
    output = Path(config.output)
    prompts = read_prompt_set(config.prompts, config.limit, config.offset)
    jobs, metrics = jobs_of(prompts, config.num_images, config.seed), metrics_of(config)
    for metric in metrics:
        metric.check(prompts, len(jobs))
    settings = check_folder(config, output, prompts)
    device = find_device(config.device, task)
    config, refusal = _with_formats(config, device)
    settings |= {name: getattr(config, name) for name in FORMATS}
    measures = load_measures(metrics, prompts, device)
    images = ImageRows(output, jobs, measures, config.batch_size, config.keep_images)
    invariance = KeptDependences(output, config, [prompt.text for prompt in prompts])
    if refusal and not (images.is_complete() and invariance.read() is not None):
        raise refusal
    with telling_stop(output, task):
        generator = ImageGenerator(config, settings, prompts, device)
        reference = _reference(config, measures, generator.size) if task.rank == 0 else None
        images.write_missing(generator, task)
        if task.rank > 0:
            return None
        dependence = invariance.read()
        if dependence is None:
            dependence = invariance.measure(generator.model)
        if task.count > 1:
            wait_until(images.are_finished, output, since)
            images.write_missing(generator, Task())  # what another could not measure
    evaluated = Evaluated(_joined(images), reference, dependence, config.seed)
    return _summary(config, metrics, measures, evaluated, generator)


def check_folder(config: MetricsConfig, output: Path, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Returns the settings of the images; raises UserError where `output` holds something else."""
    left_out = {*metric_keys(type(config)), *RESULT_INVARIANT_KEYS}
    settings = {key: value for key, value in asdict(config).items() if key not in left_out}
    settings["prompts_digest"] = column_digest(
        [[p.index, p.text, p.category, str(p.metadata)] for p in prompts]
    )
    path = output / SETTINGS
    if not path.is_file():
        entries = list(output.iterdir()) if output.is_dir() else []
        others = [p for p in entries if not p.name.startswith(".") and p.name != REFERENCES]
        if output.is_file() or others:
            raise UserError(
                f"output={output} holds something that is no evaluation; name a new folder"
            )
        return settings
    try:
        saved = json_object(path.read_bytes(), path)
    except UserError as error:
        raise UserError(f"{error}, or choose another output") from None
    now = json.loads(json.dumps(settings))
    defaults: Any = OmegaConf.to_container(OmegaConf.structured(MetricsConfig))
    for key in sorted(now):
        default = PLAIN_FORMATS[key] if key in FORMATS else defaults.get(key)
        there = saved.get(key, default)
        if there != now[key] and (key not in FORMATS or now[key] != "auto"):
            what = f"{key}: {there} there, {now[key]} now"
            what = "other prompts" if key == "prompts_digest" else what
            raise UserError(
                f"output={output} holds an evaluation with other settings ({what}); choose another "
                "output, or continue it with its own"
            )
    settings["weights_digest"] = saved.get("weights_digest")
    return settings


def _with_formats(
    config: MetricsConfig, device: torch.device
) -> tuple[MetricsConfig, UserError | None]:
    """Settles the number formats; returns why they cannot be, where the evaluation is finished:
    there may be nothing to compute."""
    output = Path(config.output)
    asked = {name: getattr(config, name) for name in FORMATS}
    try:
        say = partial(log.warning, "note: %s")
        formats = settled_formats(asked, output / SETTINGS, device, say)
        set_tf32(formats["tf32"])
    except UserError as error:
        if not (output / JSON_FILE).is_file():
            raise
        return config, error
    return replace(config, **formats), None


def _reference(
    config: MetricsConfig, measures: Measures, size: tuple[int, int]
) -> Reference | None:
    if config.sets.reference is None:
        return None
    folder = Path(config.reference_cache or Path(config.output) / REFERENCES)
    network = measures.asked.get(FEATURE_COLUMN), measures.of_column(FEATURE_COLUMN)
    return measure_reference(config.sets.reference, folder, *network, size, config.batch_size)


def _joined(images: ImageRows) -> list[Row]:
    """Joins the parts of all processes; returns the rows that are asked for, in order."""
    rows = images.read()
    wanted = {job.key: rows[job.key] for job in images.jobs}
    join_rows(images.folder, wanted, images.columns)
    shutil.rmtree(images.folder / PARTS, ignore_errors=True)
    return [wanted[key] for key in sorted(wanted)]


def _summary(
    config: MetricsConfig,
    metrics: Sequence[MetricConfig],
    measures: Measures,
    evaluated: Evaluated,
    generator: ImageGenerator,
) -> Summary:
    """Computes the metrics and writes them, with the luminances of the references beside."""
    output, reference = Path(config.output), evaluated.reference
    notes: list[str] = []
    if reference is not None:
        luminances = {"image": reference.luminance, "border": reference.border_luminance}
        rounded = {k: [round(x, DECIMALS) for x in v.tolist()] for k, v in luminances.items()}
        write_whole(output / REFERENCE, json.dumps(rounded) + "\n")
        notes = reference.notes(*generator.size, len(evaluated.rows))
    skipped = measures.skipped(evaluated)
    summary = summarise(metrics, evaluated, skipped, config.brightness.where, generator.notes)
    summary = replace(summary, notes=(*summary.notes, *notes))
    write_summary(output, summary)
    return summary
