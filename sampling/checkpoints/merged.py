"""A checkpoint with the adapters merged in that a user names: what is read of it is merged.

Digests, formats and fingerprints follow the merged weights, for they are what is read.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.fingerprint import unet_digest
from blackpoint.sampling.checkpoints.ldm_keys import published_text_name, unet_modules
from blackpoint.sampling.checkpoints.loading import (
    Pipeline,
    empty_unet,
    is_ckpt,
    text_encoders_of,
)
from blackpoint.sampling.checkpoints.resolve import (
    HUB_ID,
    Resolved,
    adapters_of,
    download_lora,
    last_checkpoint,
)
from blackpoint.sampling.choices import LoraFile, PredictionType, Weights
from blackpoint.sampling.lora.adapters import Applied, Lora, MergedWeights, shapes_of
from blackpoint.sampling.lora.files import read_lora
from blackpoint.sampling.lora.keys import matched

if TYPE_CHECKING:
    from blackpoint.sampling.process import Process

log = logging.getLogger(__name__)

BASE_NAME, PREDICTION, ZERO_SNR = (
    "ss_sd_model_name",
    "modelspec.prediction_type",
    "ss_zero_terminal_snr",
)
"""Metadata of LoRA files that tell of the base."""


@dataclass(frozen=True)
class MergedPipeline:
    """A pipeline whose UNet and text encoders have adapters merged in."""

    pipeline: Pipeline
    loras: Sequence[Applied]

    @property
    def path(self) -> Path:
        return self.pipeline.path

    def read_json(self, name: str) -> dict[str, Any]:
        """Reads a JSON file of the pipeline."""
        return self.pipeline.read_json(name)

    def weight_files(self, part: str) -> list[Path]:
        """Lists the files of the pipeline's own weights."""
        return self.pipeline.weight_files(part)

    def config_files(self, part: str) -> list[Path]:
        """Lists the pipeline's files."""
        return self.pipeline.config_files(part)

    def weights(self, part: str) -> Mapping[str, Tensor]:
        """Returns the weights by name, merged as they are asked for."""
        weights = self.pipeline.weights(part)
        if not any(part in lora.parts for lora, _ in self.loras):
            return weights
        return MergedWeights(part, weights, self.loras)

    def tensors(self, part: str) -> Iterator[Tensor]:
        """Yields the merged weights."""
        yield from self.weights(part).values()

    def load(self, kind: Any, part: str, dtype: torch.dtype) -> Any:
        """Loads a part, and puts the merged weights in the place of its own, one by one."""
        model, weights = self.pipeline.load(kind, part, dtype), self.weights(part)
        if isinstance(weights, MergedWeights):
            published = published_text_name if part.startswith("text_encoder") else str
            names = {published(name): name for name in model.state_dict()}
            for name in weights.changed:
                merged = {names[name]: weights[name].to(dtype)}
                model.load_state_dict(merged, strict=False, assign=True)
        return model

    def scheduler(self, undecided: PredictionType | None = None) -> dict[str, Any]:
        """Returns the pipeline's scheduler config."""
        return self.pipeline.scheduler(undecided)

    def tokenizer(self, text_encoder: str = "text_encoder") -> CLIPTokenizer:
        """Loads a tokenizer of the pipeline."""
        return self.pipeline.tokenizer(text_encoder)


def with_loras(resolved: Resolved, loras: Sequence[LoraFile] | None, weights: Weights) -> Resolved:
    """Returns a checkpoint with LoRA files merged in; reads the files, and merges nothing yet.

    `weights` chooses the adapters of a run. Raises UserError, which names the file, for what is
    no LoRA, or does not fit.
    """
    if not loras:
        return resolved
    pipeline = resolved.pipeline
    shapes = {"unet": shapes_of(resolved.weights("unet"))}
    index = pipeline.read_json("model_index.json")
    for part in text_encoders_of(index) if "text_encoder" in index else ():
        shapes[part] = shapes_of(pipeline.weights(part))
    blocks = unet_modules(empty_unet(pipeline).config)
    applied = [(matched(find_lora(one.path, weights), shapes, blocks), one.scale) for one in loras]
    unet = resolved.unet_state
    return replace(
        resolved,
        pipeline=MergedPipeline(pipeline, applied),
        unet_state=None if unet is None else MergedWeights("unet", unet, applied),
    )


def find_lora(path: str, weights: Weights = "ema") -> Lora:
    """Returns the adapters that a path or hub id names, under names as they are there."""
    named, place = f"lora={path}", Path(path)
    if (place / "model_index.json").is_file():
        raise UserError(f"{named} is a whole pipeline; give it as checkpoint, and a LoRA as lora")
    if (place / "checkpoints").is_dir():
        newest = last_checkpoint(place)
        if newest is None:
            raise UserError(f"{named} is a run directory without a checkpoint yet; wait for one")
        return adapters_of(newest, weights)
    if is_ckpt(place) and place.suffix == ".ckpt":
        return adapters_of(place, weights)
    if place.exists():
        return read_lora(place, named)
    if HUB_ID.fullmatch(path):
        return read_lora(download_lora(path), named)
    raise UserError(
        f"{named} does not exist; give a .safetensors file, a folder with one or a hub id"
    )


def lora_digests(loras: Sequence[LoraFile] | None, weights: Weights) -> list[list[Any]]:
    """Returns the digest and the scale of each LoRA."""
    return [[find_lora(one.path, weights).digest(), one.scale] for one in loras or ()]


def check_bases(resolved: Resolved, process: "Process") -> None:
    """Raises UserError where the base of a LoRA run is not the one that it was trained on; says on
    stderr where LoRA files were trained on other models."""
    _say_other_bases(resolved, process)
    if not resolved.base_digest or resolved.base is None:
        return
    if (digest := unet_digest(resolved.base)) != resolved.base_digest:
        raise UserError(
            f"checkpoint={resolved.checkpoint} holds adapters of another UNet than its base "
            f"{resolved.base.pipeline.path} has now (digest {resolved.base_digest:.12} then, "
            f"{digest:.12} now); put back the base that the run began with, or merge them into "
            f"another all the same: checkpoint=BASE lora={resolved.checkpoint}"
        )


def _say_other_bases(resolved: Resolved, process: "Process") -> None:
    pipeline = resolved.pipeline
    loras = pipeline.loras if isinstance(pipeline, MergedPipeline) else ()
    checkpoint = resolved.checkpoint or pipeline.path
    prediction_type, is_zero_snr = process.prediction_type, process.schedule.is_zero_terminal_snr
    here = {"v_prediction": "v"}.get(prediction_type, prediction_type)
    snr = {"True": "zero", "False": "non-zero"}
    for lora, _ in loras:
        told, name = lora.metadata, lora.source
        base, prediction = told.get(BASE_NAME, ""), told.get(PREDICTION, here)
        if base and _name(base) != _name(str(checkpoint)):
            text = "note: %s was trained on %s; it fits checkpoint=%s, of the same architecture"
            log.warning(text, name, base, checkpoint)
        if prediction != here:
            text = "note: %s was trained to predict %s, checkpoint=%s predicts %s"
            log.warning(text, name, prediction, checkpoint, here)
        if told.get(ZERO_SNR, str(is_zero_snr)) != str(is_zero_snr):
            text = "note: %s was trained for %s terminal SNR, checkpoint=%s for %s"
            log.warning(text, name, snr.get(told[ZERO_SNR]), checkpoint, snr[str(is_zero_snr)])


def _name(base: str) -> str:
    return Path(base).name.removesuffix(".safetensors").removesuffix(".ckpt")
