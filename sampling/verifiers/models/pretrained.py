"""Finds and loads the models that verifiers judge with: strict, frozen, never unpickled.

A weight that is missing from the file would be drawn at random and still give scores, so every key
must match, but for the parts that a verifier says it does without.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from blackpoint.data.files.errors import FORBIDDEN, FULL, RunFailed, UserError
from blackpoint.sampling.checkpoints.pipeline_folder import without_bars
from blackpoint.sampling.checkpoints.resolve import HUB_ID, is_unreachable
from blackpoint.sampling.verifiers.kind import MODEL_FILES

NOTHING, ANYTHING = r"(?!)", ""
"""Regular expressions: weights that a model may lack, or that its file may hold beside."""


def find_folder(checkpoint: str, field: str, example: str) -> Path:
    """Returns the folder of a transformers model: the user's own, or the hub's once downloaded.

    `example` is a hub id that would do; `field` is what the user calls it. Raises UserError.
    """
    path = Path(checkpoint)
    if (path / "config.json").is_file():
        return path
    if path.exists():
        raise UserError(
            f"{field}={checkpoint} is not the folder of a transformers model (config.json is "
            f"missing); download {example} and give its folder"
        )
    if not HUB_ID.fullmatch(checkpoint):
        raise UserError(
            f"{field}={checkpoint} does not exist; give a local folder or a hub id, such as "
            f"{example}"
        )
    return download(checkpoint, field, example)


def download(hub_id: str, field: str, example: str, files: Sequence[str] = MODEL_FILES) -> Path:
    """Returns the folder in the hub's cache that holds `files`; raises UserError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(files)))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise RunFailed(f"{field}={hub_id} does not fit on the disk: {error}") from error
        answered = isinstance(error, HfHubHTTPError | HFValidationError)
        if not answered and not is_unreachable(error):
            raise
        refused = getattr(error, "errno", None) in FORBIDDEN
        reason = "may not be written to the hub's cache" if refused else "cannot be fetched"
        raise UserError(
            f"{field}={hub_id} is not a local folder and {reason} ({type(error).__name__}); "
            f"download it where there is a network (`hf download {hub_id}`) and give the folder; "
            f"a model that fits: {example}"
        ) from error


def load_model(
    kind: Any,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    may_lack: str = NOTHING,
    may_hold: str = NOTHING,
) -> tuple[Any, list[str]]:
    """Loads a model for inference and returns it with the names of the weights that it lacks.

    Raises UserError where weights are missing or left over, unless the regular expression
    `may_lack`, or `may_hold`, matches the beginning of their names.
    """
    try:
        with without_bars():
            model, info = kind.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                dtype=dtype,
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be loaded as {kind.__name__}: {error}; it needs config.json and "
            "model.safetensors"
        ) from error
    missing = sorted(info["missing_keys"])
    for what, keys, allowed in (
        ("missing", missing, may_lack),
        ("unexpected", sorted(info["unexpected_keys"]), may_hold),
    ):
        wrong = [key for key in keys if not re.match(f"{allowed}|.*position_ids$", key)]
        if wrong:
            raise UserError(
                f"{folder}: {len(wrong)} {what} weights, such as {wrong[0]}; its files are not "
                f"those of a {kind.__name__}"
            )
    return frozen(model.to(device)), missing


def frozen(model: nn.Module) -> nn.Module:
    """Returns the model in evaluation mode, its weights without gradients."""
    return model.eval().requires_grad_(False)


def load_weights(path: Path, field: str, remedy: str) -> dict[str, Tensor]:
    """Reads a state dict from .safetensors, or from .pth or .pt without unpickling code."""
    if not path.is_file():
        raise UserError(f"{field}={path} does not exist; {remedy}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise UserError(
            f"{field}={path} cannot be read without unpickling code ({type(error).__name__}); "
            f"{remedy}"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{field}={path} holds no state dict of tensors; {remedy}")
    return state


def linear_chain(state: dict[str, Tensor]) -> nn.Sequential:
    """Returns the head of a reward model: the linear layers of a state dict such as
    layers.0.weight, layers.0.bias, layers.2.weight...

    Dropout is off and nothing else stands between the layers of LAION's and ImageReward's heads. In
    float32. Raises ValueError unless each layer takes what the one before gives, the last gives
    one number, and nothing is left over.
    """
    names = [name.removesuffix("weight") for name in state if name.endswith("weight")]
    names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    layers: list[nn.Linear] = []
    for name in names:
        weight, bias = state[f"{name}weight"], state.get(f"{name}bias")
        if weight.ndim != 2 or bias is None or bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}weight {tuple(weight.shape)} is not of a linear layer")
        if layers and weight.shape[1] != layers[-1].out_features:
            raise ValueError(f"{name}weight does not take {layers[-1].out_features} numbers")
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    if not layers or layers[-1].out_features != 1 or len(state) != 2 * len(layers):
        raise ValueError("it is not a chain of linear layers to one number")
    return nn.Sequential(*layers)
