"""Writes a model as a pipeline folder that diffusers, and `DiffusionModel.load`, read."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blackpoint.sampling.checkpoints.ldm_keys import published_text_name
from blackpoint.sampling.checkpoints.loading import TOKENIZERS, save_tokenizer
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
STABLE_DIFFUSION_XL: dict[str, Any] = {
    "_class_name": "StableDiffusionXLPipeline",
    "feature_extractor": [None, None],
    # As here: the empty prompt is the encoded text "", in training and as negative prompt.
    "force_zeros_for_empty_prompt": False,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save_model(model: "DiffusionModel", folder: Path) -> None:
    """Writes every part, the scheduler config, model_index.json and the code that it names."""
    model.unet.save_pretrained(folder / "unet", safe_serialization=True)
    if model.pixels is None:
        model.vae.save_pretrained(folder / "vae", safe_serialization=True)
    for (part, name), tokenizer in zip(TOKENIZERS.items(), model.tokenizers, strict=False):
        encoder = getattr(model, part)
        # transformers 5 drops the prefix that all published files have and other tools look for.
        published = {published_text_name(n): tensor for n, tensor in encoder.state_dict().items()}
        encoder.save_pretrained(folder / part, state_dict=published)
        save_tokenizer(tokenizer, folder, name)
    scheduler = model.process.to_diffusers()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = STABLE_DIFFUSION_XL if model.is_xl else STABLE_DIFFUSION
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
