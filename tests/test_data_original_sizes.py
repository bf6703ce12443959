"""Sizes that pictures had before img2dataset resized and stored them: from its .json to SDXL.

The members are those of img2dataset's writer (webdataset): jpg, txt, json, whose original_width and
original_height are the downloaded picture's, width and height the stored one's.
"""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from blackpoint.data.config import DataConfig
from blackpoint.data.identity import differences, identity
from blackpoint.data.images.decode import DECODER_VERSION
from blackpoint.data.images.picture_size import PictureSize, size_before_storing
from blackpoint.data.index.contents import write_digests
from blackpoint.data.index.index import Index, build_index
from blackpoint.data.module import CaptionedImages
from blackpoint.data.pack.pack import PackConfig, pack
from blackpoint.data.reader import Reader
from tests.data_images import encoded, picture
from tests.shard_server import serving
from tests.tiny_encode import encoded as encode_shards
from tests.tiny_sdxl import make_tiny_sdxl

STORED = (40, 20)
ORIGINALS = [(4000, 2000), None, (80, 40)]
"""Of three samples; the second's .json has none, as img2dataset's of a picture that failed."""
ALL: dict[str, Any] = {"resolution": 16, "crop": "center"}


def metadata(number: int) -> bytes:
    original = ORIGINALS[number]
    fields = {"caption": f"a {number}", "key": f"{number:09d}", "width": 40, "height": 20}
    names = ("original_width", "original_height")
    return json.dumps(fields | dict(zip(names, original or (None, None), strict=True))).encode()


