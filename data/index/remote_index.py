"""Files beside remote shards, brought here: their index and, of latents, the encoding."""

import contextlib
import sys
from contextlib import ExitStack
from pathlib import Path

from blackpoint.data.files.errors import RunFailed, Unreachable, UserError, WriteFailed, disk_writes
from blackpoint.data.files.lock import locked
from blackpoint.data.files.whole_file import scratch_folder, whole_file, write_whole
from blackpoint.data.index.contents import DIGESTS_FILE, ORIGINALS, ORIGINALS_FILE
from blackpoint.data.index.index import INDEX_FOLDER, Index, has_index
from blackpoint.data.shards.listing import EMPTY_FILE, ENCODING_FILE
from blackpoint.data.shards.remote import Refused, facts, fetch, read_bytes, shown
from blackpoint.data.shards.remote_shards import server_stamp

RECORDS_STAMP = "records.stamp"
INDEX_FILES = ("records.npy", "keys.bin")
TRIES_WITH_A_COPY = 3


def fetch_index(folder: str, query: str, kept: Path) -> None:
    """Brings `kept` up to date with a folder's URL; leaves it alone if nothing is there.

    If the server does not answer, what is here already is used, which is said. Raises UserError
    for an index that can't be used, or where `kept` can't be written, Unreachable and RunFailed.
    """
    try:
        kept.mkdir(parents=True, exist_ok=True)
        with locked(kept / "lock"):
            _bring(folder, query, kept)
    except Unreachable as error:
        if not has_index(kept):
            raise
        print(f"{error}; the index in {kept} is used as it is", file=sys.stderr, flush=True)
    except WriteFailed as error:
        raise RunFailed(f"{kept}: can't be written: {error}; set cache_dir elsewhere") from None
    except OSError as error:
        raise UserError(
            f"{kept}: can't be written: {error.strerror}; set cache_dir to a folder that you may "
            "write"
        ) from None


def _bring(folder: str, query: str, kept: Path) -> None:
    tries = TRIES_WITH_A_COPY if has_index(kept) else None
    description = _optional(f"{folder}/{INDEX_FOLDER}/shards.json{query}", tries)
    encoding = _optional(f"{folder}/{ENCODING_FILE}{query}", tries)
    if encoding is None:
        (kept / ENCODING_FILE).unlink(missing_ok=True)
    elif not _holds(kept / ENCODING_FILE, encoding):
        _fetch(f"{folder}/{EMPTY_FILE}{query}", kept / EMPTY_FILE)
        _write(kept / ENCODING_FILE, encoding)
    digests = description and _optional(f"{folder}/{INDEX_FOLDER}/{DIGESTS_FILE}{query}", tries)
    stamp = ""
    if description and not digests:  # Sizes alone don't tell one index from another.
        with contextlib.suppress(FileNotFoundError):  # said below, where it is fetched
            found = facts(f"{folder}/{INDEX_FOLDER}/records.npy{query}", tries)
            stamp = server_stamp(found.num_bytes, found.version)
    if description is None or _is_kept(kept / INDEX_FOLDER, description, digests, stamp):
        return
    with ExitStack() as stack:
        with disk_writes():
            new = stack.enter_context(scratch_folder(kept))
            (new / INDEX_FOLDER).mkdir()
        for name in [*INDEX_FILES, *[ORIGINALS_FILE][: ORIGINALS.encode() in description]]:
            _fetch(f"{folder}/{INDEX_FOLDER}/{name}{query}", new / INDEX_FOLDER / name)
        if digests:
            _write(new / INDEX_FOLDER / DIGESTS_FILE, digests)
        _write(new / INDEX_FOLDER / RECORDS_STAMP, stamp.encode())
        _write(new / INDEX_FOLDER / "shards.json", description)
        _check(new, f"{folder}/{INDEX_FOLDER}")
        with disk_writes():
            if (kept / INDEX_FOLDER).exists():
                (kept / INDEX_FOLDER).rename(new / "old")
            (new / INDEX_FOLDER).rename(kept / INDEX_FOLDER)


def _is_kept(kept: Path, description: bytes, digests: bytes | None, stamp: str) -> bool:
    """Tells whether the index that is here is the one on the server."""
    if not _holds(kept / "shards.json", description):
        return False
    if digests:
        return _holds(kept / DIGESTS_FILE, digests)
    return bool(stamp) and _holds(kept / RECORDS_STAMP, stamp.encode())


def _optional(source: str, tries: int | None) -> bytes | None:
    """Returns a small file, None if there is none; stores that hide their names refuse instead."""
    try:
        return read_bytes(source, tries)
    except (FileNotFoundError, Refused):
        return None


def _fetch(source: str, path: Path) -> None:
    try:
        with whole_file(path) as partial:
            fetch(source, partial)
    except FileNotFoundError:
        raise UserError(
            f"{shown(source)} is missing, though other files of the index are there; copy the "
            "whole index there, or remove it"
        ) from None


def _write(path: Path, content: bytes) -> None:
    with disk_writes():
        write_whole(path, content)


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False


def _check(folder: Path, url: str) -> None:
    """Raises UserError for a fetched index that is damaged, or that would lead out of a folder."""
    try:
        index = Index(folder)
        if index.num_samples:
            index.key(index.num_samples - 1)
    except (UserError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{shown(url)}: can't be used ({error}); write that index anew, or remove it there"
        ) from None
    strange = [name for name in index.shard_names if Path(name).name != name or name[0] == "."]
    if strange:
        raise UserError(f"{shown(url)}: names a shard {strange[0]!r}, which is no file name")
