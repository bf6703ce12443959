"""The words that configs choose between; no import of torch, so that a verb's help is instant."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import Holds, PathText
from blackpoint.data.files.rules import require

MAX_SEED = 2**64 - 1
"""torch.Generator takes no larger one."""

PredictionType = Literal["v_prediction", "epsilon", "sample"]  # named as in diffusers
TextProjection = Literal["transposed", "as_is"]
Spacing = Literal["trailing", "leading", "linspace"]
Attention = Literal["auto", "xformers", "sdpa"]
Offload = Literal["none", "model", "sequential"]  # named as in diffusers
Dtype = Literal["float32", "float16", "bfloat16"]
AutoDtype = Literal["auto", "float32", "float16", "bfloat16"]  # sampling/runtime/precision.py
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]  # named as in torch
Tf32 = Literal["auto", True, False]  # the true and false of YAML
PLAIN_FORMATS: dict[str, Any] = {"dtype": "float32", "encoder_dtype": "float32", "tf32": False}
"""What `auto` takes where a GPU offers nothing else, and what results without a record of number
formats were computed in."""
Weights = Literal["ema", "raw"]  # the average of a training checkpoint, or its last step
Prompts = Annotated[Any, Holds.PROMPTS]
"""A text, a list of texts, or the file or folder that holds them."""
SCORE_DECIMALS = 4
"""Scores that agree in so many decimals are tied."""
SAMPLED_AT_ONCE = 16
"""Images that a model samples at once where nothing else is asked for."""


@dataclass
class SingleFileConfig:
    """What a checkpoint that is a single .safetensors file may lack; folders have all of it."""

    prediction_type: PredictionType | None = None
    """What the UNet of a single file predicts, where neither the file nor NAME.yaml beside it
    says so. `train` needs it never: its target is loss.prediction_type."""
    zero_terminal_snr: bool | None = None
    """Whether a single file was trained to zero terminal SNR, where its key ztsnr is missing (most
    trainers write none) or wrong."""
    vae: PathText | None = None
    """Autoencoder for a single file, instead of its own: a diffusers folder, or a .safetensors
    file."""
    tokenizer: PathText | None = None
    """Tokenizer for a single file whose text encoder has another vocabulary than CLIP's: a folder
    with tokenizer.json, or with vocab.json and merges.txt."""
    text_projection: TextProjection | None = None
    """How a single file of SDXL holds the projection of its second text encoder: transposed, as
    published (null), or as_is, as a folder has it and OneTrainer writes it. Its shape does not
    tell; the wrong one gives a plausible model with another pooled embedding."""


PLAIN = SingleFileConfig()


def recorded_formats(
    saved: Mapping[str, Any], names: Collection[str], prefix: str = ""
) -> tuple[dict[str, Any], bool]:
    """Returns the number formats `names` of saved settings, and whether all are recorded there.

    The keys of `saved` are `prefix` and name. What is not recorded was in PLAIN_FORMATS.
    """
    formats = {name: saved.get(f"{prefix}{name}", PLAIN_FORMATS[name]) for name in names}
    return formats, all(f"{prefix}{name}" in saved for name in names)


def check_seed(name: str, seed: int, count: int = 1, largest: int = MAX_SEED) -> None:
    """Raises UserError unless seed, ..., seed + count - 1 are from 0 to `largest`."""
    if seed < 0 or seed + count - 1 > largest:
        last = f" with {count} in a row" if count > 1 else ""
        raise UserError(f"{name}={seed}{last}: a seed must be from 0 to {largest}")


@dataclass
class LoraFile:
    """A LoRA to merge into the checkpoint."""

    path: PathText
    """A .safetensors file in the spelling of diffusers, peft or kohya, a folder with one, a hub id,
    or a run directory or .ckpt of a run with lora.rank."""
    scale: float = 1.0
    """Factor of its effect; negative ones subtract it."""

    SHORT_FORM: ClassVar[str] = "path"
    """The field that a text stands for where a LoRA belongs."""

    def __str__(self) -> str:
        return f"{self.scale:g} x {self.path}"

    def __post_init__(self) -> None:
        require(self.path, "lora: path", self.path, "the file of a LoRA")
        require(math.isfinite(self.scale), "lora: scale", self.scale, "a finite number")
