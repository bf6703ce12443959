"""Runs the black-point study: samples what is missing, measures it, keeps one row per image.

A finished chunk of images is one file of rows, so a study that is stopped continues where it was; a
study that is asked for more images keeps those that it has. Chunks are shared among processes.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.evaluation.black_point import (
    BlackPointConfig,
    Caption,
    Captions,
    Cell,
    image_path,
    study_cells,
    wanted_keys,
)
from blackpoint.sampling.evaluation.luminance import border_luminance, image_luminance
from blackpoint.sampling.report.rows import DATA, DECIMALS, Row, read_rows, write_rows
from blackpoint.sampling.runtime.pictures import to_picture
from blackpoint.scripts.miniature.digit_reader import DigitReader

CHUNK_IMAGES = 50


@dataclass(frozen=True)
class Chunk:
    """Some images of one cell of one checkpoint: the unit of work."""

    checkpoint: str
    cell: Cell
    indices: tuple[int, ...]


class Painter(Protocol):
    """What the study needs of a model."""

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        """Samples like `DiffusionModel.sample`."""


Load = Callable[[str], Painter]


@dataclass(frozen=True)
class Identity:
    """Which weights and process a checkpoint's name stands for."""

    fingerprint: str
    unsound: str | None = None
    """What cannot work in its process; shown in every report."""


