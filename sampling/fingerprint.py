"""Which encoders made a latent: digests of an autoencoder and of a text encoder with its tokenizer.

A digest is of what computes, not of files: the values of the weights in float32, whatever their
names and order, the settings that no weight shows, and the tokenizer's vocabulary. So a folder
saved again, by another version or as an export, keeps its digests; one weight changed does not.
"""

import json
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from safetensors import safe_open
from transformers import CLIPTextConfig

from sampling.checkpoint import weight_files
from sampling.loading import load_tokenizer, read_json
from sampling.model import DiffusionModel

DIGEST_BYTES, MODEL_DIGEST_BYTES = 16, 12
VAE_DEFAULTS = {"act_fn": "silu", "norm_num_groups": 32}
TEXT_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "num_hidden_layers")


def vae_digest(folder: Path) -> str:
    """Returns the digest of folder/vae; reads the weights tensor by tensor."""
    config = read_json(folder / "vae" / "config.json")
    settings = {key: config.get(key, default) for key, default in VAE_DEFAULTS.items()}
    return _digest(weight_files(folder, "vae"), settings)


def text_encoder_digest(folder: Path) -> str:
    """Returns the digest of folder/text_encoder and folder/tokenizer."""
    config, defaults = read_json(folder / "text_encoder" / "config.json"), CLIPTextConfig()
    settings = {key: config.get(key, getattr(defaults, key)) for key in TEXT_SETTINGS}
    settings["use_attention_mask"] = config.get("use_attention_mask") or False
    tokenizer = load_tokenizer(folder)
    settings["vocabulary"] = sorted(tokenizer.get_vocab().items())
    settings["merges"] = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    settings["tokens"] = [tokenizer.model_max_length, tokenizer.pad_token_id]
    return _digest(weight_files(folder, "text_encoder"), settings)


def model_digest(model: DiffusionModel) -> str:
    """Returns the digest of a loaded model's UNet and process: what decides its pictures beside the
    encoders."""
    process = repr(sorted(model.process.to_diffusers().items())).encode()
    digest = blake2b(process, digest_size=MODEL_DIGEST_BYTES)
    for key, tensor in sorted(model.unet.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _digest(files: Iterable[Path], settings: dict[str, object]) -> str:
    """Digests the floating-point tensors, sorted by their own digests, and the settings."""
    tensors = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict: it can't be walked)
                tensor = file.get_tensor(name)
                if tensor.is_floating_point():  # position_ids come and go with versions
                    one = blake2b(repr(tuple(tensor.shape)).encode(), digest_size=DIGEST_BYTES)
                    one.update(tensor.float().contiguous().numpy().data)
                    tensors.append(one.digest())
    whole = blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=DIGEST_BYTES)
    for digest in sorted(tensors):
        whole.update(digest)
    return whole.hexdigest()
