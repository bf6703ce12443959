"""Reads one model of a pipeline folder: strictly, when it is needed, and without a second copy.

A model is built without memory for weights and then given the tensors of the file, which is
mapped: nothing is initialised only to be overwritten, and a page is copied when it is first
written to. A file in another number format is converted tensor by tensor.
"""

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CLIPTokenizer

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.resolve import Resolved, variant_of

CLIP_POSITIONS = 77
"""Of a CLIP text encoder whose config does not say it."""
WRONG_CONFIG = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    StrictDataclassError,
)
"""Errors that a library may raise for a config.json that makes no sense."""
CLIP_TOKENIZER_FILES = ("tokenizer.json", "merges.txt")


@dataclass(frozen=True)
class Part:
    """A model in folder/name that is there but not loaded; raises UserError where it is not."""

    kind: Any
    folder: Path
    name: str
    dtype: torch.dtype
    variant: str | None = None

    def __post_init__(self) -> None:
        self.config()
        variant_of(self.folder, self.name, self.variant)

    def config(self) -> dict[str, Any]:
        """Returns config.json as it is written."""
        if not (self.folder / self.name / "config.json").is_file():
            raise UserError(f"{self.folder} is incomplete: {self.name}/config.json is missing")
        return read_json(self.folder / self.name / "config.json")

    def setting(self, key: str) -> Any:
        """Returns one entry of config.json, or the default of its class."""
        default = inspect.signature(self.kind.__init__).parameters[key].default
        return self.config().get(key, default)

    def load(self) -> Any:
        """Loads the model and refuses missing or unexpected keys."""
        path = self.folder / self.name
        try:
            model, info = self.kind.from_pretrained(
                path,
                use_safetensors=True,
                local_files_only=True,
                variant=variant_of(self.folder, self.name, self.variant),
                output_loading_info=True,
                dtype=self.dtype,
            )
        except (OSError, SafetensorError, *WRONG_CONFIG) as error:
            raise UserError(f"{path} cannot be loaded: {error}") from error
        unexpected = [key for key in info["unexpected_keys"] if not key.endswith("position_ids")]
        wrong = {"missing": sorted(info["missing_keys"]), "unexpected": sorted(unexpected)}
        wrong["of another shape"] = sorted(str(key) for key in info.get("mismatched_keys") or [])
        for what, keys in wrong.items():
            if keys:
                raise UserError(
                    f"{path}: {len(keys)} {what} weights, such as {keys[0]}; the file does "
                    "not belong to its config.json"
                )
        return model


def load_unet(resolved: Resolved, dtype: torch.dtype) -> UNet2DConditionModel:
    """Loads the UNet of a folder, or of a .ckpt by the config of its base alone."""
    if resolved.unet_state is None:
        return Part(UNet2DConditionModel, resolved.folder, "unet", dtype, resolved.variant).load()
    unet = empty_unet(resolved.folder)
    state = {name: weight.to(dtype) for name, weight in resolved.unet_state.items()}
    try:
        unet.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"checkpoint={resolved.checkpoint} does not fit the UNet of its base "
            f"{resolved.folder}: {error}"
        ) from error
    return unet


def empty_unet(folder: Path) -> UNet2DConditionModel:
    """Returns the UNet that folder/unet/config.json describes, on the meta device: no weights."""
    if not (folder / "unet" / "config.json").is_file():
        raise UserError(f"{folder} is incomplete: unet/config.json is missing")
    config = read_json(folder / "unet" / "config.json")
    try:
        with init_empty_weights():
            return UNet2DConditionModel.from_config(config)
    except WRONG_CONFIG as error:
        raise UserError(f"{folder / 'unet'} cannot be built by its config.json: {error}") from error


def read_scheduler(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """Returns scheduler_config.json as of the class of model_index.json, which diffusers makes."""
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    match index.get("scheduler"):
        case [_, str(name)]:
            return {**config, "_class_name": name}
    return config


def require_tokenizer(folder: Path, files: Sequence[str] = CLIP_TOKENIZER_FILES) -> None:
    """Raises UserError unless one of a tokenizer's files is in `folder`.

    transformers 5 makes an empty tokenizer of a folder without them, and every prompt is the same.
    """
    if not any((folder / file).is_file() for file in files):
        raise UserError(f"{folder}: its tokenizer is missing; {' or '.join(files)} belongs there")


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Loads folder/tokenizer; its longest text is one that folder/text_encoder has positions for.

    A tokenizer without model_max_length says 1e30, which is no length to fill up to.
    """
    require_tokenizer(folder / "tokenizer")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'tokenizer'} cannot be loaded: {error}") from error
    path = folder / "text_encoder" / "config.json"
    positions = read_json(path).get("max_position_embeddings", CLIP_POSITIONS)
    tokenizer.model_max_length = int(min(tokenizer.model_max_length, positions))
    return tokenizer


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes folder/tokenizer, also as vocab.json and merges.txt.

    transformers 5 writes tokenizer.json alone, which transformers 4 and other tools do not read.
    """
    folder = folder / "tokenizer"
    tokenizer.save_pretrained(folder)
    settings = read_json(folder / "tokenizer_config.json")
    for how_it_was_loaded in ("is_local", "local_files_only"):
        settings.pop(how_it_was_loaded, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    model = read_json(folder / "tokenizer.json")["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads one of a pipeline's JSON files; raises UserError where it is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; the pipeline folder is incomplete") from error
    except ValueError as error:  # also what is no UTF-8
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} where an object {{...}} belongs")
    return content
