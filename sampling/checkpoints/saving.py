"""Writes a model as a pipeline folder that diffusers, and `DiffusionModel.load`, read."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blackpoint.sampling.checkpoints.loading import save_tokenizer
from blackpoint.sampling.pixels.folder import CODE, CODE_FOLDER

if TYPE_CHECKING:
    from blackpoint.sampling.model import DiffusionModel

STABLE_DIFFUSION: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save_model(model: "DiffusionModel", folder: Path) -> None:
    """Writes every part, the scheduler config, model_index.json and the code that it names."""
    model.unet.save_pretrained(folder / "unet", safe_serialization=True)
    if model.pixels is None:
        model.vae.save_pretrained(folder / "vae", safe_serialization=True)
    if model.tokenizer is not None:
        # transformers 5 drops the prefix that all published files have and other tools look for.
        published = {
            f"text_model.{name.removeprefix('text_model.')}": tensor
            for name, tensor in model.text_encoder.state_dict().items()
        }
        model.text_encoder.save_pretrained(folder / "text_encoder", state_dict=published)
        save_tokenizer(model.tokenizer, folder)
    scheduler = model.process.to_diffusers()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = STABLE_DIFFUSION
    if model.pixels is not None:
        index = model.pixels.to_index()
        for name in CODE:
            shutil.copyfile(CODE_FOLDER / name, folder / name)
    index = index | {"scheduler": ["diffusers", scheduler["_class_name"]]}
    write_json(folder / "model_index.json", index)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes one of a pipeline's JSON files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
