"""Laws of locks: one holder, who is named, and who frees the lock however it ends."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blackpoint.data.files.lock import Lock, is_locked, locked


def test_a_lock_has_one_holder_who_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = Lock(path), Lock(path)
    assert not is_locked(path) and first.acquire() and is_locked(path)
    assert not second.acquire()
    assert json.loads(second.holder())["process"] == os.getpid()  # and was not overwritten
    with pytest.raises(BlockingIOError), locked(path, wait=False):
        pass
    first.release()
    assert not is_locked(path) and second.acquire()
    second.release()


def test_a_child_with_its_descriptor_holds_a_lock_to_its_end(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "lock")
    lock.acquire()
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[lock.fileno()])
    del lock  # as at the death of this process: closed, not released
    assert is_locked(tmp_path / "lock")
    child.kill()
    child.communicate()
    assert not is_locked(tmp_path / "lock")


def test_a_killed_holder_frees_its_lock(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from blackpoint.data.files.lock import Lock\n"
    code += "lock = Lock(Path(sys.argv[1])); lock.acquire(); os.kill(os.getpid(), 9)"
    root = Path(__file__).resolve().parents[1]
    path = tmp_path / "lock"
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=root).returncode == -9
    assert Lock(path).acquire()


def test_a_lock_whose_file_was_removed_is_none(tmp_path: Path) -> None:
    """Its holder removes it, and another takes one of the same name before it is let go."""
    path = tmp_path / "lock"
    first, second, third = (Lock(path) for _ in range(3))
    first.acquire()
    path.unlink()
    assert second.acquire() and not third.acquire()
    first.release()
    assert not third.acquire()


def test_rows_in_a_locked_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    with path.open("a") as file:
        lock = Lock(path)
        assert lock.acquire(holder="")
        file.write("{}\n")
    lock.release()
    assert path.read_text() == "{}\n{}\n"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_locks)
    lock = Lock(tmp_path / "lock")
    assert lock.acquire() and lock.missing == os.strerror(number)
    with pytest.raises(OSError, match=os.strerror(number)), locked(tmp_path / "lock"):
        pass
