"""Digests of files that the settings of a cell name, so that a changed file makes another cell.

Of a prompts file the whole content counts; of a model its weights, each file by its size and by
pieces all over it, since weights are gigabytes and a training changes all of them; and its
scheduler's settings. When a file was written does not count. Not looked at: a folder of prompts,
sets.reference, the checkpoints of verifiers, and what a training starts from.
"""

import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from blackpoint.sampling.checkpoints.loading import is_ckpt
from blackpoint.sampling.checkpoints.resolve import last_checkpoint
from blackpoint.sampling.checkpoints.single_file import SINGLE_FILE
from blackpoint.sampling.choices import LoraFile, Weights

PATTERNS = ("*.safetensors", "*.bin", "*.ckpt", "scheduler_config.json")
NUM_PIECES, PIECE_BYTES = 16, 64 * 1024
BLOCK_BYTES = 1 << 20
DIGEST_BYTES = 8


def content_digests(
    prompts: object,
    checkpoint: str | None,
    weights: Weights,
    loras: Sequence[LoraFile] | None = None,
) -> dict[str, str]:
    """Returns the digests of those of the arguments that name what is on the disk.

    weights: ema or raw, which decides what is loaded from a run directory. A hub id, a path that
    does not exist and prompts that are no file have no digest.
    """
    digests = {}
    if isinstance(prompts, str) and os.path.isfile(prompts):  # False for one too long for a path
        digests["prompts"] = digest_of_file(Path(prompts))
    if checkpoint is not None:
        digest = digest_of_weights(Path(checkpoint), weights)
        if digest is not None:
            digests["checkpoint"] = digest
    if there := [lora for lora in loras or () if Path(lora.path).exists()]:
        from blackpoint.sampling.checkpoints.merged import lora_digests

        digests["lora"] = " ".join(digest for digest, _ in lora_digests(there, weights))
    return digests


@functools.lru_cache
def digest_of_file(path: Path) -> str:
    """Returns the digest of a whole file; it is read once a process."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@functools.lru_cache
def digest_of_weights(checkpoint: Path, weights: str) -> str | None:
    """Returns the digest of what `evaluate` loads from a path, None where nothing is there; it is
    read once a process."""
    files = list(_files_of(checkpoint, weights))
    if not files:
        return None
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for file in files:
        size = file.stat().st_size
        name = file.suffix if checkpoint.is_file() and file != checkpoint else None
        digest.update(f"{name or file.relative_to(checkpoint)} {size}\n".encode())
        for piece in _pieces(file, size):
            digest.update(piece)
    return digest.hexdigest()


def _files_of(checkpoint: Path, weights: str) -> Iterable[Path]:
    """Lists what is loaded, as blackpoint.sampling.checkpoints.resolve.resolve does: of a run
    directory the export or the last checkpoint."""
    if checkpoint.is_file():
        beside = checkpoint.with_suffix(".yaml")  # which may tell what a single file predicts
        is_single = checkpoint.suffix == SINGLE_FILE and beside.is_file()
        return [checkpoint, beside] if is_single else [checkpoint]
    newest = last_checkpoint(checkpoint)
    for folder in (checkpoint, checkpoint / "export"):
        is_loaded = folder == checkpoint or weights == "ema"
        if is_loaded and (folder / "model_index.json").is_file():
            patterns = [
                f"{part}{pattern}" for pattern in PATTERNS for part in ("", "*/")
            ]  # ** skips links
            return sorted(file for pattern in patterns for file in folder.glob(pattern))
    newest = checkpoint if is_ckpt(checkpoint) else newest
    if newest is not None and newest.is_dir():  # sharded
        return sorted(newest.iterdir())
    return [newest] if newest else []


def _pieces(file: Path, size: int) -> Iterable[bytes]:
    """Yields evenly spaced pieces of a file, the first and the last included; a small one whole."""
    with file.open("rb") as opened:
        if size <= NUM_PIECES * PIECE_BYTES:
            yield opened.read()
            return
        for number in range(NUM_PIECES):
            opened.seek(number * (size - PIECE_BYTES) // (NUM_PIECES - 1))
            yield opened.read(PIECE_BYTES)
