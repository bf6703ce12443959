"""One process at a time works in a run directory: two would write the same checkpoints.

The lock is the system's, on run_dir/.lock: it ends with its process, however that ends, so that a
requeued job finds it free; a child that is given its descriptor (pass_fds) holds it as long as it
lives. The file says who took it. A SLURM job has a lock of its own as well, run_dir/.job.lock, from
before its first task starts until its last has ended.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from blackpoint.data.files.errors import UserError

LOCK, JOB_LOCK = ".lock", ".job.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class RunLock:
    """Holds a run directory for this process, from `acquire` to `release`."""

    def __init__(self, run_dir: Path, name: str = LOCK) -> None:
        self.run_dir, self.name = run_dir, name
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Takes the lock, unless it is held already; raises UserError if another process has it.

        A file system without locks is used without; that is said.
        """
        if self._file is not None:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        file = (self.run_dir / self.name).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "it does not say who"
            file.close()
            raise UserError(
                f"run_dir={self.run_dir} is in use by another process ({holder}); wait for it, end "
                "it, or choose another run_dir"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"note: {self.run_dir} can't be locked ({error.strerror}): start no second job "
                "in it",
                file=sys.stderr,
            )
        file.truncate(0)
        file.write(_holder() + "\n")
        file.flush()
        self._file = file

    def fileno(self) -> int:
        """Returns the descriptor that holds the lock; raises ValueError where it is not held."""
        if self._file is None:
            raise ValueError(f"the lock of {self.run_dir} is not held")
        return self._file.fileno()

    def release(self) -> None:
        """Lets go, for children too; the file stays: removing it could remove another's lock."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = None


def _holder() -> str:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    who = {"host": platform.node(), "process": os.getpid(), "since": since}
    if os.environ.get("SLURM_JOB_ID"):
        who["job"] = os.environ["SLURM_JOB_ID"]
    return json.dumps(who)