def members(number: int) -> dict[str, bytes]:
    image = encoded(picture(number, STORED), "JPEG")
    return {"jpg": image, "txt": f"a {number}".encode(), "json": metadata(number)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tar as img2dataset writes it, indexed."""
    folder = tmp_path_factory.mktemp("shards")
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(3):
            for suffix, content in members(number).items():
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert build_index(folder) == []
    return folder


def reader_of(folder: Path, **options: Any) -> Reader:
    return Reader(Index(folder), sorted(folder.glob("*.tar")), 0, **(ALL | options))


def before_the_sizes(shards: Path, folder: Path) -> Path:
    """Copies shards with an index as it was written before sizes were read."""
    shutil.copytree(shards, folder)
    (folder / "index" / "original_sizes.bin").unlink()
    path = folder / "index" / "shards.json"
    description = json.loads(path.read_text())
    assert description.pop("original_sizes") is True
    path.write_text(json.dumps(description, indent=1) + "\n")
    assert write_digests([folder / "index"], folder / "index", Index(shards).digests)
    return folder


def test_the_size_of_a_sample_is_the_downloaded_pictures(shards: Path) -> None:
    """40 x 20 is resized to 32 x 16, whose middle begins at 8; a mixture counts from an offset."""
    index = Index(shards)
    assert [index.original_size(number) for number in range(3)] == ORIGINALS
    reader = reader_of(shards, offset=7)
    sizes = [reader.read(0, 7 + number, False)[0].size for number in range(3)]
    corner = (0, 8, 16, 16)
    assert sizes == [PictureSize(*before, *corner) for before in ((2000, 4000), (20, 40), (40, 80))]


def test_flips_buckets_and_workers_keep_it(shards: Path) -> None:
    values: dict[str, Any] = {"crop": "random", "flip": True, "num_workers": 2}
    config = DataConfig(str(shards), resolution=16, **values)
    config.buckets.enabled, config.buckets.step_px = True, 8
    images = CaptionedImages(config, seed=0, batch_size=1)
    images.prepare_data()
    loader, found = iter(images.train_dataloader()), {}
    for batch in (next(loader) for _ in range(6)):
        found[int(batch["index"])] = batch["sizes"][0].tolist()
    assert [found[number][:2] for number in range(3)] == [[2000, 4000], [20, 40], [40, 80]]
    assert {tuple(sizes[4:]) for sizes in found.values()} == {(8, 24)}


def test_packed_folders_of_img2dataset_keep_it(tmp_path: Path, shards: Path) -> None:
    """Its output_format=files; and what was packed is indexed by others as here."""
    for number in range(3):
        for suffix, content in members(number).items():
            path = tmp_path / "in" / "00000" / f"{number:09d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    options = {"num_processes": 1, "samples_per_shard": 2}
    pack(PackConfig(str(tmp_path / "in"), str(tmp_path / "out"), **options))
    index = Index(tmp_path / "out")
    assert [index.original_size(number) for number in range(3)] == ORIGINALS
    packed = (tmp_path / "out" / "index" / "original_sizes.bin").read_bytes()
    shutil.rmtree(tmp_path / "out" / "index")
    build_index(tmp_path / "out")
    assert (tmp_path / "out" / "index" / "original_sizes.bin").read_bytes() == packed


def test_latents_hold_it(shards: Path, tmp_path: Path) -> None:
    model = make_tiny_sdxl(tmp_path / "sdxl")
    encode_shards(shards, model, tmp_path / "out", samples_per_shard=9)
    found = []
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            files = {name: tar.extractfile(name) for name in tar.getnames()}
            contents = [f.read() for name, f in files.items() if "safetensors" in name and f]
            found = [load(content)["sizes"] for content in contents]
    expected = [[2000, 4000, 0, 8, 16, 16], [20, 40, 0, 8, 16, 16], [40, 80, 0, 8, 16, 16]]
    assert torch.equal(torch.stack(found).long(), torch.tensor(expected))


def test_indexes_and_runs_of_before_stay_what_they_are(shards: Path, tmp_path: Path) -> None:
    """A run that began without goes on without; one of now does not take the other's index."""
    old = reader_of(before_the_sizes(shards, tmp_path / "old"))
    assert old.read(0, 0, False)[0].size[:2] == (20, 40)
    anew, continued = reader_of(shards), reader_of(shards, decoder=DECODER_VERSION)
    assert continued.read(0, 0, False)[0].size[:2] == (20, 40)
    then, of_now, again = ({"data.shards": identity(r)} for r in (old, anew, continued))
    assert differences(then, again) == []
    [reason] = differences(then, of_now)
    assert "has other original sizes (put the earlier index/ back" in reason
    digests = [Index(folder).digests for folder in (tmp_path / "old", shards)]
    assert digests[0] == digests[1] != {}


def test_an_index_without_any_is_as_before(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded(picture(0, STORED)))
    (tmp_path / "in" / "a.txt").write_text("a one")
    pack(PackConfig(str(tmp_path / "in"), str(tmp_path / "out"), num_processes=1))
    names = {path.name for path in (tmp_path / "out" / "index").iterdir()}
    assert "original_sizes.bin" not in names
    assert "original_sizes" not in (tmp_path / "out" / "index" / "shards.json").read_text()
    assert Index(tmp_path / "out").original_size(0) is None


def test_an_index_on_a_server_is_fetched_with_it(shards: Path, tmp_path: Path) -> None:
    with serving(shards) as server:
        config = DataConfig(f"{server.url}/00000.tar", cache_dir=str(tmp_path / "cache"), **ALL)
        images = CaptionedImages(config, seed=0, batch_size=3)
        images.prepare_data()
        images.setup("fit")
        (reader,) = images.readers().values()
        assert reader.read(0, 0, False)[0].size[:2] == (2000, 4000)


def sides(width: object, height: object) -> bytes:
    return json.dumps({"original_width": width, "original_height": height}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"[1, 2]",
        b"null",
        b'{"width": 4000, "height": 2000}',
        sides(None, None),
        sides("4000", "2000"),
        sides(4000.5, 2000),
        sides(True, 2000),
        sides(0, 2000),
        sides(-4000, 2000),
        sides(1 << 40, 2000),
        sides(40, 20),
        sides(20, 40),  # EXIF turned it: img2dataset counts what is stored
    ],
    ids=lambda content: content[:40].decode(),
)
def test_what_says_nothing_is_the_stored_size(content: bytes) -> None:
    assert size_before_storing(content, *STORED) == (0, 0)
