"""A run's own copy of the code and of its config, which every later start runs: run_dir/frozen.

The working tree may be edited while a job waits in the queue; half of a run must not be trained by
other code. Files that a config names, such as shards, are not copied.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import CODE_ROOT
from blackpoint.data.files.whole_file import whole_folder, write_whole
from blackpoint.train.records.environment import GIT_RECORD, git_state
from blackpoint.train.records.run_lock import JOB_LOCK, LOCK, RunLock

CODE = ("data", "sampling", "train", "scripts", "slurm")
SUFFIXES = (".py", ".j2", ".css", ".js", ".html", ".sbatch")
CONFIG = "config.yaml"


def freeze(run_dir: Path, config_yaml: str) -> Path:
    """Copies the code that is running to run_dir/frozen, once, and the config; returns the folder.

    Whole or not there at all. The config must be one that continues the run: it replaces that of
    the start before. Raises UserError where run_dir can't be written.
    """
    folder = run_dir / "frozen"
    try:
        if folder.exists():
            write_whole(folder / CONFIG, config_yaml)
            return folder
        run_dir.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as part:
            write_whole(part / CONFIG, config_yaml)
            write_whole(part / GIT_RECORD, json.dumps(git_state(), indent=2) + "\n")
            for package in CODE:
                for source in sorted((CODE_ROOT / package).rglob("*")):
                    if source.suffix in SUFFIXES and "__pycache__" not in source.parts:
                        target = part / source.relative_to(CODE_ROOT)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(source, target)
    except OSError as error:
        raise _unwritable(run_dir, error) from None
    return folder


def is_frozen(root: Path) -> bool:
    """Whether `root` is a run's copy, and not the repository."""
    return (root / GIT_RECORD).exists()


def unfreeze(run_dir: Path) -> None:
    """Removes the copy of a run that never began, so that other input can be tried there."""
    shutil.rmtree(run_dir / "frozen", ignore_errors=True)


def remove_unused(run_dir: Path) -> None:
    """Removes a run directory that holds nothing but locks."""
    if run_dir.is_dir() and {path.name for path in run_dir.iterdir()} <= {LOCK, JOB_LOCK}:
        for name in (LOCK, JOB_LOCK):
            (run_dir / name).unlink(missing_ok=True)
        run_dir.rmdir()


@contextmanager
def only_job(run_dir: Path) -> Iterator[None]:
    """Keeps other jobs out of `run_dir`: they would remove or replace the copy that this one runs.

    Raises UserError where another job is in it, or where it can't be written.
    """
    lock = RunLock(run_dir, JOB_LOCK)
    try:
        lock.acquire()
    except OSError as error:
        raise _unwritable(run_dir, error) from None
    try:
        yield
    finally:
        lock.release()


def _unwritable(run_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"run_dir={run_dir}: can't be written ({error.strerror or error}); name a directory that "
        "is yours, on a disk that every node sees and that has room"
    )
