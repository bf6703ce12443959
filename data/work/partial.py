"""The folder beside an output in which it grows, and from which a stopped run is continued.

`.NAME.partial` holds what becomes the output (`shards/`), a part file for each finished shard
(`parts/`), half-written files (`working/`), and the settings of all who fill it.

    absent -> filling, by one process or more -> whole: `shards/` is given the output's name
                 |            ^
                 v            |  by the next process of the same settings
              left, with its finished shards; without any, the folder is removed

Each process at work holds a lock in `present/`; they enter and leave one by one (`gate`), and the
last to leave tidies up. Of a shared output a shard that was begun has a lock as well (`claims/`).

Locks save work and order who tidies up; no shard depends on them. A process that dies loses its
locks, and another takes its shard. Where a file system has no locks, two may write the same shard
of a shared output: the same bytes, each moved into place whole.
"""

import contextlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blackpoint.data.files.errors import RunFailed, UserError, WriteFailed, disk_writes
from blackpoint.data.files.lock import Lock, is_locked
from blackpoint.data.files.whole_file import flush_to_disk, write_whole
from blackpoint.data.work.part import Part, finished_part, part_path

OTHERS_FINISH_S = 5.0
NUM_TRIES = 3
SETTINGS = "settings.json"
EARLIER_LOCK = "lock"
"""Lock of processes of earlier versions at work."""


