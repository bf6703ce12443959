"""Laws of files that are written whole: what a killed writer left goes, what others write stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blackpoint.data.files.whole_file import whole_file, whole_folder, write_new, write_whole
from tests.interleaved import dead_process

KILLED = """
import os, signal, sys
from pathlib import Path
from blackpoint.data.files.whole_file import write_whole

os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
write_whole(Path(sys.argv[1]), "of the killed")
"""
ROOT = Path(__file__).resolve().parents[1]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "search.json")]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".tmp" and left.read_text() == "of the killed"
    others = [
        tmp_path / f".a.json.0123abcd.{os.uname().nodename}.{os.getppid()}.tmp",  # alive
        tmp_path / ".a.json.0123abcd.another-machine.1234567.tmp",
        tmp_path / f".a.json.0123abcd.gpu.{os.uname().nodename}.1234567.tmp",
        tmp_path / "mine.tmp",
    ]
    for path in others:
        path.write_text("kept")
    write_whole(tmp_path / "ledger.json", "{}")
    assert set(tmp_path.iterdir()) == {tmp_path / "ledger.json", *others}


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "new" / "a.json", "before")

    def replace(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(OSError, match="no"):
        write_whole(tmp_path / "new" / "a.json", "after")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]
    assert (tmp_path / "new" / "a.json").read_text() == "before"


def test_a_file_that_is_removed_while_it_is_written_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, tries = os.replace, []

    def robbed(source: Path, target: Path) -> None:
        tries.append(target)
        if len(tries) == 1:
            source.unlink()
        replace(source, target)

    monkeypatch.setattr("os.replace", robbed)
    write_whole(tmp_path / "a.json", "{}")
    assert (tmp_path / "a.json").read_text() == "{}" and len(tries) == 2


@pytest.mark.parametrize("has_links", [True, False])
def test_a_new_file_never_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    def link(*_: object) -> None:
        raise PermissionError("no links here")

    if not has_links:
        monkeypatch.setattr("os.link", link)
    write_new(tmp_path / "new" / "a.json", "first")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "new" / "a.json", "second")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]
    assert (tmp_path / "new" / "a.json").read_text() == "first"


def test_a_folder_appears_whole_and_what_killed_ones_left_goes(tmp_path: Path) -> None:
    host, dead, drawn = os.uname().nodename, dead_process(), "0123abcd" * 4
    killed = tmp_path / f".partial-{host}-{dead}-{drawn}"
    alive = (f"{host}-{os.getppid()}", "elsewhere-7", f"{host}-{dead}-7")  # the last of HOST-DEAD
    others = [tmp_path / f".partial-{name}-{drawn}" for name in alive]
    for folder in (killed, *others):
        (folder / "out").mkdir(parents=True)
    with pytest.raises(KeyError), whole_folder(tmp_path / "out") as folder:
        (folder / "half").touch()
        raise KeyError
    assert set(tmp_path.iterdir()) == set(others)
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out", sync=True) as folder:
        (folder / "whole").touch()
        assert not list((tmp_path / "out").iterdir())
    assert set(tmp_path.iterdir()) == {tmp_path / "out", *others}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


def test_a_file_that_is_written_piece_by_piece_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with pytest.raises(KeyError), whole_file(path) as unfinished:
        unfinished.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    with whole_file(path, sync=True) as unfinished:
        unfinished.write_bytes(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path]
