"""One process at a time works in a run directory: two would write the same checkpoints.

The lock (data/files/lock.py) is on run_dir/.lock, so that a requeued job finds it free. A SLURM job
has a lock of its own as well, run_dir/.job.lock, from before its first task starts until its last
has ended.
"""

import sys
from pathlib import Path

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.lock import Lock

LOCK, JOB_LOCK = ".lock", ".job.lock"


class RunLock:
    """Holds a run directory for this process, from `acquire` to `release`."""

    def __init__(self, run_dir: Path, name: str = LOCK) -> None:
        self.run_dir = run_dir
        self._lock = Lock(run_dir / name)
        self.fileno, self.release = self._lock.fileno, self._lock.release

    def acquire(self) -> None:
        """Takes the lock, unless it is held already; raises UserError if another process has it.

        A file system without locks is used without; that is said.
        """
        if self._lock.is_held:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if not self._lock.acquire():
            raise UserError(
                f"run_dir={self.run_dir} is in use by another process ({self._lock.holder()}); "
                "wait for it, end it, or choose another run_dir"
            )
        if self._lock.missing:
            print(
                f"note: {self.run_dir} can't be locked ({self._lock.missing}): start no second job "
                "in it",
                file=sys.stderr,
            )
