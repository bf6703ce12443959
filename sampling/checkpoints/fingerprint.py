"""Which models these are: digests of a UNet, an autoencoder, a text encoder with its tokenizer.

A digest is of what computes, not of files: the values of the weights in float32, whatever their
names and order, the settings that no weight shows, and the tokenizer's vocabulary. So a folder
saved again, by another version or as an export, keeps its digests; one weight changed does not.
"""

import json
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextConfig

from blackpoint.sampling.checkpoints.loading import load_tokenizer, read_json
from blackpoint.sampling.checkpoints.resolve import Resolved, weight_files

if TYPE_CHECKING:
    from blackpoint.sampling.model import DiffusionModel

DIGEST_BYTES, MODEL_DIGEST_BYTES = 16, 12
VAE_DEFAULTS = {"act_fn": "silu", "norm_num_groups": 32}
UNET_DEFAULTS = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "center_input_sample": False,
    "down_block_types": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "resnet_time_scale_shift": "default",
    "up_block_types": None,
    "upcast_attention": False,
}
"""Settings that no weight shows; left out, they are these."""
TEXT_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "num_hidden_layers")


def unet_digest(resolved: Resolved) -> str:
    """Returns the digest of a folder's UNet, or of the one that a .ckpt holds instead."""
    config = read_json(resolved.folder / "unet" / "config.json")
    settings = {key: config.get(key, default) for key, default in UNET_DEFAULTS.items()}
    if resolved.unet_state is not None:
        return _digest(resolved.unet_state.values(), settings)
    return _digest(_tensors(weight_files(resolved.folder, "unet", resolved.variant)), settings)


def vae_digest(folder: Path, variant: str | None = None) -> str:
    """Returns the digest of folder/vae; reads the weights tensor by tensor."""
    config = read_json(folder / "vae" / "config.json")
    settings = {key: config.get(key, default) for key, default in VAE_DEFAULTS.items()}
    return _digest(_tensors(weight_files(folder, "vae", variant)), settings)


def text_encoder_digest(
    folder: Path, variant: str | None = None, tokenizer: dict[str, Any] | None = None
) -> str:
    """Returns the digest of folder/text_encoder and of folder/tokenizer, whose settings may be read
    already."""
    config, defaults = read_json(folder / "text_encoder" / "config.json"), CLIPTextConfig()
    settings = {key: config.get(key, getattr(defaults, key)) for key in TEXT_SETTINGS}
    settings["use_attention_mask"] = config.get("use_attention_mask") or False
    settings |= tokenizer or tokenizer_settings(folder)
    return _digest(_tensors(weight_files(folder, "text_encoder", variant)), settings)


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Returns what folder/tokenizer makes tokens by: vocabulary, merges, length and padding."""
    tokenizer = load_tokenizer(folder)
    return {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "merges": json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"],
        "tokens": [tokenizer.model_max_length, tokenizer.pad_token_id],
    }


def tokenizer_digest(settings: dict[str, Any]) -> str:
    """Returns the digest of a tokenizer's settings, which that of the text encoder takes in."""
    return _digest([], settings)


def model_digest(model: "DiffusionModel") -> str:
    """Returns the digest of a loaded model's UNet and process: all that decides its
    images beside the encoders."""
    process = repr(sorted(model.process.to_diffusers().items())).encode()
    digest = blake2b(process, digest_size=MODEL_DIGEST_BYTES)
    for key, tensor in sorted(model.unet.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def sampling_digest(model: "DiffusionModel", variant: str | None = None) -> str:
    """Returns the digest of all that decides the images of a model that was loaded from a folder:
    UNet, process, autoencoder, text encoder."""
    assert model.folder is not None
    parts = [model_digest(model)]
    if model.pixels is None:
        parts.append(vae_digest(model.folder, variant))
    if model.tokenizer is not None:
        parts.append(text_encoder_digest(model.folder, variant))
    return blake2b(" ".join(parts).encode(), digest_size=MODEL_DIGEST_BYTES).hexdigest()


def _tensors(files: Iterable[Path]) -> Iterator[Tensor]:
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict: it can't be walked)
                yield file.get_tensor(name)


def _digest(tensors: Iterable[Tensor], settings: dict[str, Any]) -> str:
    """Digests the floating-point tensors, sorted by their own digests, and the settings."""
    digests = []
    for tensor in tensors:
        if tensor.is_floating_point():  # position_ids come and go with versions
            one = blake2b(repr(tuple(tensor.shape)).encode(), digest_size=DIGEST_BYTES)
            one.update(tensor.float().contiguous().numpy().data)
            digests.append(one.digest())
    whole = blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=DIGEST_BYTES)
    for digest in sorted(digests):
        whole.update(digest)
    return whole.hexdigest()
