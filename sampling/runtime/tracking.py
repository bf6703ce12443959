"""One run at Weights & Biases for a folder, however often its command starts again."""

import netrc
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.whole_file import write_whole

NOT_IN_PROJECT, MAX_PROJECT_CHARACTERS = "/\\#?%:", 128
"""Characters that wandb refuses in a project's name, when the run starts."""


@dataclass
class WandbConfig:
    """Weights & Biases: online when logged in and reachable, else offline in wandb/ there."""

    enabled: bool = True
    """Log to wandb beside the files."""
    project: str = "blackpoint"
    """Project that the run appears in."""
    name: str | None = None
    """Name of the run there; the folder's name if not set."""

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

    Says so on stderr then, and how to upload later. Call `.finish()` on it at the end.
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
    start = partial(
        wandb.init,
        project=wandb_config.project,
        name=wandb_config.name or folder.name,
        id=run_id(folder),
        dir=folder,
        resume="allow",
        config=dict(config),
    )
    settings = wandb.Settings(console="off", silent=offline)
    try:
        return start(mode="offline" if offline else "online", settings=settings)
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


def logged_in() -> bool:
    """Whether a key for the wandb server is in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def run_id(folder: Path) -> str:
    """Returns the id of the folder's run, which wandb/run_id keeps."""
    path = folder / "wandb" / "run_id"
    name = path.read_text(encoding="ascii").strip() if path.exists() else ""
    if not name:  # an empty file is what a power failure leaves
        name = secrets.token_hex(4)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, name)
    return name
