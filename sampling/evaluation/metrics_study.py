"""`blackpoint evaluate`: from a config to images, rows and every metric, in a folder.

evaluation.json    what was sampled; another checkpoint or setting is refused in the same folder
images.parquet     a row an image: prompt, seed, luminance, scores, NFE, seconds
features.parquet   rows of numbers behind the metrics of sets
images/            the first images as PNG
metrics.json, metrics.csv, metrics.md   every metric with n and interval

Several processes share the batches and meet in the folder; which one samples a batch changes
nothing. What is finished is never sampled again, and a metric that is added later is measured on
the images that are kept, or on images sampled once more.
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
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from data.files.errors import UserError
from data.files.whole_file import write_whole
from sampling.choices import PLAIN_FORMATS
from sampling.evaluation.brightness import luminance_range
from sampling.evaluation.metrics import FREE, MetricsConfig
from sampling.evaluation.metrics_measures import (
    DECIMALS,
    Measures,
    kept_dependences,
    load_measures,
    luminance_rows,
    noise_dependences,
)
from sampling.evaluation.metrics_painter import Job, Painter, jobs_of
from sampling.evaluation.metrics_rows import (
    PARTS,
    REFERENCE,
    REFERENCES,
    SETTINGS,
    Key,
    Row,
    carried_columns,
    column_digest,
    finished_keys,
    join_rows,
    read_rows,
    write_rows,
)
from sampling.evaluation.metrics_summary import JSON_FILE, Summary, summarise, write_summary
from sampling.evaluation.reference_set import measure_reference
from sampling.memory import GB, peak_bytes
from sampling.pictures import write_png
from sampling.precision import set_tf32
from sampling.prompts import Prompt, read_prompt_set
from sampling.sample import find_device
from sampling.search.folder import FORMATS, settled_formats
from sampling.search.parts import forget_stop, share_of, tell_stop, wait_until
from sampling.tasks import Task, this_task

log = logging.getLogger(__name__)

IMAGE_COLUMN = "luminance"


def evaluate_to_folder(config: MetricsConfig, task: Task | None = None) -> Summary | None:
    """Samples and measures what is missing; returns the metrics, None in all but the first process.

    Raises UserError for wrong input before anything is written.
    """
    task, since = task or this_task(), time.time() - 1
    output = Path(config.output)
    prompts = read_prompt_set(config.prompts, config.limit, config.offset)
    for prompt in prompts:
        luminance_range(prompt)  # refuses now what would else be found after hours
    jobs = jobs_of(config, prompts)
    if config.sets.is_set and len(jobs) < 2:
        raise UserError(
            "sets: metrics of sets need at least two images, and one prompt with num_images=1 "
            "makes one; raise num_images, give more prompts, or leave sets out"
        )
    settings = check_folder(config, output, prompts)
    device = find_device(config.device, task)
    asked = {"dtype": config.dtype, "tf32": config.tf32}
    refusal = None
    try:
        formats = settled_formats(
            asked, output / SETTINGS, device, partial(log.warning, "note: %s")
        )
        settings |= formats
        config = replace(config, dtype=formats["dtype"], tf32=formats["tf32"])
        set_tf32(formats["tf32"])
    except UserError as error:
        if not (output / JSON_FILE).is_file():
            raise
        refusal = error  # it is finished: there may be nothing to compute
    measures = load_measures(config, prompts, device)
    if refusal is not None and not is_complete(config, measures, jobs, prompts):
        raise refusal
    geneval = read_geneval_file(config)
    forget_stop(output, task)
    try:
        painter = Painter(config, settings, prompts, device)
        reference = None
        if task.rank == 0 and config.sets.reference is not None:  # who needs it, and refuses early
            reference = measure_reference(config, measures, *painter.size)
        write_missing(config, measures, painter, jobs, task)
        if task.rank > 0:
            return None
        dependence = kept_dependences(config, prompts)
        if dependence is None:
            dependence = noise_dependences(config, painter.model, prompts)
        if task.count > 1:
            keys = {job.key for job in jobs}
            wait_until(lambda: finished_keys(output, measures.columns) >= keys, output, since)
            write_missing(config, measures, painter, jobs, Task())  # what another could not measure
    except Exception as error:
        tell_stop(output, task, str(error) or type(error).__name__)
        raise

    columns = known_columns(output, measures)
    rows = read_rows(output, columns)
    wanted = {job.key: rows[job.key] for job in jobs}
    join_rows(output, wanted, columns)
    shutil.rmtree(output / PARTS, ignore_errors=True)
    if reference is not None:
        luminances = {"image": reference.luminance, "border": reference.border_luminance}
        rounded = {
            k: [round(value, DECIMALS) for value in v.tolist()] for k, v in luminances.items()
        }
        write_whole(output / REFERENCE, json.dumps(rounded) + "\n")
    found = summarise(config, list(wanted.values()), measures, reference, dependence, geneval)
    notes = reference.notes(*painter.size, len(jobs)) if reference is not None else []
    found = replace(found, notes=(*painter.notes, *found.notes, *notes))
    write_summary(output, found)
    return found


def is_complete(
    config: MetricsConfig, measures: Measures, jobs: Sequence[Job], prompts: Sequence[Prompt]
) -> bool:
    """Whether nothing is left to be sampled or measured."""
    rows = read_rows(Path(config.output), known_columns(Path(config.output), measures))
    return (
        not _missing(config, rows, jobs, measures) and kept_dependences(config, prompts) is not None
    )


def known_columns(output: Path, measures: Measures) -> dict[str, str]:
    """Returns every measured column that stays: what is asked for, and what was before."""
    return measures.asked | carried_columns(output, measures.asked)


def write_missing(
    config: MetricsConfig, measures: Measures, painter: Painter, jobs: Sequence[Job], task: Task
) -> None:
    """Samples and measures the batches of this process that are not finished."""
    output = Path(config.output)
    columns = known_columns(output, measures)
    have = read_rows(output, columns)
    todo = {job.key for job in _missing(config, have, jobs, measures)}
    if todo and task.rank == 0:
        (output / JSON_FILE).unlink(missing_ok=True)  # it says that all is done
    batches = [
        jobs[start : start + config.batch_size] for start in range(0, len(jobs), config.batch_size)
    ]
    mine = [batch for batch in share_of(batches, task) if any(job.key in todo for job in batch)]
    if not mine:
        return
    measured_by = column_digest(sorted(measures.columns.items()))
    bars = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bars) as progress:
        bar = progress.add_task("evaluating", total=sum(map(len, mine)))
        for batch in mine:
            rows = batch_rows(config, measures, painter, batch, have)
            rows = [dict.fromkeys(measures.asked) | row for row in rows]
            path = output / PARTS / f"{batch[0].number:08d}-{measured_by}.parquet"
            write_rows(path, rows, columns)
            progress.advance(bar, len(batch))


def batch_rows(
    config: MetricsConfig,
    measures: Measures,
    painter: Painter,
    batch: Sequence[Job],
    have: dict[Key, Row],
) -> list[Row]:
    """Returns the rows of a batch, of what it lacks; keeps the first images as files."""
    output = Path(config.output)
    rows: list[Row] = [dict(have.get(job.key, {})) for job in batch]
    is_new = any(IMAGE_COLUMN not in row for row in rows)
    files = [output / job.file for job in batch]
    is_painted = is_new or not all(file.is_file() for file in files)
    if is_painted:
        painter.load()  # its seconds are not the batch's
    started_s, before = time.perf_counter(), painter.num_rows
    if is_painted:
        pixels = painter.paint(batch)
    else:
        pixels = torch.stack([pil_to_tensor(Image.open(file)).contiguous() for file in files])
    sampled_s, num_rows = time.perf_counter() - started_s, painter.num_rows - before
    prompts = [job.prompt for job in batch]
    if is_new:
        for row, job, luminance in zip(rows, batch, luminance_rows(pixels, prompts), strict=True):
            row |= {
                "prompt_index": job.prompt.index,
                "image": job.image,
                "prompt": job.prompt.text,
                "category": job.prompt.category,
                "seed": job.seed,
                "file": None,
                "device": painter.device.type,
                "dtype": config.dtype,
                "tf32": config.tf32,
                **luminance,
            }
    for row, job, picture in zip(rows, batch, pixels, strict=True):
        if row["file"] is None and _is_kept(config, job):
            row["file"] = _keep(output, job, picture)
    wanted = set().union(*(measures.missing(row) for row in rows))
    for row, measured in zip(rows, measures.measure(pixels, prompts, wanted), strict=True):
        row |= measured
        row["nfe"] = row.get("nfe") or num_rows / len(batch)
        row["sampling_s"] = row.get("sampling_s") or round(sampled_s / len(batch), 5)
    measured_s = time.perf_counter() - started_s - sampled_s
    for row in rows:
        row["measuring_s"] = round((row.get("measuring_s") or 0) + measured_s / len(batch), 5)
        row["peak_gb"] = round(max(row.get("peak_gb") or 0, peak_bytes(painter.device) / GB), 4)
    return rows


def check_folder(config: MetricsConfig, output: Path, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Returns the settings of the images; raises UserError where `output` holds something else."""
    settings = {key: value for key, value in asdict(config).items() if key not in FREE}
    settings["prompts_digest"] = column_digest(
        [[p.index, p.text, p.category, str(p.metadata)] for p in prompts]
    )
    path = output / SETTINGS
    if not path.is_file():
        if output.exists() and (output.is_file() or any(_others(output))):
            raise UserError(
                f"output={output} holds something that is no evaluation; name a new folder"
            )
        return settings
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is not JSON; choose another output") from None
    now = json.loads(json.dumps(settings))
    for key in sorted(now):
        default = PLAIN_FORMATS[key] if key in FORMATS else getattr(MetricsConfig, key, None)
        there = saved.get(key, default)
        if there != now[key] and (key not in FORMATS or now[key] != "auto"):
            what = (
                "other prompts"
                if key == "prompts_digest"
                else f"{key}: {there} there, {now[key]} now"
            )
            raise UserError(
                f"output={output} holds an evaluation with other settings ({what}); choose another "
                "output, or continue it with its own"
            )
    settings["weights_digest"] = saved.get("weights_digest")
    return settings


def read_geneval_file(config: MetricsConfig) -> Any:
    """Reads GenEval's scores where a file is given."""
    from sampling.evaluation.geneval import read_geneval

    return None if config.geneval is None else read_geneval(config.geneval, seed=config.seed)


def _missing(
    config: MetricsConfig, have: dict[Key, Row], jobs: Sequence[Job], measures: Measures
) -> list[Job]:
    """Lists what has to be sampled, measured or, since more pictures are wanted now, kept."""
    return [
        job
        for job in jobs
        if IMAGE_COLUMN not in (row := have.get(job.key, {}))
        or measures.missing(row)
        or (row["file"] is None and _is_kept(config, job))
    ]


def _is_kept(config: MetricsConfig, job: Job) -> bool:
    return config.keep_images is None or job.number < config.keep_images


def _keep(output: Path, job: Job, pixels: Tensor) -> str:
    write_png(output / job.file, Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    return job.file


def _others(output: Path) -> list[Path]:
    """Lists what lies there beside files that are being written, and references."""
    return [p for p in output.iterdir() if not p.name.startswith(".") and p.name != REFERENCES]