class Partial:
    """An output that is under way, as a context manager; of one process, or `shared` by several.

    Raises UserError if other settings are at work in the folder, or have finished shards in it;
    what `earlier` settings, which mean the same, have finished is taken over.
    """

    def __init__(
        self,
        output: Path,
        settings: dict[str, Any],
        earlier: dict[str, Any] | None = None,
        shared: bool = False,
    ) -> None:
        self.output, self.settings, self.earlier, self.shared = output, settings, earlier, shared
        self.target = Path(os.path.realpath(output))  # no folder takes the place of a link
        self.folder = folder_beside(output)
        self.shards, self.parts = self.folder / "shards", self.folder / "parts"
        self.claims, self.working = self.folder / "claims", self.folder / "working"
        self.has_locks = True
        self._presence = Lock(self.folder / "present" / uuid.uuid4().hex)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_presence": None}  # the parent's alone

    def __enter__(self) -> "Partial":
        try:
            # Without locks, the process that made the output may remove the folder meanwhile.
            for _ in range(NUM_TRIES):
                with self.alone():
                    try:
                        self._join()
                        return self
                    except FileNotFoundError:
                        if self.has_locks:
                            raise
        except (OSError, WriteFailed) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"output={self.output}: can't be written: {reason}") from None
        raise UserError(f"output={self.output}: {self.folder} is removed again and again")

    def __exit__(self, *error: object) -> None:
        if not self.folder.exists():
            return self._presence.release()
        with self.alone():
            num_finished = self.num_finished()
            if not self._other():
                # Without locks nobody knows who is last: only what is of no more use is removed.
                if self.is_whole or (self._knows_others and not num_finished):
                    shutil.rmtree(self.folder, ignore_errors=True)
                elif self._knows_others:
                    shutil.rmtree(self.working, ignore_errors=True)
                    print(
                        f"{num_finished} finished shards are kept in {self.folder}: "
                        "the same command continues",
                        file=sys.stderr,
                    )
            self._presence.release()

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

    def own_folder(self) -> Path:
        """Makes a folder for half-written files, whose name no other process knows."""
        folder = self.working / uuid.uuid4().hex
        with disk_writes():
            folder.mkdir()
        return folder

    @contextlib.contextmanager
    def claim(self, number: int, who: str) -> Iterator[bool]:
        """Tells whether a shard is the caller's to write, which it is inside the block."""
        lock = Lock(self.claims / f"{number:06d}")
        with disk_writes():
            is_ours = lock.acquire(who)
        try:
            if is_ours and self.has_locks:  # what a process that was killed left half-written
                for left in self.working.glob(f"*/*{number:06d}*"):
                    left.unlink(missing_ok=True)
            yield is_ours
        finally:
            lock.release()

    def claimant(self, number: int) -> str:
        """Returns who claimed a shard last, or ""."""
        try:
            return (self.claims / f"{number:06d}").read_text(errors="replace")
        except OSError:
            return ""

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Lets the processes through one by one."""
        gate = Lock(self.folder / "gate")
        while not gate.is_held:
            with disk_writes(), contextlib.suppress(FileNotFoundError):  # removed meanwhile
                self.folder.mkdir(parents=True, exist_ok=True)
                gate.acquire(wait=True)
        try:
            if gate.missing and self.has_locks:
                self.has_locks = False
                self._warn(gate.missing)
            yield
        finally:
            gate.release()

    def tidy(self) -> None:
        """Removes what a process that was killed at its end left beside a whole output."""
        if self.is_whole and self.folder.exists():
            with contextlib.suppress(OSError, WriteFailed), self.alone():
                if not self._other():
                    shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self) -> None:
        """Gives the shards the output's name; raises WriteFailed."""
        with disk_writes():
            for left in self.shards.glob(".*"):  # of the time when an index grew there
                shutil.rmtree(left, ignore_errors=True)
            flush_to_disk(path for path in self.shards.rglob("*") if path.suffix != ".tar")
            self.shards.rename(self.target)

    def failure(self, error: Exception, less_memory: str) -> RunFailed:
        """Returns an error with its cause, the finished part and the way to go on."""
        reason, remedy = str(error), f"run the same command again; {less_memory}"
        if isinstance(error, WriteFailed):
            reason = f"can't be written: {error}"
            remedy = "make room and run the same command again, or name another output"
        done = "nothing was kept" if self.shared else "nothing is left behind"
        done = f"no shard was finished, {done}"
        if num_shards := self.num_finished():
            done = f"{num_shards} shards ({self._megabytes():.1f} MB) were finished and are kept"
        return RunFailed(f"output={self.output}: {reason}; {done}; {remedy}")

    @property
    def _knows_others(self) -> bool:
        """Whether it is certain who else is here: of an output of one process, nobody."""
        return self.has_locks or not self.shared

    def _join(self) -> None:
        other = self._other()
        if not self.shared:
            if other:
                raise UserError(
                    f"output={self.output}: another process is packing there ({other}); "
                    "wait for it, or name another output"
                )
            refuse_used_output(self.output)
        is_first = self._knows_others and not other
        try:
            if is_first and not self.num_finished():
                for folder in (self.shards, self.parts, self.claims):
                    shutil.rmtree(folder, ignore_errors=True)
            elif self._knows_others or (self.folder / SETTINGS).exists():
                self._check_settings(is_first)
            if is_first:
                self._remove_half_written()
            if is_first or not self.has_locks:
                present = self._presence.path.parent
                for folder in (self.shards, self.parts, self.claims, self.working, present):
                    folder.mkdir(exist_ok=True)
                write_whole(self.folder / SETTINGS, json.dumps(self.settings, indent=1) + "\n")
            self._presence.acquire()
        except BaseException:
            if is_first and not self.num_finished():
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _other(self) -> str:
        """Returns the note of another process at work here; "" where there is none."""
        present = self._presence.path.parent
        for path in (self.folder / EARLIER_LOCK, *present.glob("*")):
            if path != self._presence.path and is_locked(path):
                return Lock(path).holder()
        return ""

    def _remove_half_written(self) -> None:
        # A worker may outlive its killed parent for a moment. Its folder is renamed first, so that
        # it can't move into place what it ends meanwhile; ours has a name that it does not know.
        for folder in self.folder.glob("working*"):
            folder.rename(self.folder / f"old-{uuid.uuid4().hex}")
        for folder in (*self.folder.glob("old-*"), *self.shards.glob("*index*")):
            shutil.rmtree(folder)
        shutil.rmtree(self._presence.path.parent, ignore_errors=True)

    def _check_settings(self, is_first: bool) -> None:
        here = f"{self.folder} holds {self.num_finished()} finished shards"
        is_earlier = self.earlier and not self._differences(self.earlier)
        other = self._differences(self.settings)
        if other and not self._knows_others:
            os.stat(self.folder / SETTINGS)  # gone: removed meanwhile, see __enter__
        if other and is_earlier and (is_first or not self.has_locks):
            print(
                f"note: {here}, made before their source was known by its content: they are kept",
                file=sys.stderr,
            )
            other = []
        if other and is_first:
            raise UserError(
                f"output={self.output}: {here} of a run with {', '.join(other)}; continue it with "
                "those settings, or remove that folder to begin anew"
            )
        if other:
            raise UserError(
                f"output={self.output}: another process is at work there with {', '.join(other)}; "
                "name another output, or join it with the same settings"
            )
        if self.num_finished():
            print(f"found {self.num_finished()} finished shards in {self.folder}", file=sys.stderr)

    def _differences(self, settings: dict[str, Any]) -> list[str]:
        """Returns "name=there (now here)" of each setting that the folder does not share."""
        try:
            there = json.loads((self.folder / SETTINGS).read_text())
        except (OSError, ValueError):
            there = {}
        return [
            f"{name}={there.get(name)} (now {value})"
            for name, value in settings.items()
            if there.get(name) != value
        ]

    def _warn(self, reason: str) -> None:
        what = "see to it that no other process packs there"
        if self.shared:
            what = "several processes may encode the same shards there, and what a killed one "
            what += "left half-written stays"
        print(f"{self.folder}: can't be locked ({reason}): {what}", file=sys.stderr)

    def _megabytes(self) -> float:
        """Returns the size of the finished shards in 10^6 bytes."""
        num_bytes = 0
        with contextlib.suppress(FileNotFoundError):  # another process has named the output
            for path in self.shards.glob("*.tar"):
                num_bytes += path.stat().st_size
        return num_bytes / 1e6


def folder_beside(output: Path) -> Path:
    """Returns where an output lies while it is filled: on the disk of what a link leads to."""
    target = Path(os.path.realpath(output))
    return target.parent / f".{target.name}.partial"


def refuse_used_output(output: Path) -> None:
    """Raises UserError unless `output` is absent or an empty folder that can be replaced."""
    if output.is_dir():
        if any(output.iterdir()):
            raise UserError(f"output={output}: is not empty; name another folder or empty it")
        if output.is_mount():
            raise UserError(f"output={output}: is a mount point; name a folder inside it")
    elif output.exists():
        raise UserError(f"output={output}: is a file; name a folder")
