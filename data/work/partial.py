"""The folder beside an output in which it grows, and from which a stopped run is continued.

`.NAME.partial` holds what becomes the output (`shards/`), a part file for each finished shard
(`parts/`), the settings of the run, and a lock that its process holds. It is removed when the
output is whole, and when a run ends before there is a finished shard to keep.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from blackpoint.data.files.errors import UserError, disk_writes


class Partial:
    """A pack that is under way, as a context manager; only one process has it at a time.

    Raises UserError if another process has it, or if a run with other settings was stopped here.
    """

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.output, self.settings = output, settings
        self.target = output.absolute()
        self.folder = self.target.parent / f".{self.target.name}.partial"
        self.shards, self.parts = self.folder / "shards", self.folder / "parts"
        self.working: Path
        self.is_finished = False
        self._lock = -1

    def __enter__(self) -> "Partial":
        try:
            self._take_lock()
            try:
                refuse_used_output(self.output)
                self._check_settings()
                self._clear()
            except BaseException:
                if not self.num_finished():
                    shutil.rmtree(self.folder, ignore_errors=True)
                self._release()
                raise
        except OSError as error:
            raise UserError(f"output={self.output}: can't be written: {error.strerror}.") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.is_finished or not self.num_finished():
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            shutil.rmtree(self.working, ignore_errors=True)
            print(
                f"{self.num_finished()} finished shards are kept in {self.folder}: "
                "the same command continues",
                file=sys.stderr,
            )
        self._release()

    def num_finished(self) -> int:
        """Counts the shards that have a part file."""
        return len(list(self.parts.glob("*.part")))

    def megabytes(self) -> float:
        """Returns the size of the finished shards in 10^6 bytes."""
        return sum(path.stat().st_size for path in self.shards.glob("*.tar")) / 1e6

    def finish(self) -> None:
        """Gives the shards the output's name; raises WriteFailed."""
        with disk_writes():
            self.shards.rename(self.target)
        self.is_finished = True

    def _take_lock(self) -> None:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "lock"
            self._lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._release()
                raise UserError(
                    f"output={self.output}: another process is packing there (it holds {path}). "
                    "Wait for it, or name another output."
                ) from None
            except OSError as error:
                print(
                    f"{self.folder}: can't be locked ({error.strerror}): "
                    "see to it that no other process packs there",
                    file=sys.stderr,
                )
            # Whoever held the lock may have removed the folder since: then this is no lock.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(self._lock).st_ino:
                    return
            self._release()

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _check_settings(self) -> None:
        if not self.num_finished():
            return
        here = f"output={self.output}: {self.folder} holds {self.num_finished()} finished shards"
        other = different_settings(self.folder, self.settings)
        if other:
            raise UserError(
                f"{here} of a run with {', '.join(other)}. Continue it with those settings, "
                "or remove that folder to begin anew."
            )
        print(f"found {self.num_finished()} finished shards in {self.folder}", file=sys.stderr)

    def _clear(self) -> None:
        """Leaves nothing of an earlier process but finished shards, and makes the folders."""
        for folder in (self.shards, self.parts):
            folder.mkdir(exist_ok=True)
        # A worker may outlive its killed parent for a moment. Its folder is renamed first, so that
        # it can't move into place what it ends meanwhile; ours has a name that it does not know.
        for folder in self.folder.glob("working-*"):
            shutil.rmtree(folder.rename(self.folder / f"old-{folder.name}"))
        for folder in (*self.folder.glob("old-*"), *self.shards.glob("*index*")):
            shutil.rmtree(folder)
        self.working = Path(tempfile.mkdtemp(prefix="working-", dir=self.folder))
        settings = self.working / "settings.json"
        settings.write_text(json.dumps(self.settings, indent=1) + "\n")
        settings.replace(self.folder / "settings.json")


def different_settings(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Returns "name=there (now here)" of each setting that a stopped run does not share."""
    try:
        found = json.loads((folder / "settings.json").read_text())
    except (OSError, ValueError):
        found = {}
    return [
        f"{name}={found.get(name)} (now {value})"
        for name, value in settings.items()
        if found.get(name) != value
    ]


def refuse_used_output(output: Path) -> None:
    """Raises UserError unless `output` is absent or an empty folder that can be replaced."""
    if output.is_dir():
        if any(output.iterdir()):
            raise UserError(f"output={output}: is not empty. Name another folder or empty it.")
        if output.is_mount():
            raise UserError(f"output={output}: is a mount point. Name a folder inside it.")
    elif output.exists():
        raise UserError(f"output={output}: is a file. Name a folder.")
