"""Identity of a run's base, wherever it lies: digests of its weights and configs.

    UNet, VAE, text encoder, tokenizer   sampling/checkpoints/fingerprint.py, stamps of the files
    betas, scaling_factor, pixels        by their values

A stamp, size and time of change of a file (data/shards/shard_digest.py), is a fast first look:
where those of all files of a part are as they were, its digest is taken to be, too. So a base is
read once.
"""

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from blackpoint.data.shards.shard_digest import file_stamp, settled
from blackpoint.sampling.checkpoints.fingerprint import (
    text_encoder_digest,
    tokenizer_digest,
    tokenizer_settings,
    unet_digest,
    vae_digest,
)
from blackpoint.sampling.checkpoints.loading import TOKENIZERS, text_encoders_of
from blackpoint.sampling.checkpoints.resolve import Resolved, resolve
from blackpoint.sampling.checkpoints.scheduler_config import read_scheduler_config
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.pixels.folder import PixelForm
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.train.config.config import TrainConfig

UNET, VAE, TEXT_ENCODER, TOKENIZER = "UNet", "VAE", "text encoder", "tokenizer"
BETAS, SCALE, PIXELS = "betas", "scaling_factor", "pixels"
BETA_TOLERANCE = 1e-6
"""Relative: processors differ in the last bit of a schedule that is computed."""


class Part(NamedTuple):
    """One part of a base: the files that it is read from, and its digest."""

    files: list[Path]
    digest: Callable[[], str]


def base_identity(
    config: TrainConfig,
    model: DiffusionModel | None = None,
    before: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Returns the identity of a run's base, for json; {} where a run starts from nothing else.

    `model` is the base where it is loaded already, `before` the identity that was recorded: what
    looks as it did then is not read again.
    """
    name = config.checkpoint or config.model.text_encoder
    if name is None:
        return {}
    if model is not None and model.pipeline is not None and not Path(name).exists():
        resolved = Resolved(model.pipeline)  # not the hub again
    else:
        resolved = resolve(name, single_file=config.single_file)
    identity, before = dict[str, Any](), before or {}
    start_s, read = time.perf_counter(), set[Path]()
    for name_of_part, part in _parts(resolved, with_unet=config.checkpoint is not None).items():
        stamps = {f"{p.parent.name}/{p.name}": settled(file_stamp(p.stat())) for p in part.files}
        recorded = before.get(name_of_part, {})
        if recorded.get("stamps") == stamps and all(stamps.values()):
            identity[name_of_part] = recorded
            continue
        read |= set(part.files)
        identity[name_of_part] = {"digest": part.digest(), "stamps": stamps}
    if num_bytes := sum(path.stat().st_size for path in read):
        say(
            f"read the base to know it by its content, {num_bytes / 1e9:.3g} GB in "
            f"{time.perf_counter() - start_s:.1f} s; not again while its files keep size and time"
        )
    if config.checkpoint is not None:
        identity |= _values(resolved, name)
    return identity


def base_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns the names of the parts that are others than before."""
    names = [
        part
        for part in (UNET, VAE, TOKENIZER, TEXT_ENCODER)
        if before.get(part, {}).get("digest") != now.get(part, {}).get("digest")
    ]
    if TOKENIZER in names and TEXT_ENCODER in names:
        names.remove(TEXT_ENCODER)  # its digest takes the tokenizer in
    if not _close(before.get(BETAS, []), now.get(BETAS, [])):
        names.append(f"{BETAS} (scheduler)")
    if before.get(SCALE) != now.get(SCALE):
        names.append("scaling_factor (vae/config.json)")
    if before.get(PIXELS) != now.get(PIXELS):
        names.append("codec or classes (model_index.json)")
    return names


def _parts(resolved: Resolved, with_unet: bool) -> dict[str, Part]:
    pipeline, parts = resolved.pipeline, dict[str, Part]()
    index = pipeline.read_json("model_index.json")
    pixels = PixelForm.of(index, pipeline.path)
    if with_unet:
        weights = (
            [Path(resolved.checkpoint)] if resolved.checkpoint else pipeline.weight_files("unet")
        )
        files = [*weights, *pipeline.config_files("unet")]
        parts[UNET] = Part(files, lambda: unet_digest(resolved))
    if with_unet and pixels is None:
        files = [*pipeline.weight_files("vae"), *pipeline.config_files("vae")]
        parts[VAE] = Part(files, lambda: vae_digest(pipeline))
    if pixels is None or pixels.has_text:
        encoders = text_encoders_of(index)
        named = [*encoders, *(TOKENIZERS[part] for part in encoders)]
        words = [file for part in named for file in pipeline.config_files(part)]
        settings = functools.cache(lambda: tokenizer_settings(pipeline))
        files = [file for part in encoders for file in pipeline.weight_files(part)] + words
        parts[TEXT_ENCODER] = Part(files, lambda: text_encoder_digest(pipeline, settings()))
        parts[TOKENIZER] = Part(words, lambda: tokenizer_digest(settings()))
    return parts


def _values(resolved: Resolved, name: str) -> dict[str, Any]:
    pipeline = resolved.pipeline
    scheduler = resolved.scheduler_config or pipeline.scheduler("epsilon")
    betas = NoiseSchedule.from_diffusers(read_scheduler_config(scheduler)).betas.tolist()
    values: dict[str, Any] = {BETAS: [float(f"{beta:.8g}") for beta in betas]}
    pixels = PixelForm.of(pipeline.read_json("model_index.json"), name)
    if pixels is None:
        values[SCALE] = pipeline.read_json("vae/config.json").get("scaling_factor")
    else:
        values[PIXELS] = [pixels.codec.kind, pixels.codec.patch, *pixels.classes]
    return values


def _close(some: Iterable[float], others: Iterable[float]) -> bool:
    some, others = list(some), list(others)
    return len(some) == len(others) and all(
        math.isclose(one, other, rel_tol=BETA_TOLERANCE)
        for one, other in zip(some, others, strict=True)
    )
