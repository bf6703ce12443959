"""One run at Weights & Biases for a folder, however often its command starts again."""

import netrc
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from blackpoint.data.files.dotted import flat, value_at
from blackpoint.data.files.errors import UserError
from blackpoint.data.files.whole_file import write_whole
from blackpoint.data.files.yaml_text import read_yaml_file

NOT_IN_PROJECT, MAX_PROJECT_CHARACTERS = "/\\#?%:", 128
"""Characters that wandb refuses in a project's name, when the run starts."""
CHECKPOINT_KEYS = ("checkpoint", "evaluate.checkpoint", "search.checkpoint")


@dataclass
class WandbConfig:
    """Weights & Biases: online when logged in and reachable, else offline in wandb/ there."""

    enabled: bool = True
    """Log to wandb beside the files."""
    project: str = "blackpoint"
    """Project that the run appears in."""
    name: str | None = None
    """Name of the run there; the folder's name if not set."""
    artifacts: Literal["none", "exports", "all"] = "none"
    """What a finished training sends as artifacts: its exports; all: its checkpoints too. With
    either, a run that uses a training's checkpoint names that export as its input, where wandb
    answers."""

    def __post_init__(self) -> None:
        if not self.enabled:
            return
        if not self.project or len(self.project) > MAX_PROJECT_CHARACTERS:
            raise UserError(
                f"wandb.project={self.project:.60}: has {len(self.project)} characters, and wandb "
                f"takes 1 to {MAX_PROJECT_CHARACTERS}; choose another name"
            )
        if wrong := sorted(set(self.project) & set(NOT_IN_PROJECT)):
            raise UserError(
                f"wandb.project={self.project}: holds {' '.join(wrong)}, which wandb does not take "
                f"(none of {' '.join(NOT_IN_PROJECT)}); choose another name"
            )


def start_run(wandb_config: WandbConfig, folder: Path, config: Mapping[str, Any]) -> Any:
    """Starts or continues the run; where wandb does not know us or does not answer, offline.

    Says so on stderr then, and how to upload later. Call `.finish()` on it at the end. The config
    is flat there, optimizer/learning_rate, as Lightning's logger has it: wandb takes dots for
    something else. A checkpoint that a training made adds trained_by/run_id and the rest of
    `trained_by`, and puts the run into that training's group.
    """
    import wandb  # takes a second, which a run without it should not pay

    later = f"upload later with: wandb sync {folder}/wandb/offline-run-*"
    offline = os.environ.get("WANDB_MODE", "online") != "online" or not logged_in()
    if offline:
        print(
            "wandb is offline (no WANDB_API_KEY and no `wandb login`, or WANDB_MODE says so); "
            f"{later}",
            file=sys.stderr,
        )
    identity, keys = run_id(folder), flat(config)
    origin = next((o for key in CHECKPOINT_KEYS if (o := trained_by(keys.get(key)))), {})
    keys |= {f"trained_by/{name}": value for name, value in origin.items()}
    start = partial(
        wandb.init,
        project=wandb_config.project,
        name=wandb_config.name or folder.name,
        id=identity,
        group=os.environ.get("WANDB_RUN_GROUP") or origin.get("run_id", identity),
        dir=folder.resolve(),  # of its service, which may have another working folder
        resume="allow",
        config={key.replace(".", "/"): value for key, value in keys.items()},
    )
    settings = wandb.Settings(console="off", silent=offline)
    try:
        run = start(mode="offline" if offline else "online", settings=settings)
    except wandb.errors.CommError as error:
        if offline:
            raise
        reason = " ".join(str(error).split())
        print(
            f"note: wandb can't be reached ({type(error).__name__}: {reason}); this start goes on "
            f"offline: {later}",
            file=sys.stderr,
        )
        wandb.teardown()  # else its service takes the id for in use
        return start(mode="offline", settings=wandb.Settings(console="off", silent=True))
    if origin and not offline and wandb_config.artifacts != "none":
        _use_export(run, origin)
    return run


def trained_by(checkpoint: object) -> dict[str, str]:
    """Returns run_id, project and run_dir of the training that a checkpoint is of; else {}.

    checkpoint: a run directory, or what lies in it, such as export or checkpoints/last.ckpt.
    """
    path = Path(str(checkpoint))
    for folder in (path, *list(path.parents)[:2]):
        file, config = folder / "wandb" / "run_id", folder / "config.yaml"
        if file.is_file() and config.is_file() and (name := file.read_text("ascii").strip()):
            project = value_at(read_yaml_file(config), "wandb.project")
            return {"run_id": name, "project": str(project), "run_dir": str(folder)}
    return {}


def _use_export(run: Any, origin: Mapping[str, str]) -> None:
    """Names the training's export as the run's input; a note where wandb has none."""
    name = f"{origin['project']}/{origin['run_id']}-export:latest"
    try:
        run.use_artifact(name)
    except Exception as error:
        reason = " ".join(str(error).split())
        print(f"note: wandb has no artifact {name} ({reason:.200})", file=sys.stderr)


def logged_in() -> bool:
    """Whether a key for the wandb server is in the environment or in ~/.netrc."""
    return api_key() is not None


def base_url() -> str:
    """Returns the address of the wandb server."""
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")


def api_key() -> str | None:
    """Returns the key for the wandb server, of the environment or of ~/.netrc."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(base_url()).netloc)
    except (OSError, netrc.NetrcParseError):
        return None
    return known[2] if known else None


def run_id(folder: Path) -> str:
    """Returns the id of the folder's run, which wandb/run_id keeps."""
    path = folder / "wandb" / "run_id"
    name = path.read_text(encoding="ascii").strip() if path.exists() else ""
    if not name:  # an empty file is what a power failure leaves
        name = secrets.token_hex(4)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, name)
    return name
