"""Cells of a sweep whose prompts or weights change on the disk: other cells, and only then."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from blackpoint.scripts.sweep import content_digest
from blackpoint.scripts.sweep.content_digest import (
    BLOCK_BYTES,
    NUM_PIECES,
    PIECE_BYTES,
    digest_of_weights,
)
from tests.tiny_sweep import EVALUATE, cells


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    """Makes this process as one that has read nothing yet."""
    content_digest.digest_of_file.cache_clear()
    content_digest.digest_of_weights.cache_clear()


def identity(folder: Path, checkpoint: Path | str, prompts: object) -> tuple[Path, str]:
    """Returns the folder and the digest of a sweep's cell, as a new process finds them."""
    forget()
    settings = {**EVALUATE, "checkpoint": str(checkpoint), "prompts": prompts}
    [cell] = cells(folder, evaluate=settings)
    return cell.folder, cell.digest


def touch(path: Path) -> None:
    os.utime(path, (1, 1))


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_prompts_file_that_changes_makes_another_cell(tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.txt", b"a cat\n")
    before = identity(tmp_path, "model", str(prompts))
    touch(prompts)
    assert identity(tmp_path, "model", str(prompts)) == before
    write(prompts, b"a dog\n")
    after = identity(tmp_path, "model", str(prompts))
    assert after[0] != before[0] and after[1] != before[1]


def test_weights_that_change_make_another_cell(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write(model / "model_index.json", b"{}")
    weights = write(model / "unet" / "diffusion_pytorch_model.safetensors", b"one")
    scheduler = write(model / "scheduler" / "scheduler_config.json", b"{}")
    found = [identity(tmp_path, model, "a cat")]
    touch(weights)
    write(model / "README.md", b"words")
    assert identity(tmp_path, model, "a cat") == found[0]
    write(weights, b"two")
    found.append(identity(tmp_path, model, "a cat"))
    write(scheduler, b'{"timestep_spacing": "trailing"}')
    found.append(identity(tmp_path, model, "a cat"))
    assert len({folder for folder, _ in found}) == len({digest for _, digest in found}) == 3


def test_what_is_not_on_the_disk_leaves_cells_what_they_were(tmp_path: Path) -> None:
    """Their names are those of sweeps that were begun before contents were looked at."""
    for prompts in ("a cat", ["a cat"]):
        assert content_digest.content_digests(prompts, "owner/model", "ema") == {}
    assert content_digest.content_digests("long " * 1000, None, "ema") == {}


def test_of_a_run_directory_what_is_loaded_counts(tmp_path: Path) -> None:
    def digest(weights: str) -> str | None:
        forget()
        return digest_of_weights(tmp_path, weights)

    assert digest("ema") is None
    write(tmp_path / "checkpoints" / "step_00000001.ckpt", b"first")
    first = digest("ema")
    assert first is not None and digest("raw") == first
    write(tmp_path / "checkpoints" / "step_00000002.ckpt", b"second")
    second = digest("ema")
    assert second not in (None, first)
    write(tmp_path / "export" / "model_index.json", b"{}")
    write(tmp_path / "export" / "unet" / "model.safetensors", b"exported")
    assert digest("ema") not in (None, first, second) and digest("raw") == second


def test_of_large_files_pieces_all_over_them_are_read(tmp_path: Path) -> None:
    size = 8 * NUM_PIECES * PIECE_BYTES
    path = write(tmp_path / "large.ckpt", bytes(size))
    assert size > BLOCK_BYTES and sum(map(len, content_digest._pieces(path, size))) < size / 4

    def digest(content: bytes) -> str | None:
        forget()
        return digest_of_weights(write(path, content), "ema")

    zeros = digest(bytes(size))
    assert digest(bytes(size)) == zeros
    found = {zeros, digest(bytes(size + 1)), digest(b"1" + bytes(size - 1))}
    assert len(found | {digest(bytes(size - 1) + b"1"), digest(b"\1" * size)}) == 5
