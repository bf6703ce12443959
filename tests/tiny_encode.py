"""Encodings that are over in seconds, and what they leave."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from blackpoint.data.index.contents import STAMPS_FILE
from blackpoint.data.shards.shard_file import ShardFile
from blackpoint.train.encode.encode import EncodeConfig, EncodeResult, encode

OPTIONS: dict[str, Any] = {"resolution": 16, "batch_size": 2, "samples_per_shard": 3}
OPTIONS |= {"num_workers": 0, "num_processes": 1, "device": "cpu"}


def encoded(shards: Path, pipeline: Path, output: Path, **options: Any) -> EncodeResult:
    return encode(EncodeConfig(str(shards), str(pipeline), str(output), **(OPTIONS | options)))


def arguments(shards: Path, pipeline: Path, output: Path, **options: Any) -> list[str]:
    settings = {"source": shards, "checkpoint": pipeline, "output": output} | OPTIONS | options
    return ["data", "encode", *(f"{name}={value}" for name, value in settings.items())]


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != STAMPS_FILE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def nothing_beside(output: Path) -> bool:
    return [path.name for path in output.parent.iterdir()] == [output.name]


def stop_after(monkeypatch: pytest.MonkeyPatch, num_samples: int, error: BaseException) -> None:
    """Makes the disk (or whatever raises) fail after so many samples are written, once."""
    write, numbers = ShardFile.write, itertools.count()

    def failing(self: ShardFile, *arguments: Any) -> Any:
        if next(numbers) == num_samples:
            raise error
        return write(self, *arguments)

    monkeypatch.setattr(ShardFile, "write", failing)
