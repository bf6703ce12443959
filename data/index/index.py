"""The memory-mapped index of a folder of shards: where each sample is, and how large and bright.

Beside the shards lies `index/`:

- records.npy   one RECORD per sample, in the order of the shards
- keys.bin      the keys, UTF-8, one after the other
- original_sizes.bin  two uint32 per sample, width and height before it was stored, 0 where they are
                not known; not there where none is
- shards.json   the names and sizes of the shards, how many samples each holds, the weights of the
                luminances, and the members that were chosen (data/shards/sample_keys.py)
- bad_samples.jsonl  the samples left out, with the reason
- digests.json, stamps.json  what the shards hold: data/index/contents.py

Records have a fixed size, so opening 10^7 samples costs what 10^4 cost: whole columns are mapped,
and training reads single records in place (pages of a map would count as its resident memory).
"""

import errno
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np

from blackpoint.data.bad_samples import BadSample, refusal, too_many
from blackpoint.data.caption_text import CAPTION_FIELD
from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.data.images.decode import MAX_IMAGE_PIXELS
from blackpoint.data.images.luminance import REC_709
from blackpoint.data.index.contents import (
    INDEX_FOLDER,
    ORIGINALS,
    ORIGINALS_FILE,
    ShardDigests,
    add_stamps,
    read_digests,
    read_stamps,
    stamped,
)
from blackpoint.data.index.scan import scan_shards
from blackpoint.data.index.writer import FORMAT_VERSION, IndexWriter
from blackpoint.data.record import ORIGINAL, RECORD
from blackpoint.data.shards.listing import folder_shards, is_encoded
from blackpoint.data.shards.remote_shards import RemoteShards
from blackpoint.data.shards.sample_keys import AUTOMATIC, SampleKeys
from blackpoint.data.shards.shard_digest import file_stamp, new_digest, text_content
from blackpoint.data.work.progress import in_threads

ROWS_AT_ONCE = 1 << 16
NUM_NAMED = 5
SHOWN_BYTES = 10**10


class NotWritable(UserError):
    """The folder that an index would be written to can't be written."""


