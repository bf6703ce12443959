"""Small Stable Diffusions 1.x and 2.x with CLIP's vocabulary, as folders and as single files.

Sizes are as small as the rules of the layout allow: 8 heads or heads of 64 channels, groups of 32
channels; 77 tokens.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from blackpoint.sampling.checkpoints.ldm_keys import to_ldm
from blackpoint.sampling.checkpoints.single_file import TOKENIZER
from blackpoint.sampling.model import DiffusionModel
from tests.tiny_pipeline import make_tiny_pipeline

WIDTHS = (32, 64)
VAE = {"block_out_channels": (32, 32), "norm_num_groups": 32, "scaling_factor": 0.18215}
UNET: dict[str, Any] = {"block_out_channels": WIDTHS, "norm_num_groups": 32}
TEXT = {
    "vocab_size": 49_408,
    "max_position_embeddings": 77,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd1": ({"attention_head_dim": 8}, {"hidden_act": "quick_gelu"}),
    "sd2": ({"attention_head_dim": (1, 1), "use_linear_projection": True}, {"hidden_act": "gelu"}),
}
RESOLUTION = {"modelspec.resolution": "16x16"}
"""The side that the folders are made for; without it a file is taken for one of 512 px."""


def make_folder(folder: Path, kind: str, seed: int = 0, **scheduler: Any) -> Path:
    """Writes a pipeline folder with random weights, and returns it."""
    unet, text = KINDS[kind]
    make_tiny_pipeline(
        folder,
        seed,
        unet=UNET | unet | {"cross_attention_dim": 64},
        vae=VAE,
        text_encoder=TEXT | text,
        scheduler=scheduler,
    )
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    if kind == "sd2":  # as published
        path = folder / "tokenizer" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "!"}))
    return folder


def tensors_of(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Returns a folder's weights by the names of a single file."""
    model = DiffusionModel.load(folder, dtype=dtype)
    tensors: dict[str, Tensor] = {}
    for part in ("unet", "vae"):
        module = getattr(model, part)
        tensors |= to_ldm(part, module.config, module.state_dict())  # type: ignore[arg-type]
    text = model.text_encoder
    return tensors | to_ldm("text_encoder", text.config.to_dict(), text.state_dict())


def write_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = RESOLUTION
) -> Path:
    """Writes a single file, and returns it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    copies = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, path, metadata={"format": "pt", **metadata})
    return path
