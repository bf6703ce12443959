"""Laws of `data check`: what it counts is there, and what it writes is what training reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from blackpoint.data.check.check import CheckConfig, check
from blackpoint.data.check.report import CheckReport
from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.data.index.index import Index, IndexWriter, build_index
from blackpoint.data.reader import Reader
from blackpoint.data.shards.listing import ENCODING_FILE
from blackpoint.data.shards.tar_samples import split_name
from blackpoint.scripts.cli import main
from tests.damaged_data import (
    END,
    OddSample,
    good_samples,
    member,
    noise,
    sample_members,
    write_tar,
)
from tests.data_images import encoded
from tests.interleaved import killed_at, other_process_at


def checked(folder: Path, **options: object) -> CheckReport:
    return check(CheckConfig(str(folder), num_processes=1, **options))  # type: ignore[arg-type]


def gray(key: str, level: int, caption: str, size: tuple[int, int] = (16, 16)) -> OddSample:
    image = encoded(Image.new("RGB", size, (level, level, level)))
    return OddSample(key, "png", image, caption.encode(), "")


def test_counts_are_what_is_there(tmp_path: Path) -> None:
    captions = ["one", "two words", "word " * 80, "four", "five"]
    levels = [0, 10, 128, 250, 255]
    samples = [
        gray(f"k{n}", level, text, (8 * (n + 1), 32))
        for n, (level, text) in enumerate(zip(levels, captions, strict=True))
    ]
    write_tar(tmp_path / "a.tar", samples)
    report = checked(tmp_path, resolution=20)
    assert (report.num_samples, report.num_shards, report.bad) == (5, 1, [])
    assert report.num_bytes == (tmp_path / "a.tar").stat().st_size
    width, height = report.sizes["width"], report.sizes["height"]
    assert tuple(width[name] for name in ("minimum", "median", "maximum")) == (8, 24, 40)
    assert height["minimum"] == height["maximum"] == 32
    assert report.sizes["aspect"]["maximum"] == 1.25
    assert report.num_enlarged == 2
    assert report.luminance and report.captions
    assert report.luminance.histogram == [2, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert report.luminance.share_nearly_black == report.luminance.share_nearly_white == 0.4
    assert report.captions.words["maximum"] == 80 and report.captions.num_cut == 1
    assert report.captions.characters["minimum"] == 3


def test_every_kind_of_duplicate_is_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(np.tile(np.linspace(0, 255, 200).astype(np.uint8), (200, 1)))
    first = OddSample("a", "png", encoded(smooth), b"same", "")
    copy = OddSample("b", "png", first.image, b"same", "")
    smaller = OddSample("c", "jpg", encoded(smooth.resize((90, 90)), "JPEG", quality=90), b"x", "")
    flat = [gray("d", 99, "y"), gray("e", 99, "z", (20, 20))]
    write_tar(tmp_path / "1.tar", [first, copy, smaller, *flat])
    write_tar(tmp_path / "2.tar", good_samples(1, 1) + [OddSample("a", "png", *copy_of(rng), "")])
    copies = checked(tmp_path).copies
    assert {name: found.count for name, found in copies.items()} == {
        "images": 1,
        "near_images": 1,  # flat pictures are not compared
        "captions": 1,
        "keys": 1,
    }
    assert copies["images"].examples == [("1.tar:a", "1.tar:b")]
    assert copies["keys"].examples == [("1.tar:a", "2.tar:a")]


def copy_of(rng: np.random.Generator) -> tuple[bytes, bytes]:
    return encoded(noise(rng)), b"another"


def img2dataset(folder: Path) -> list[OddSample]:
    """Writes what img2dataset leaves behind: two shards, a table and statistics beside each."""
    samples = good_samples(5, 6)
    for shard in range(2):
        parts = []
        for number in range(3 * shard, 3 * shard + 3):
            key, sample = f"{shard:05d}{number:04d}", samples[number]
            meta = {
                "caption": sample.caption.decode(),
                "key": key,
                "width": 24,
                "status": "success",
            }
            parts.append(member(f"{key}.png", sample.image))
            if number % 3:  # the first of each has its caption in the .json only
                parts.append(member(f"{key}.txt", sample.caption))
            parts.append(member(f"{key}.json", json.dumps(meta).encode()))
        (folder / f"{shard:05d}.tar").write_bytes(b"".join(parts) + END)
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return samples


def test_shards_of_img2dataset_are_indexed_and_read(tmp_path: Path) -> None:
    samples = img2dataset(tmp_path)
    report = checked(tmp_path)
    assert report.index.state == "written" and not report.bad and report.num_samples == 6
    shards = sorted(tmp_path.glob("*.tar"))
    batch = Reader(Index(tmp_path), shards, seed=0, resolution=8).batch(range(6))
    assert sorted(batch["caption"]) == [sample.caption.decode() for sample in samples]
    written = (tmp_path / "index" / "records.npy").read_bytes()
    shutil.rmtree(tmp_path / "index")
    build_index(tmp_path)
    assert (tmp_path / "index" / "records.npy").read_bytes() == written
    assert checked(tmp_path).index.state == "valid"


@pytest.mark.parametrize(
    "name", ["a.jpg", "d/a.b.JPG", "a", ".jpg", "d.e/a.txt", "../x/a.png", "a."]
)
def test_names_are_split_as_webdataset_does(name: str) -> None:
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    assert split_name(name) == (None if key is None else (key, extension.lower()))


def test_an_index_that_does_not_fit_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", good_samples(0, 4))
    write_tar(tmp_path / "b.tar", good_samples(1, 4))
    checked(tmp_path)
    assert checked(tmp_path).index.state == "valid"

    def notes() -> str:
        state = checked(tmp_path).index
        assert state.state == "stale" and "check again" in state.notes[-1]
        return " ".join(state.notes)

    write_tar(tmp_path / "c.tar", good_samples(2, 4))
    assert "c.tar is not in it" in notes()
    (tmp_path / "c.tar").rename(tmp_path / "c")
    (tmp_path / "b.tar").rename(tmp_path / "b")
    assert "b.tar is in it but not in the folder" in notes()
    (tmp_path / "b").rename(tmp_path / "b.tar")
    write_tar(tmp_path / "a.tar", good_samples(0, 5))
    assert "a.tar had 20480 bytes when indexed" in notes() or "usable samples" in notes()
    records = tmp_path / "index" / "records.npy"
    records.write_bytes(records.read_bytes()[:-10])
    assert "can't be read" in notes()
    with pytest.raises(UserError, match="not those of 8 samples; remove"):
        Index(tmp_path).record(0)


def test_the_index_is_written_only_where_it_is_true_and_welcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "a.tar", good_samples(0, 4))
    write_tar(tmp_path / "b.tar", [*good_samples(1, 3), OddSample("x", "png", b"", b"x", "")])

    def note(pattern: Path, **options: object) -> str:
        state = checked(pattern, **options).index
        assert state.state == "absent" and not (tmp_path / "index").exists()
        return state.notes[0]

    assert "above max_bad_share=0.01" in note(tmp_path)
    assert "covers a whole folder" in note(tmp_path / "a.tar")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if target == tmp_path / "index":
            raise OSError(30, "Read-only file system")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    (tmp_path / "file").write_text("")
    nowhere = {"max_bad_share": 0.5, "cache_dir": str(tmp_path / "file" / "cache")}
    assert "can't be written to (Read-only file system)" in note(tmp_path, **nowhere)
    (tmp_path / "file").unlink()
    elsewhere = tmp_path.with_name(f"{tmp_path.name}_cache")
    kept = checked(tmp_path, max_bad_share=0.5, cache_dir=str(elsewhere)).index
    assert kept.state == "written" and Path(kept.folder).is_relative_to(elsewhere)
    assert len(Index(Path(kept.folder).parent)) == 7
    monkeypatch.undo()
    assert checked(tmp_path, max_bad_share=0.5).index.state == "written"
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "b.tar", "index"}


@pytest.mark.parametrize("write", [build_index, checked])
def test_what_a_stopped_copy_left_of_an_index_is_replaced(
    tmp_path: Path, write: Callable[[Path], object]
) -> None:
    write_tar(tmp_path / "a.tar", good_samples(1, 3))
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "records.npy").write_bytes(b"cut")
    write(tmp_path)
    assert len(Index(tmp_path)) == 3 and {f.name for f in tmp_path.iterdir()} == {"a.tar", "index"}


def test_several_processes_report_what_one_reports(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", good_samples(number, 3))
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:5000])
    one = checked(tmp_path)
    assert check(CheckConfig(str(tmp_path), num_processes=2)).as_json() == one.as_json()


def test_latents_are_counted_and_recognised(tmp_path: Path) -> None:
    tensors = {name: np.zeros((2, 3), np.float32) for name in ("moments", "prompt_embeds")}
    samples = [OddSample(f"k{n}", "safetensors", save(tensors), b"a caption", "") for n in range(3)]
    half = save({"moments": tensors["moments"]})
    samples += [OddSample("torn", "safetensors", save(tensors)[:50], b"x", "")]
    samples += [OddSample("half", "safetensors", half, b"x", "")]
    write_tar(tmp_path / "a.tar", samples)
    (tmp_path / ENCODING_FILE).write_text('{"resolution": 512, "crop": "center"}')
    report = checked(tmp_path)
    assert report.num_samples == 3 and report.encoding == {"resolution": 512, "crop": "center"}
    assert [sample.reason.split(":")[0] for sample in report.bad] == [
        "damaged .safetensors",
        "the .safetensors lacks prompt_embeds",
    ]
    assert not report.sizes and report.luminance is None
    assert report.index.state == "absent" and not (tmp_path / "index").exists()
    (tmp_path / ENCODING_FILE).write_text("{")
    assert "can't be read" in str(checked(tmp_path).encoding)


def test_the_command_prints_and_writes_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = OddSample("a\x1b[31m\udc80", "png", b"", b"x", "")
    content = b"".join(sample_members(sample) for sample in good_samples(0, 3))
    name = hostile.key.encode("utf-8", "surrogateescape").decode("latin-1")
    (tmp_path / "a.tar").write_bytes(content + member(f"{name}.png", b"") + END)
    command = ["data", "check", f"shards={tmp_path}", f"output={tmp_path / 'out'}"]
    assert main([*command, "num_processes=1", "resolution=32"]) == 0
    shown = capsys.readouterr().out
    for text in ("samples", "luminance", "captions", "duplicates", "no caption", "below 32 px"):
        assert text in shown, text
    assert "\x1b[31m" not in shown
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["num_samples"] == 3 and report["num_bad"] == 1
    assert report["bad_kinds"] == {"no caption": 1}
    assert report["index"]["state"] == "absent"


@pytest.mark.parametrize("full", ["records.npy", "keys.bin", "facts", "records.npy keys.bin facts"])
def test_a_full_disk_ends_the_check_in_one_line_and_leaves_nothing(
    tmp_path: Path,
    full: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_tar(tmp_path / "a.tar", good_samples(0, 4))
    plain_open = Path.open

    def open_full(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        is_full = path.name in full.split() and mode != "rb"
        return plain_open(Path("/dev/full") if is_full else path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_full)
    assert main(["data", "check", f"shards={tmp_path}", "num_processes=1"]) == 1
    shown = capsys.readouterr().err
    assert "could not write: No space left on device" in shown and "Traceback" not in shown
    if full != "facts":
        with pytest.raises(RunFailed, match="the disk is full; the index was not written"):
            build_index(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("next_process", ["check", "index"])
@pytest.mark.parametrize("killed", ["check", "index"])
def test_what_a_killed_process_left_is_removed_by_the_next(
    tmp_path: Path, killed: str, next_process: str
) -> None:
    write_tar(tmp_path / "a.tar", good_samples(0, 4))
    verbs: dict[str, Callable[[Path], Any]] = {"check": checked, "index": build_index}
    with killed_at(IndexWriter, "close"):
        verbs[killed](tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    with other_process_at(IndexWriter, "close", lambda: verbs[killed](tmp_path)):
        verbs[next_process](tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "index"]


def test_user_mistakes_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", good_samples(0, 1))

    def message(*overrides: str) -> str:
        assert main(["data", "check", *overrides]) == 2
        return capsys.readouterr().err

    bad = tmp_path / "bad"
    bad.mkdir()
    write_tar(bad / "a.tar", [OddSample("a", "png", b"no image", b"a cat", "")])
    assert f"shards={bad}: no sample can be used" in message(f"shards={bad}", "num_processes=1")

    assert "shards=" in message(f"shards={tmp_path / 'absent'}")
    assert "holds no .tar shards" in message(
        f"shards={(tmp_path / 'empty').mkdir() or tmp_path / 'empty'}"
    )
    there = f"shards={tmp_path}"
    assert "output=" in message(there, f"output={tmp_path / 'a.tar'}")
    assert "resolution=0 is out of range" in message(there, "resolution=0")
    assert "num_processes=-1 is out of range" in message(there, "num_processes=-1")
    assert "max_bad_share=2.0 is out of range" in message(there, "max_bad_share=2")
    assert "max_image_pixels=0 is out of range" in message(there, "max_image_pixels=0")
    (tmp_path / "empty" / "a.tar").write_bytes(END)
    with pytest.raises(UserError, match="1 shards hold no samples"):
        build_index(tmp_path / "empty")
