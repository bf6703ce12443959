"""A pipeline folder as what models are read from: a folder a part, with config.json and weights.

As in diffusers, a part may have files of several variants: fp16, bf16, non_ema.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.safetensors_file import opened
from blackpoint.sampling.checkpoints.ldm_keys import published_text_name
from blackpoint.sampling.checkpoints.loading import (
    TOKENIZERS,
    WRONG_CONFIG,
    check_keys,
    convert_weights,
    forget_pages,
    load_tokenizer,
    read_json,
)
from blackpoint.sampling.choices import PredictionType

MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Number formats of weights, by safetensors' names."""


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Hides the bars of transformers and diffusers in the block: parts are read in seconds."""
    libraries: tuple[Any, ...] = (transformers_logging, diffusers_logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


@dataclass(frozen=True)
class PipelineFolder:
    """A diffusers folder, and the variant of its weight files that is read."""

    path: Path
    variant: str | None = None

    def read_json(self, name: str) -> dict[str, Any]:
        """Reads one of the folder's JSON files."""
        if not (self.path / name).is_file():
            raise UserError(f"{self.path} is incomplete: {name} is missing")
        return read_json(self.path / name)

    def weight_files(self, part: str) -> list[Path]:
        """Lists the files of one variant."""
        return weight_files(self.path, part, self.variant)

    def config_files(self, part: str) -> list[Path]:
        """Lists config.json, or the files of a tokenizer."""
        if part in TOKENIZERS.values():
            return sorted(path for path in (self.path / part).iterdir() if path.is_file())
        return [self.path / part / "config.json"]

    def tensors(self, part: str) -> Iterator[Tensor]:
        """Yields the weights as they are in the files, and drops each from memory afterwards."""
        for path in self.weight_files(part):
            with opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (no dict: it can't be walked)
                    yield (tensor := file.get_tensor(name))
                    forget_pages(tensor)

    def weights(self, part: str) -> "FileWeights":
        """Returns the weights by name, of a text encoder by the published ones."""
        is_text = part.startswith("text_encoder")
        return FileWeights(self.weight_files(part), published_text_name if is_text else str)

    def load(self, kind: Any, part: str, dtype: torch.dtype) -> Any:
        """Loads a part and refuses missing or unexpected keys."""
        path = self.path / part
        stored = self._stored_dtype(part)
        try:
            with without_bars():
                model, info = kind.from_pretrained(
                    path,
                    use_safetensors=True,
                    local_files_only=True,
                    # transformers' own error does not name them; diffusers' does
                    ignore_mismatched_sizes=issubclass(kind, PreTrainedModel),
                    variant=variant_of(self.path, part, self.variant),
                    output_loading_info=True,
                    dtype=stored or dtype,
                )
        except (OSError, SafetensorError, *WRONG_CONFIG) as error:
            raise UserError(f"{path} cannot be loaded: {error}") from error
        unexpected = [key for key in info["unexpected_keys"] if not key.endswith("position_ids")]
        mismatched = [
            f"{name}: {list(stored)} in the file, {list(built)} by its config.json"
            for name, stored, built in info.get("mismatched_keys") or []
        ]
        reason = "the file does not belong to its config.json"
        check_keys(str(path), info["missing_keys"], unexpected, mismatched, reason)
        convert_weights(model, dtype)
        return model

    def _stored_dtype(self, part: str) -> torch.dtype | None:
        """Returns the number format of a part's files; None where they have several, or another."""
        formats = {f for path in self.weight_files(part) for f in _formats(path) if f in DTYPES}
        return DTYPES[formats.pop()] if len(formats) == 1 else None

    def scheduler(self, undecided: PredictionType | None = None) -> dict[str, Any]:
        """Returns scheduler_config.json as of the class of model_index.json, which diffusers
        makes."""
        config = self.read_json("scheduler/scheduler_config.json")
        match self.read_json("model_index.json").get("scheduler"):
            case [_, str(name)]:
                return {**config, "_class_name": name}
        return config

    def tokenizer(self, text_encoder: str = "text_encoder") -> CLIPTokenizer:
        """Loads a tokenizer of the folder, for as many tokens as its encoder has positions."""
        config = self.read_json(f"{text_encoder}/config.json")
        return load_tokenizer(self.path / TOKENIZERS[text_encoder], config)


def _formats(path: Path) -> set[str]:
    """Returns the number formats of a file's tensors; none of a file that can't be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return set()


class FileWeights(Mapping[str, Tensor]):
    """The tensors of safetensors files by names that `named` makes of theirs, mapped."""

    def __init__(self, files: Iterable[Path], named: Callable[[str], str] = str) -> None:
        self._files: dict[str, tuple[Any, str]] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read: {error}") from error
            self._files |= {named(key): (file, key) for key in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        file, key = self._files[name]
        tensor: Tensor = file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shapes(self) -> dict[str, list[int]]:
        """Returns the shapes by name; reads no tensor."""
        files = self._files.items()
        return {name: list(file.get_slice(key).get_shape()) for name, (file, key) in files}


def variant_of(folder: Path, model: str, variant: str | None = None) -> str | None:
    """Returns the variant of the files that `weight_files` chooses; None for plain ones."""
    return _variant_in(weight_files(folder, model, variant)[0].name)


def weight_files(folder: Path, model: str, variant: str | None = None) -> list[Path]:
    """Returns the safetensors of one variant in folder/model; refuses pickle-only folders.

    Those of `variant`, or the plain ones where it is None or has none here; without plain ones the
    only variant that is there, or fp16. UserError where that leaves a choice.
    """
    files = {file.name: file for file in sorted((folder / model).glob("*.safetensors"))}
    if files:
        if names := names_of_variant(files, variant):
            return [files[name] for name in names]
        [one, *others] = variants(files)
        raise UserError(
            f"{folder / model} holds weights of the variants {', '.join([one, *others])} and none "
            f"without a variant; `blackpoint export checkpoint={folder} variant={one} "
            f"output=FOLDER` writes one of them, here {one}, as a plain folder"
        )
    pickles = sorted(file.name for file in (folder / model).glob("*.bin"))
    if pickles:
        raise UserError(
            f"{folder / model} holds only {pickles[0]}, a pickle, which can run any code when it "
            "is loaded; convert it to safetensors (a hub model often has them in a newer revision)"
        )
    raise UserError(f"{folder / model} holds no weights (*.safetensors); the folder is incomplete")


def _variant_in(name: str) -> str | None:
    """Returns bf16 for model.bf16.safetensors and for its shards, None for model.safetensors."""
    stem = re.sub(r"-\d+-of-\d+", "", name.rpartition("/")[2].removesuffix(".safetensors"))
    return stem.partition(".")[2] or None


def variants(names: Iterable[str]) -> list[str]:
    """Lists the variants of files."""
    return sorted({variant for name in names if (variant := _variant_in(name))})


def names_of_variant(names: Iterable[str], variant: str | None) -> list[str]:
    """Chooses the files of one variant, as `weight_files` says; none where that leaves a choice."""
    by_variant: dict[str | None, list[str]] = {}
    for name in names:
        by_variant.setdefault(_variant_in(name), []).append(name)
    for wanted in (variant, None, "fp16"):
        if wanted in by_variant:
            return by_variant[wanted]
    [*groups] = by_variant.values()
    return groups[0] if len(groups) == 1 else []


def patterns_of(names: list[str], variant: str | None = None) -> list[str]:
    """Returns patterns of what is read of a repository: one set of safetensors a model, as
    `weight_files` chooses it."""
    patterns = ["*.json", "*.txt", "tokenizer/*", "tokenizer_2/*"]
    for model in MODELS:
        files = [n for n in names if n.startswith(f"{model}/") and n.endswith(".safetensors")]
        patterns += names_of_variant(files, variant) or files or [f"{model}/*.bin"]
    return [*patterns, *(f"{model}/config.json" for model in MODELS)]
