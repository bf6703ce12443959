"""Which models these are: digests of a UNet, an autoencoder, text encoders with their tokenizers.

A digest is of what computes, not of files: the values of the weights in float32, whatever their
names and order, the settings that no weight shows, and the tokenizer's vocabulary. So a folder
saved again, by another version or as an export, keeps its digests; one weight changed does not.
"""

import json
from collections.abc import Iterable
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import CLIPTextConfig

from blackpoint.sampling.checkpoints.loading import Pipeline, is_xl
from blackpoint.sampling.checkpoints.resolve import Resolved

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
    """Returns the digest of a pipeline's UNet, or of the one that a .ckpt holds instead."""
    config = resolved.pipeline.read_json("unet/config.json")
    settings = {key: config.get(key, default) for key, default in UNET_DEFAULTS.items()}
    if config.get("addition_embed_type"):  # SDXL as published has null, which is false
        settings["upcast_attention"] = bool(settings["upcast_attention"])
    if resolved.unet_state is not None:
        return _digest(resolved.unet_state.values(), settings)
    return _digest(resolved.pipeline.tensors("unet"), settings)


def vae_digest(pipeline: Pipeline) -> str:
    """Returns the digest of a pipeline's autoencoder; reads the weights tensor by tensor."""
    config = pipeline.read_json("vae/config.json")
    settings = {key: config.get(key, default) for key, default in VAE_DEFAULTS.items()}
    return _digest(pipeline.tensors("vae"), settings)


def text_encoder_digest(pipeline: Pipeline, tokenizer: dict[str, Any] | None = None) -> str:
    """Returns the digest of a pipeline's text encoder and of its tokenizer, whose settings may be
    read already; of both encoders and tokenizers of an SDXL."""
    settings = _text_settings(pipeline, "text_encoder")
    settings |= tokenizer or tokenizer_settings(pipeline)
    if is_xl(pipeline.read_json("model_index.json")):
        second = _text_settings(pipeline, "text_encoder_2")
        settings["text_encoder_2"] = _digest(pipeline.tensors("text_encoder_2"), second)
    return _digest(pipeline.tensors("text_encoder"), settings)


def _text_settings(pipeline: Pipeline, part: str) -> dict[str, Any]:
    config, defaults = pipeline.read_json(f"{part}/config.json"), CLIPTextConfig()
    settings = {key: config.get(key, getattr(defaults, key)) for key in TEXT_SETTINGS}
    settings["use_attention_mask"] = config.get("use_attention_mask") or False
    return settings


def tokenizer_settings(pipeline: Pipeline) -> dict[str, Any]:
    """Returns what a tokenizer makes tokens by: vocabulary, merges, length and padding.

    Those of SDXL's second tokenizer are within, as tokenizer_2.
    """
    settings = _words(pipeline, "text_encoder")
    if is_xl(pipeline.read_json("model_index.json")):
        settings["tokenizer_2"] = _words(pipeline, "text_encoder_2")
    return settings


def _words(pipeline: Pipeline, text_encoder: str) -> dict[str, Any]:
    tokenizer = pipeline.tokenizer(text_encoder)
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
    return loaded_digest(process, [model.unet])


def loaded_digest(settings: bytes, parts: Iterable[nn.Module]) -> str:
    """Returns the digest of settings, and of the weights of loaded networks by their names."""
    digest = blake2b(settings, digest_size=MODEL_DIGEST_BYTES)
    for part in parts:
        for key, tensor in sorted(_weights(part).items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _weights(part: nn.Module) -> dict[str, Tensor]:
    """Returns a network's weights by name, also where accelerate keeps them aside, on the CPU, and
    the network holds them on the meta device (offload=sequential)."""
    for module in part.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if (kept := getattr(one, "weights_map", None)) is not None:
                return {**part.state_dict(), **kept.dataset}
    return part.state_dict()


def sampling_digest(model: "DiffusionModel") -> str:
    """Returns the digest of all that decides the images of a model that was loaded: UNet, process,
    autoencoder, text encoders."""
    assert model.pipeline is not None
    parts = [model_digest(model)]
    if model.pixels is None:
        parts.append(vae_digest(model.pipeline))
    if model.tokenizer is not None:
        parts.append(text_encoder_digest(model.pipeline))
    return blake2b(" ".join(parts).encode(), digest_size=MODEL_DIGEST_BYTES).hexdigest()


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