class Index:
    """An index on disk. Its files are opened on first use, in each process for itself.

    `kept` is where digests and stamps are kept if the index can't be written to.
    """

    def __init__(self, shard_folder: Path, kept: Path | None = None) -> None:
        self.shard_folder = shard_folder
        self.places = [shard_folder / INDEX_FOLDER]
        if kept not in (None, shard_folder):
            self.places.append(kept)
        description = _description(shard_folder)
        self.num_samples: int = description["num_samples"]
        self.num_bad_samples: int = description["num_bad_samples"]
        self.luminance_weights: str = description.get("luminance", REC_709)
        self.has_original_sizes: bool = description.get(ORIGINALS, False)
        self.keys = SampleKeys(description.get("image_key"), description.get("caption_key"))
        self.shard_names: list[str] = []
        self.shard_bytes: dict[str, int] = {}
        self.shard_samples: dict[str, range] = {}
        first = 0
        for shard in description["shards"]:
            name, num_samples = shard["name"], shard["num_samples"]
            self.shard_names.append(name)
            self.shard_bytes[name] = shard["bytes"]
            self.shard_samples[name] = range(first, first + num_samples)
            first += num_samples
        self._records_start = 0
        self._files: tuple[BinaryIO, ...] | None = None

    def __len__(self) -> int:
        return self.num_samples

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_files": None}
        state.pop("digests", None)  # read again by who needs them
        return state

    @functools.cached_property
    def digests(self) -> dict[str, ShardDigests]:
        """Content of each shard when it was indexed; without those of an index from before."""
        return read_digests(self.places, self.shard_folder / INDEX_FOLDER)

    @property
    def records(self) -> np.ndarray:
        """All records, RECORD (num_samples,), mapped: for columns such as the luminance."""
        self._open()  # which looks at its header and size
        return np.load(self.shard_folder / INDEX_FOLDER / "records.npy", mmap_mode="r")

    def record(self, index: int) -> np.void:
        """Returns the RECORD of sample `index`."""
        records, *_ = self._open()
        start = self._records_start + index * RECORD.itemsize
        return np.frombuffer(os.pread(records.fileno(), RECORD.itemsize, start), RECORD)[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns a copy of records [start, stop): memory that is freed, unlike a map's pages."""
        records, *_ = self._open()
        size = (stop - start) * RECORD.itemsize
        at = self._records_start + start * RECORD.itemsize
        return np.frombuffer(os.pread(records.fileno(), size, at), RECORD)

    def key(self, index: int) -> str:
        """Returns the key of sample `index`; raises UserError for one that is no text."""
        _, keys, *_ = self._open()
        record = self.record(index)
        key = os.pread(keys.fileno(), int(record["key_size"]), int(record["key_offset"]))
        try:
            return key.decode()
        except UnicodeDecodeError:
            why = f"{keys.name}: the key of sample {index} is no UTF-8; remove its folder"
            raise UserError(f"{why}; the next run builds it anew") from None

    def original_size(self, index: int) -> tuple[int, int] | None:
        """Returns width and height of a sample before it was stored; None where not known."""
        if not self.has_original_sizes:
            return None
        file, size = self._open()[-1].fileno(), 2 * ORIGINAL.itemsize
        width, height = np.frombuffer(os.pread(file, size, index * size), ORIGINAL).tolist()
        return (width, height) if width else None

    def _open(self) -> tuple[BinaryIO, ...]:
        if self._files is None:
            folder = self.shard_folder / INDEX_FOLDER
            names = ["records.npy", "keys.bin", *[ORIGINALS_FILE][: self.has_original_sizes]]
            files = tuple((folder / name).open("rb") for name in names)
            records = files[0]
            try:
                np.lib.format.read_magic(records)
                np.lib.format.read_array_header_1_0(records)
                start = records.tell()
            except (ValueError, SyntaxError, TokenError):  # numpy reads it as Python
                start = os.fstat(records.fileno()).st_size
            num_bytes = os.fstat(records.fileno()).st_size - start
            if num_bytes != self.num_samples * RECORD.itemsize:
                raise UserError(
                    f"{folder / 'records.npy'}: holds {num_bytes} bytes of records, not those of "
                    f"{self.num_samples} samples; remove {folder}; the next run builds it anew"
                )
            self._records_start = start  # before the files: other threads read once those are there
            self._files = files
        return self._files

    def rows(self, shard: str) -> np.ndarray:
        """Returns a copy of the records of one shard."""
        samples = self.shard_samples[shard]
        return self.read(samples.start, samples.stop)

    def content_digest(self, shards: Sequence[Path]) -> str:
        """Returns the identity of these shards' content, wherever they are.

        Of an index without digests it is `places_digest`.
        """
        names = sorted(path.name for path in shards)
        if not all(name in self.digests for name in names):
            return self.places_digest(shards)
        whole = new_digest()
        for name in names:
            whole.update(f"{self.digests[name].whole}/{self.digests[name].samples}/".encode())
        return whole.hexdigest()

    def places_digest(self, shards: Sequence[Path]) -> str:
        """Returns the digest of names, sizes and places of samples: all but the content."""
        whole = new_digest()
        records = self.records
        for name in sorted(path.name for path in shards):
            samples = self.shard_samples[name]
            whole.update(f"{name}/{self.shard_bytes[name]}/{len(samples)}/".encode())
            for first in range(samples.start, samples.stop, ROWS_AT_ONCE):
                rows = records[first : min(first + ROWS_AT_ONCE, samples.stop)].copy()
                rows["shard"], rows["key_offset"] = 0, 0  # of the folder, not of the shard
                whole.update(rows.tobytes())
        if self.keys.field != CAPTION_FIELD:
            whole.update(self.keys.field.encode())
        return whole.hexdigest()

    def changed_shards(self, shards: Sequence[Path]) -> dict[str, str]:
        """Returns, by name, how shards differ from those that were indexed.

        Size and time of change decide. Where the time differs, all but the images is compared, and
        the time of what is the same is noted.
        """
        changed, touched = dict[str, str](), list[Path]()
        stamps = read_stamps(self.places)
        for path in shards:
            status, name = os.stat(path), path.name
            size = self.shard_bytes.get(name)
            if size is None:
                changed[name] = "is not in"
            elif size != status.st_size:
                changed[name] = "has changed since"
            elif name in self.digests:
                stamp = stamped(file_stamp(status), self.digests[name].whole)
                if stamp not in stamps.get(name, ()):
                    touched.append(path)
        if not touched:
            return changed
        fresh = dict[str, str]()
        is_long = sum(self.shard_bytes[path.name] for path in touched) > SHOWN_BYTES
        for path, now in in_threads(
            "comparing", lambda path: text_content(path, self.rows(path.name)), touched, is_long
        ):
            digests = self.digests[path.name]
            if now.text != digests.text:
                changed[path.name] = "has changed since"
            elif now.stamp:
                fresh[path.name] = stamped(now.stamp, digests.whole)
        if fresh:
            add_stamps(self.places, fresh)
        return changed

    def check_shards(self, shards: Sequence[Path]) -> None:
        """Raises UserError if a shard is not the one that was indexed: `changed_shards`."""
        self.refuse_changed(self.changed_shards(shards), shards)

    def refuse_changed(self, changed: Mapping[str, str], shards: Sequence[Path]) -> None:
        """Raises UserError, which names them, where some of the shards have `changed`."""
        if not changed:
            return
        first, *others = sorted(changed)
        named = ", ".join(others[: NUM_NAMED - 1])
        more = len(others) - len(others[: NUM_NAMED - 1])
        also = f" (and so {named}{f' and {more} more' if more else ''})" if others else ""
        remedy = "remove that folder; the next run builds it anew"
        if is_encoded(self.shard_folder):
            remedy = "encode the images again with `blackpoint data encode`"
        where = f"{shards[0].parent / first} {changed[first]} the index"
        raise UserError(f"{where} {self.shard_folder / INDEX_FOLDER}{also}; {remedy}")


def has_index(shard_folder: Path) -> bool:
    """Tells whether the shards of a folder are indexed."""
    return (shard_folder / INDEX_FOLDER / "shards.json").exists()


def build_index(
    folder: Path,
    max_bad_share: float = 0.01,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    shards: Sequence[Path] | None = None,
    remote: RemoteShards | None = None,
    keys: SampleKeys = AUTOMATIC,
) -> list[BadSample]:
    """Writes the index of some shards, whoever made them, and returns the bad samples.

    By default they are all .tar files of `folder`. data/index/scan.py says what a sample is. Every
    image is decoded once, for its size and luminance. Raises UserError above `max_bad_share`, and
    NotWritable.
    """
    shards = folder_shards(folder) if shards is None else shards
    try:
        with IndexWriter(folder, keys=keys) as writer:
            for name, scan in scan_shards(
                "indexing", shards, max_image_pixels, remote=remote, keys=keys
            ):
                writer.append(name, scan.records, scan.content)
                writer.bad += scan.bad
            bad, num_samples = writer.bad, writer.num_samples + len(writer.bad)
            if not num_samples:
                raise UserError(f"{folder}: {len(shards)} shards hold no samples")
            if too_many(len(bad), num_samples, max_bad_share) or not writer.num_samples:
                raise refusal(str(folder), bad, num_samples, max_bad_share, "max_bad_share")
            writer.close()
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise NotWritable(
                f"{folder} has no index and can't be written to ({error.strerror}); "
                "copy the shards to where you may write, or index them as their owner"
            ) from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFailed(f"{folder}: the disk is full; the index was not written") from None
        raise
    return bad


def _description(shard_folder: Path) -> dict[str, Any]:
    path = shard_folder / INDEX_FOLDER / "shards.json"
    remedy = f"remove {path.parent}; the next run builds it anew"
    try:
        description = json.loads(path.read_text())
        if description["version"] == FORMAT_VERSION:
            return description
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from None
    raise UserError(f"{path}: is of version {description['version']}; {remedy}")