def load_painter(checkpoint: str) -> Painter:
    """Loads a checkpoint for sampling, on the GPU where there is one."""
    from blackpoint.sampling.model import DiffusionModel

    model = DiffusionModel.load(checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
    model.unet.to(memory_format=torch.channels_last)  # 1.2 to 1.3x the images/s on a CPU
    return model


def measure(images: Tensor, reader: DigitReader) -> Iterator[tuple[float, float, int]]:
    """Yields border luminance, image luminance and the digit read, for images (N, 3, H, W) in [0,
    1]."""
    columns = (border_luminance(images), image_luminance(images), reader.read(images))
    for border, whole, digit in zip(*(column.tolist() for column in columns), strict=True):
        yield round(border, DECIMALS), round(whole, DECIMALS), digit


def reference_rows(images: Tensor, captions: Sequence[Caption], reader: DigitReader) -> list[Row]:
    """Measures real images, uint8 (N, 3, H, W), as rows of the checkpoint `data`."""
    measured = measure(images.float() / 255, reader)
    rows = []
    for index, ((prompt, digit), values) in enumerate(zip(captions, measured, strict=True)):
        rows.append(
            Row(DATA, "real", index, "real", prompt, -1, 1.0, 0.0, 0, *values[:2], digit, values[2])
        )
    return rows


def paint_chunk(
    painter: Painter, reader: DigitReader, config: BlackPointConfig, chunk: Chunk
) -> list[Row]:
    """Samples and measures one chunk; keeps the first images of the cell as PNG files."""
    cell = chunk.cell
    captions = [cell.captions[index % len(cell.captions)] for index in chunk.indices]
    seeds = [config.seed + index for index in chunk.indices]
    images = painter.sample(
        [prompt for prompt, _ in captions],
        seeds,
        num_steps=config.num_steps,
        guidance_scale=cell.guidance_scale,
        guidance_rescale=cell.guidance_rescale,
        sampler=config.sampler,
        batch_size=config.batch_size,
        allow_unsound=config.allow_unsound,
    ).cpu()
    if not torch.isfinite(images).all():
        raise RunFailed(f"{chunk.checkpoint} {cell.name}: sampled images hold NaN or infinity")
    rows = []
    measured = measure(images, reader)
    for index, (prompt, digit), seed, values in zip(
        chunk.indices, captions, seeds, measured, strict=True
    ):
        settings = (prompt, seed, cell.guidance_scale, cell.guidance_rescale, config.num_steps)
        rows.append(
            Row(
                chunk.checkpoint,
                cell.name,
                index,
                cell.group,
                *settings,
                *values[:2],
                digit,
                values[2],
            )
        )
        if index < config.gallery_images:
            path = image_path(Path(config.output), chunk.checkpoint, cell.name, index)
            path.parent.mkdir(parents=True, exist_ok=True)
            to_picture(images[index - chunk.indices[0]]).save(path)
    return rows


def run_study(
    config: BlackPointConfig,
    captions: Captions,
    reference: list[Row],
    identities: Mapping[str, Identity],
    load: Load = load_painter,
) -> list[Row]:
    """Samples what is missing and returns all rows, those of the real images first.

    `identities` has an entry for each checkpoint: rows of other weights under the same name are
    refused.
    """
    output = Path(config.output)
    reader = DigitReader.load(config.digit_reader)
    require_same_study(config, identities)
    rows = finished_rows(output)
    wanted = wanted_keys(config, captions)
    have = {row.key for row in rows} & wanted
    chunks = [
        chunk
        for name in config.checkpoints
        for cell in study_cells(config, captions, name)
        for chunk in missing_chunks(
            name, cell, {key[2] for key in have if key[:2] == (name, cell.name)}
        )
    ]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("images", total=len(wanted), completed=len(have))
        for new_rows in painted(chunks, config, reader, load):
            first = new_rows[0]
            write_rows(
                output / "rows" / first.checkpoint / f"{first.cell}.{first.index:06d}.csv", new_rows
            )
            rows += new_rows
            progress.update(
                task, advance=len(new_rows), description=f"{first.checkpoint} {first.cell}"
            )
    return reference + [row for row in rows if row.key in wanted]


def is_complete(config: BlackPointConfig, captions: Captions) -> bool:
    """Says whether every image of the study is sampled."""
    have = {row.key for row in finished_rows(Path(config.output))}
    return wanted_keys(config, captions) <= have


def painted(
    chunks: list[Chunk], config: BlackPointConfig, reader: DigitReader, load: Load
) -> Iterator[list[Row]]:
    """Yields the rows of each chunk as it is finished, here or in processes of its own."""
    num_processes = min(config.num_processes, len(chunks))
    if num_processes <= 1:
        painter, loaded = None, None
        for chunk in chunks:
            if painter is None or loaded != chunk.checkpoint:
                painter, loaded = load(config.checkpoints[chunk.checkpoint]), chunk.checkpoint
            yield paint_chunk(painter, reader, config, chunk)
        return
    num_threads = max(1, torch.get_num_threads() // num_processes)
    arguments = (config, load, num_threads)
    with ProcessPoolExecutor(num_processes, get_context("spawn"), _start_worker, arguments) as pool:
        futures = [pool.submit(_paint_in_worker, chunk) for chunk in chunks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class _Worker:
    config: BlackPointConfig
    load: Load
    reader: DigitReader
    loaded: str | None = None
    painter: Painter | None = None


_worker: _Worker | None = None


def _start_worker(config: BlackPointConfig, load: Load, num_threads: int) -> None:
    global _worker
    torch.set_num_threads(num_threads)
    _worker = _Worker(config, load, DigitReader.load(config.digit_reader))


def _paint_in_worker(chunk: Chunk) -> list[Row]:
    assert _worker is not None
    if _worker.painter is None or _worker.loaded != chunk.checkpoint:
        _worker.painter = _worker.load(_worker.config.checkpoints[chunk.checkpoint])
        _worker.loaded = chunk.checkpoint
    return paint_chunk(_worker.painter, _worker.reader, _worker.config, chunk)


def missing_chunks(checkpoint: str, cell: Cell, done: set[int]) -> list[Chunk]:
    """Cuts what a cell still lacks into runs of consecutive indices of at most CHUNK_IMAGES."""
    chunks: list[Chunk] = []
    for start in range(0, cell.num_images, CHUNK_IMAGES):
        stop = min(start + CHUNK_IMAGES, cell.num_images)
        run: list[int] = []
        for index in range(start, stop + 1):
            if index < stop and index not in done:
                run.append(index)
            elif run:
                chunks.append(Chunk(checkpoint, cell, tuple(run)))
                run = []
    return chunks


def finished_rows(output: Path) -> list[Row]:
    """Reads the rows of every finished chunk in a study's folder."""
    return [row for path in sorted((output / "rows").glob("*/*.csv")) for row in read_rows(path)]


def require_same_study(config: BlackPointConfig, identities: Mapping[str, Identity]) -> None:
    """Records what the rows depend on in study.json; raises UserError where rows of another study
    lie there."""
    path = Path(config.output) / "study.json"
    settings = {
        "num_steps": config.num_steps,
        "sampler": config.sampler,
        "guidance_rescale": config.guidance_rescale,
        "seed": config.seed,
    }
    known: dict[str, str] = {}
    notes: list[str] = []
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        known, notes = before["checkpoints"], before["notes"]
        changed = [
            name for name, value in settings.items() if before["settings"].get(name) != value
        ]
        changed += [
            name
            for name, each in identities.items()
            if known.get(name, each.fingerprint) != each.fingerprint
        ]
        if changed:
            raise UserError(
                f"output={config.output} holds rows of another study: {', '.join(changed)} changed "
                "since; name another output, or remove that folder"
            )
    notes += [
        f"{name} is unsound: {each.unsound}" for name, each in identities.items() if each.unsound
    ]
    content = {
        "settings": settings,
        "read_guidance_scale": config.read_guidance_scale,
        "checkpoints": known | {name: each.fingerprint for name, each in identities.items()},
        "notes": list(dict.fromkeys(notes)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
