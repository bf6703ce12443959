"""Laws of `data encode` and its source: latents are of the images that are there, or it says so."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.data.index.contents import DIGESTS_FILE, STAMPS_FILE
from blackpoint.data.index.index import INDEX_FOLDER, Index, build_index
from blackpoint.data.latents import DEFAULT_FORMATS, Encoding
from blackpoint.data.module import CaptionedImages
from blackpoint.data.shards.shard_file import ShardFile
from blackpoint.sampling.runtime.tasks import Task
from tests.damaged_data import OddSample, write_tar
from tests.data_images import encoded as image_bytes
from tests.data_images import picture
from tests.tiny_encode import encoded, stop_after
from tests.tiny_run import tiny_config


def write_source(folder: Path, noun: str = "cat", mirrored: bool = False) -> Path:
    """Writes six BMPs and their captions, long ago; all members keep their sizes."""
    samples = []
    for number in range(6):
        image: Image.Image = picture(number, (16, 16))
        content = image_bytes(ImageOps.mirror(image) if mirrored else image, "BMP")
        samples.append(OddSample(f"{number:03d}", "bmp", content, f"a {noun}".encode(), ""))
    folder.mkdir(exist_ok=True)
    write_tar(folder / "a.tar", samples)
    os.utime(folder / "a.tar", (1e9, 1e9))
    return folder


def reindex(folder: Path) -> None:
    shutil.rmtree(folder / INDEX_FOLDER)
    build_index(folder)


CHANGES: list[Callable[[Path], Path]] = [
    lambda folder: write_source(folder, "dog"),
    lambda folder: write_source(folder, mirrored=True),
]


@pytest.mark.parametrize("change", CHANGES, ids=["caption", "image"])
def test_latents_of_a_source_that_changed_are_not_taken_for_its_own(
    pipeline: Path, tmp_path: Path, change: Callable[[Path], Path]
) -> None:
    source, output = write_source(tmp_path / "source"), tmp_path / "out"
    assert encoded(source, pipeline, output).num_kept_shards == 0
    assert encoded(source, pipeline, output).num_kept_shards == 2
    change(source)  # with the times of before: only their bytes tell
    with pytest.raises(UserError, match="a.tar has changed since the index"):
        encoded(source, pipeline, output)
    reindex(source)
    with pytest.raises(UserError, match="it holds latents that were made with source_digest="):
        encoded(source, pipeline, output)
    shutil.rmtree(output)
    assert encoded(source, pipeline, output).num_kept_shards == 0


@pytest.mark.parametrize("change", CHANGES, ids=["caption", "image"])
def test_shards_that_are_kept_of_another_source_are_not_continued(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], Path]
) -> None:
    source, output = write_source(tmp_path / "source"), tmp_path / "out"
    stop_after(monkeypatch, 4, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(RunFailed):
        encoded(source, pipeline, output)
    monkeypatch.undo()
    change(source)
    with pytest.raises(UserError, match="a.tar has changed since the index"):
        encoded(source, pipeline, output)
    reindex(source)
    with pytest.raises(UserError, match="1 finished shards of a run with source_digest="):
        encoded(source, pipeline, output)


@pytest.mark.parametrize("task", [Task(), Task(1, 2, 1)], ids=["alone", "of two"])
def test_a_source_that_changes_meanwhile_is_found_before_the_output_is_whole(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task
) -> None:
    source, output = write_source(tmp_path / "source"), tmp_path / "out"
    build_index(source)
    monkeypatch.setattr("blackpoint.train.encode.encode.this_task", lambda: task)
    write = ShardFile.write

    def changing(self: ShardFile, key: str, members: dict[str, bytes]) -> Any:
        if key == "004":
            write_source(source, mirrored=True)
            os.utime(source / "a.tar", (1e9 + 1, 1e9 + 1))
        return write(self, key, members)

    monkeypatch.setattr(ShardFile, "write", changing)
    with pytest.raises(UserError, match="a.tar has changed since the index"):
        encoded(source, pipeline, output)
    assert not output.exists()


def test_a_source_that_moved_is_the_same(pipeline: Path, tmp_path: Path) -> None:
    source, output = write_source(tmp_path / "source"), tmp_path / "out"
    encoded(source, pipeline, output)
    shutil.copytree(source, tmp_path / "moved", copy_function=shutil.copyfile)
    assert encoded(tmp_path / "moved", pipeline, output).num_kept_shards == 2
    shutil.rmtree(tmp_path / "moved" / INDEX_FOLDER)
    assert encoded(tmp_path / "moved", pipeline, output).num_kept_shards == 2


def as_before_digests(source: Path, found: Path) -> None:
    """Gives latents, or the settings of a stopped run, the source's digest of sizes and places."""
    index = Index(source)
    places = index.places_digest([source / "a.tar"])
    for name in (DIGESTS_FILE, STAMPS_FILE):
        (source / INDEX_FOLDER / name).unlink()
    values = json.loads(found.read_text())
    values["source_digest"] = places
    found.write_text(json.dumps(values))


def test_latents_from_before_digests_are_adopted_once(
    pipeline: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, output = write_source(tmp_path / "source"), tmp_path / "out"
    encoded(source, pipeline, output)
    expected = Encoding.read(output)
    as_before_digests(source, output / "encoding.json")
    values = json.loads((output / "encoding.json").read_text())
    shapes = {name: tuple(values[name]) for name in ("moments_shape", "prompt_embeds_shape")}
    del values["key"]
    Encoding(**(values | shapes)).write(output, output)
    images = CaptionedImages(
        tiny_config(tmp_path / "run", pipeline, output).data, seed=0, batch_size=2
    )
    images.prepare_data()
    images.setup("fit")
    capfd.readouterr()
    assert encoded(source, pipeline, output).num_kept_shards == 2
    assert "made before its source was known by its content" in capfd.readouterr().err
    assert Encoding.read(output) == expected
    assert encoded(source, pipeline, output).num_kept_shards == 2
    assert "known by its content" not in capfd.readouterr().err


@pytest.mark.parametrize(("has_formats", "has_locks"), [(True, True), (False, True), (True, False)])
def test_shards_kept_from_before_digests_are_continued(
    pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    has_formats: bool,
    has_locks: bool,
) -> None:
    source, output = write_source(tmp_path / "source"), tmp_path / "out"
    encoded(source, pipeline, tmp_path / "unbroken")
    monkeypatch.setattr(Index, "content_digest", Index.places_digest)
    stop_after(monkeypatch, 4, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(RunFailed):
        encoded(source, pipeline, output)
    monkeypatch.undo()
    part = tmp_path / ".out.partial" / "parts" / "000000.part"
    header, _, rest = part.read_bytes().partition(b"\n")
    old = {name: value for name, value in json.loads(header).items() if name != "content"}
    part.write_bytes(json.dumps(old).encode() + b"\n" + rest)
    if not has_formats:  # nor were number formats recorded then
        settings = tmp_path / ".out.partial" / "settings.json"
        kept = json.loads(settings.read_text())
        settings.write_text(json.dumps({k: v for k, v in kept.items() if k not in DEFAULT_FORMATS}))
    if not has_locks:
        monkeypatch.setattr("fcntl.flock", refuse_lock)
    result = encoded(source, pipeline, output)
    assert "made before their source was known by its content" in capfd.readouterr().err
    assert result.num_kept_shards == 1 and result.num_samples == 6
    assert Index(output).digests == Index(tmp_path / "unbroken").digests
    assert Encoding.read(output) == Encoding.read(tmp_path / "unbroken")


def refuse_lock(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")
