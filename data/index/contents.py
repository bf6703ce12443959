"""An index's knowledge of its shards' content, in two files beside its records.

- digests.json  {shard: [whole, text, samples]}: data/shards/shard_digest.py; the same anywhere
- stamps.json   {shard: stamp and whole}: how the shards looked when they last had these digests

Where the index can't be written to, both are in the cache's folder of the data set instead.
An index written before there were digests has neither; data/index/verify.py adds them.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from blackpoint.data.files.whole_file import write_whole
from blackpoint.data.shards.shard_digest import new_digest

INDEX_FOLDER = "index"
DIGESTS_FILE = "digests.json"
STAMPS_FILE = "stamps.json"
ORIGINALS, ORIGINALS_FILE = "original_sizes", "original_sizes.bin"
FORMAT_VERSION = 1


class ShardDigests(NamedTuple):
    """Of all bytes, of all but the images, and of the records of the samples."""

    whole: str
    text: str
    samples: str


def read_digests(folders: Iterable[Path], index: Path) -> dict[str, ShardDigests]:
    """Returns the digests, by shard, of the index in the folder `index`; empty without any."""
    of = _index_digest(index)
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            content = json.loads((folder / DIGESTS_FILE).read_bytes())
            if content["version"] == FORMAT_VERSION and content["index"] == of:
                return {name: ShardDigests(*row) for name, row in content["shards"].items()}
    return {}


def write_digests(
    folders: Iterable[Path], index: Path, digests: Mapping[str, ShardDigests]
) -> Path | None:
    """Writes the digests into the first folder that takes them; returns which, None if none."""
    return _write(folders, DIGESTS_FILE, digests_json(index, digests))


def digests_json(index: Path, digests: Mapping[str, ShardDigests]) -> str:
    """Returns the contents of digests.json."""
    content = {"version": FORMAT_VERSION, "index": _index_digest(index), "shards": digests}
    return json.dumps(content, indent=0) + "\n"


def read_stamps(folders: Iterable[Path]) -> dict[str, set[str]]:
    """Returns the stamps, by shard, at which it had the digests that `stamped` puts beside them."""
    stamps: dict[str, set[str]] = {}
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, RecursionError):
            for name, stamp in json.loads((folder / STAMPS_FILE).read_bytes()).items():
                stamps.setdefault(name, set()).add(stamp)
    return stamps


def add_stamps(folders: Iterable[Path], stamps: Mapping[str, str]) -> Path | None:
    """Adds stamps to those that the first folder that can be written holds."""
    for folder in folders:
        known = {name: entries.pop() for name, entries in read_stamps([folder]).items()}
        if _write([folder], STAMPS_FILE, stamps_json(known | dict(stamps))):
            return folder
    return None


def stamps_json(stamps: Mapping[str, str]) -> str:
    """Returns the contents of stamps.json."""
    return json.dumps(stamps, indent=0) + "\n"


def stamped(stamp: str, whole: str) -> str:
    """Returns the entry of a shard in stamps.json."""
    return f"{stamp} {whole}"


def _write(folders: Iterable[Path], name: str, text: str) -> Path | None:
    for folder in folders:
        with contextlib.suppress(OSError):
            write_whole(folder / name, text)
            return folder
    return None


def _index_digest(index: Path) -> str:
    digest = new_digest()
    digest.update((index / "shards.json").read_bytes())
    return digest.hexdigest()
