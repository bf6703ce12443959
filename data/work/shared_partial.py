"""The folder beside an output that several processes, on any machines, fill together.

`.NAME.partial` holds what becomes the output (`shards/`), a part file for each finished shard
(`parts/`), a file to lock for each shard that was begun (`claims/`), half-written files
(`working/`) and the settings of all who fill it. A process that has the same settings joins,
whenever it comes; the last to leave removes what is no longer of use.

Locks save work and order who tidies up; no shard depends on them. A process that dies loses its
locks, and another takes its shard. Where a file system knows no locks, two may write the same
shard: the same bytes, each moved into place whole.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from blackpoint.data.files.errors import UserError, WriteFailed, disk_writes
from blackpoint.data.work.part import Part, finished_part, part_path
from blackpoint.data.work.partial import different_settings

OTHERS_FINISH_S = 5.0
NUM_TRIES = 3


class SharedPartial:
    """An output that is under way, as a context manager.

    Raises UserError if other settings are at work in the folder, or have finished shards in it;
    what `earlier` settings, which mean the same, have finished is taken over.
    """

    def __init__(
        self, output: Path, settings: dict[str, Any], earlier: dict[str, Any] | None = None
    ) -> None:
        self.output, self.settings, self.earlier = output, settings, earlier
        self.target = output.absolute()
        self.folder = folder_beside(output)
        self.shards, self.parts = self.folder / "shards", self.folder / "parts"
        self.claims, self.working = self.folder / "claims", self.folder / "working"
        self.has_locks = True
        self._presence = -1

    def __enter__(self) -> "SharedPartial":
        try:
            self._enter()
        except (OSError, WriteFailed) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"output={self.output}: can't be written: {reason}.") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.folder.exists():
            return self._leave()
        with self.alone():
            is_last = self._lock(self._presence, fcntl.LOCK_EX | fcntl.LOCK_NB)
            num_finished = self.num_finished()
            # Without locks nobody knows who is last: only what is of no more use is removed.
            if is_last and (self.is_whole or (self.has_locks and not num_finished)):
                shutil.rmtree(self.folder, ignore_errors=True)
            elif is_last and self.has_locks:
                shutil.rmtree(self.working, ignore_errors=True)
                print(
                    f"{num_finished} finished shards are kept in {self.folder}: "
                    "the same command continues",
                    file=sys.stderr,
                )
            self._leave()

    @property
    def is_whole(self) -> bool:
        """Tells whether the output is there: all are done."""
        return self.target.is_dir() and any(self.target.iterdir())

    def becomes_whole(self) -> bool:
        """Tells whether the output is there, or is within seconds.

        Without locks two processes can finish at once, and the one that is second stumbles over
        what the first is about to name.
        """
        deadline_s = time.monotonic() + (0 if self.has_locks else OTHERS_FINISH_S)
        while not self.is_whole and time.monotonic() < deadline_s:
            time.sleep(0.1)
        return self.is_whole

    def num_finished(self) -> int:
        """Counts the shards that have a part file."""
        try:
            return sum(name.endswith(".part") for name in os.listdir(self.parts))
        except FileNotFoundError:  # none yet, or removed by who was last to leave
            return 0

    def finished(self, number: int, digest: str) -> Part | None:
        """Returns the part of a shard that is finished and of this digest; else None."""
        return finished_part(self.parts, self.shards, number, digest)

    def has_part(self, number: int) -> bool:
        """Tells, without reading it, whether a shard has a part file."""
        return part_path(self.parts, number).exists()

    def megabytes(self) -> float:
        """Returns the size of the finished shards in 10^6 bytes."""
        num_bytes = 0
        with contextlib.suppress(FileNotFoundError):  # another process has named the output
            for path in self.shards.glob("*.tar"):
                num_bytes += path.stat().st_size
        return num_bytes / 1e6

    @contextlib.contextmanager
    def claim(self, number: int, who: str) -> Iterator[bool]:
        """Tells whether a shard is the caller's to write, which it is inside the block."""
        path = self.claims / f"{number:06d}"
        with disk_writes():
            file = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            is_ours = self._lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_ours:
                with disk_writes():
                    os.truncate(file, 0)
                    os.pwrite(file, who.encode(), 0)
                if self.has_locks:  # what a process that was killed left half-written
                    for left in self.working.glob(f"*/*{number:06d}*"):
                        left.unlink(missing_ok=True)
            yield is_ours
        finally:
            _unlock(file)

    def claimant(self, number: int) -> str:
        """Returns who claimed a shard last, or ""."""
        try:
            return (self.claims / f"{number:06d}").read_text(errors="replace")
        except OSError:
            return ""

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Lets the processes through one by one."""
        gate = self._open("gate", fcntl.LOCK_EX)
        try:
            yield
        finally:
            _unlock(gate)

    def finish(self) -> None:
        """Gives the shards the output's name; raises WriteFailed."""
        with disk_writes():
            for path in sorted(self.shards.rglob("*")):
                if path.is_file() and path.suffix != ".tar":  # tars are on the disk already
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            self.shards.rename(self.target)

    def _enter(self) -> None:
        # Without locks, the process that made the output may remove the folder meanwhile.
        for _ in range(NUM_TRIES):
            with self.alone():
                try:
                    return self._join()
                except FileNotFoundError:
                    if self.has_locks:
                        raise
        raise UserError(f"output={self.output}: {self.folder} is removed again and again.")

    def _join(self) -> None:
        self._presence = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR, 0o666)
        is_first = False
        try:
            is_first = self._lock(self._presence, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_first = is_first and self.has_locks
            if is_first and not self.num_finished():
                for folder in (self.shards, self.parts, self.claims):
                    shutil.rmtree(folder, ignore_errors=True)
            elif self.has_locks or (self.folder / "settings.json").exists():
                self._check_settings(is_first)
            if is_first:
                shutil.rmtree(self.working, ignore_errors=True)
            if is_first or not self.has_locks:
                for folder in (self.shards, self.parts, self.claims, self.working):
                    folder.mkdir(exist_ok=True)
                fresh = self.working / f"settings.json.{uuid.uuid4().hex}"
                fresh.write_text(json.dumps(self.settings, indent=1) + "\n")
                fresh.replace(self.folder / "settings.json")
            self._lock(self._presence, fcntl.LOCK_SH)
        except BaseException:
            if is_first and not self.num_finished():
                shutil.rmtree(self.folder, ignore_errors=True)
            self._leave()
            raise

    def _check_settings(self, is_first: bool) -> None:
        here = f"{self.folder} holds {self.num_finished()} finished shards"
        is_earlier = self.earlier and not different_settings(self.folder, self.earlier)
        other = different_settings(self.folder, self.settings)
        if other and not self.has_locks:
            os.stat(self.folder / "settings.json")  # gone: removed meanwhile, see _enter
        if other and is_earlier and (is_first or not self.has_locks):
            print(
                f"note: {here}, made before their source was known by its content: they are kept",
                file=sys.stderr,
            )
            other = []
        if other and is_first:
            raise UserError(
                f"output={self.output}: {here} of a run with {', '.join(other)}. Continue it with "
                "those settings, or remove that folder to begin anew."
            )
        if other:
            raise UserError(
                f"output={self.output}: another process is at work there with {', '.join(other)}. "
                "Name another output, or join it with the same settings."
            )
        if self.num_finished():
            print(f"found {self.num_finished()} finished shards in {self.folder}", file=sys.stderr)

    def _open(self, name: str, operation: int) -> int:
        """Returns the locked file `name` of the folder, which is made where it is absent."""
        while True:
            with disk_writes():
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    file = os.open(self.folder / name, os.O_CREAT | os.O_RDWR, 0o666)
                except FileNotFoundError:  # removed since, by the last to leave
                    continue
            self._lock(file, operation)
            # Whoever held the lock may have removed the folder since: then this is no lock.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self.folder / name).st_ino == os.fstat(file).st_ino:
                    return file
            os.close(file)

    def _lock(self, file: int, operation: int) -> bool:
        """Tells whether the lock was had; without locks it always is."""
        try:
            fcntl.flock(file, operation)
        except BlockingIOError:
            return False
        except OSError as error:
            if self.has_locks:
                self.has_locks = False
                print(
                    f"{self.folder}: can't be locked ({error.strerror}): several processes may "
                    "encode the same shards there, and what a killed one left half-written stays",
                    file=sys.stderr,
                )
        return True

    def _leave(self) -> None:
        if self._presence >= 0:
            _unlock(self._presence)
            self._presence = -1


def folder_beside(output: Path) -> Path:
    """Returns where an output lies while it is filled."""
    target = output.absolute()
    return target.parent / f".{target.name}.partial"


def _unlock(file: int) -> None:
    """Gives a lock back, also for the loader's processes, which share the open file."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)
