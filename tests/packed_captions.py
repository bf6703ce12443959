"""Folders of images without captions, and what the shards that were packed from one hold."""

import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from blackpoint.data.files.errors import UserError
from blackpoint.data.index.index import Index
from blackpoint.data.pack.pack import PackConfig, PackResult, pack
from blackpoint.data.reader import Reader
from blackpoint.data.shards.listing import find_shards
from tests.data_images import encoded, picture

Sample = tuple[bytes, tuple[str, ...]]


def write_images(folder: Path, names: list[str]) -> dict[str, bytes]:
    """Writes a PNG under each name and returns their bytes."""
    contents = {name: encoded(picture(number)) for number, name in enumerate(names)}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return contents


def write_parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int = 1000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)


def packed(source: Path | str, output: Path, **options: Any) -> PackResult:
    return pack(PackConfig(str(source), str(output), **({"num_processes": 1} | options)))


def reader_of(shards: Path, **options: Any) -> Reader:
    options = {"seed": 0, "resolution": 8} | options
    return Reader(Index(shards), find_shards(str(shards)), **options)


def samples_of(shards: Path) -> dict[str, Sample]:
    """Returns the image and the captions of each key."""
    reader = reader_of(shards)
    return {reader.key(number): reader.members(number) for number in range(len(reader))}


def captions_of(shards: Path) -> dict[str, tuple[str, ...]]:
    return {key: captions for key, (_, captions) in samples_of(shards).items()}


def message(source: Path, output: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        packed(source, output, **options)
    assert not output.exists()
    return str(error.value)


def remedies(text: str) -> list[dict[str, str]]:
    """Returns the settings that a message proposes."""
    return [
        {name: value.strip("'")}
        for name, value in re.findall(r"(captions(?:_file)?)=('[^']*'|\w+)", text)
    ]


def image_rows(numbers: range) -> list[dict[str, Any]]:
    """Returns rows as Hugging Face's datasets hold them, every second image a JPEG."""
    return [
        {
            "image": {"bytes": encoded(picture(n), "JPEG" if n % 2 else "PNG"), "path": None},
            "text": f"row {n}",
        }
        for n in numbers
    ]
