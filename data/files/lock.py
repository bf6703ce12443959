"""Locks among all processes and threads of all machines that share a disk; one file each.

A lock is the system's (`filelock.lock_descriptor`): it ends with its process, however that ends,
and a child that is given its descriptor (`pass_fds`) holds it as long as it lives. The file says
who took the lock, and stays when it is released.
"""

import contextlib
import errno
import json
import os
import platform
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from io import FileIO
from pathlib import Path

from filelock import lock_descriptor, unlock_descriptor

from blackpoint.data.files.signals import sleep

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
POLL_S = 0.05


class Lock:
    """The lock on one file, which is made where it is absent; its folder is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.missing = ""
        """Why the file system gives no locks: this one then keeps nobody away."""
        self._file: FileIO | None = None

    def acquire(self, holder: str | None = None, wait: bool = False) -> bool:
        """Takes the lock; returns False where another has it and `wait` is not set.

        `holder` is written into the file, by default host, process, time and job; "" leaves the
        file as it is. Raises OSError where the file can't be made.
        """
        while True:
            file = self.path.open("a+b", buffering=0)
            try:
                if not self._lock(file.fileno(), wait):
                    file.close()
                    return False
                # Whoever held the lock may have removed the file since: then this is no lock.
                is_there = _is_open_at(file.fileno(), self.path)
            except BaseException:
                file.close()
                raise
            if is_there:
                break
            file.close()
        self._file = file
        if holder != "":
            file.truncate(0)
            file.write((_this_process() if holder is None else holder).encode())
        return True

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._file is not None

    def holder(self) -> str:
        """Returns the holder's note on itself, or the last holder's."""
        with contextlib.suppress(OSError):
            text = self.path.read_text(encoding="utf-8", errors="replace")
            return text.strip() or "it does not say who"
        return "it does not say who"

    def fileno(self) -> int:
        """Returns the descriptor that holds the lock; raises ValueError where it is not held."""
        if self._file is None:
            raise ValueError(f"the lock {self.path} is not held")
        return self._file.fileno()

    def release(self) -> None:
        """Lets go, also for children that share the descriptor; does nothing where it is free."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                unlock_descriptor(self._file.fileno())
            self._file.close()
            self._file = None

    def _lock(self, descriptor: int, wait: bool) -> bool:
        self.missing = ""
        try:
            while not lock_descriptor(descriptor, blocking=False):
                if not wait:
                    return False
                time.sleep(POLL_S)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self.missing = error.strerror or str(error)
        return True


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Holds the lock on `path` inside the block; waiting for it is a safe point for signals.

    Raises BlockingIOError where another has it and `wait` is not set, and OSError where the file
    system has no locks: for work that must never be done twice at once.
    """
    lock = Lock(path)
    while not lock.acquire():
        if not wait:
            raise BlockingIOError(errno.EWOULDBLOCK, "is locked", str(path))
        sleep(POLL_S)
    try:
        if lock.missing:
            raise OSError(errno.ENOLCK, lock.missing, str(path))
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Tells whether anyone holds a lock; also False where the file system has no locks."""
    lock = Lock(path)
    if not path.exists():
        return False
    is_free = lock.acquire(holder="")
    lock.release()
    return not is_free


def _is_open_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


def _this_process() -> str:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    who = {"host": platform.node(), "process": os.getpid(), "since": since}
    if os.environ.get("SLURM_JOB_ID"):
        who["job"] = os.environ["SLURM_JOB_ID"]
    return json.dumps(who) + "\n"
