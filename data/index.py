"""The memory-mapped index of a folder of shards: where each sample is, and how large and bright.

Beside the shards lies `index/`:

- records.npy   one RECORD a sample, in the order of the shards
- keys.bin      the keys, UTF-8, one after the other
- shards.json   the names and sizes of the shards, and how many samples each holds
- bad_samples.jsonl  the samples left out, with the reason

Records have a fixed size, so opening 10^7 samples costs what 10^4 cost: whole columns are mapped,
and training reads single records in place (pages of a map would count as its resident memory).
"""

import contextlib
import errno
import json
import os
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from data.bad_samples import BadSample, refusal, too_many, write_list
from data.decode import MAX_IMAGE_PIXELS, luminance
from data.errors import RunFailed, UserError
from data.progress import progress
from data.record import RECORD, ShardRecords, Span
from data.remote_shards import RemoteShards
from data.scan import scan_shards
from data.scratch import scratch_folder
from data.shards import folder_shards

INDEX_FOLDER = "index"
FORMAT_VERSION = 1
DIGEST_BYTES = 16
ROWS_AT_ONCE = 1 << 16


class NotWritable(UserError):
    """The folder that an index would be written to can't be written."""


class IndexWriter:
    """Writes an index folder sample by sample; the index appears, whole, when it is closed.

    As a context manager. It grows in a folder inside `working`, by default the shards' own; what an
    exception leaves behind is removed.
    """

    def __init__(self, shard_folder: Path, working: Path | None = None) -> None:
        self.folder = shard_folder / INDEX_FOLDER
        self.partial: Path
        self._working = working or shard_folder
        self.num_samples = 0
        self._num_in_shard: Counter[int] = Counter()
        self._key_offset = 0
        self._records: BinaryIO
        self._keys: BinaryIO

    def __enter__(self) -> "IndexWriter":
        with contextlib.ExitStack() as stack:
            self.partial = stack.enter_context(scratch_folder(self._working)) / INDEX_FOLDER
            self.partial.mkdir()
            self._records = (self.partial / "records.npy").open("wb")
            self._keys = (self.partial / "keys.bin").open("wb")
            self._write_header()
            self._scratch = stack.pop_all()
        return self

    def add(self, shard: int, key: str, image: Span, caption: Span, picture: Image.Image) -> None:
        """Appends a sample whose upright RGB image is `picture`."""
        records = ShardRecords()
        records.add(key, image, caption, *picture.size, luminance(picture))
        self.append(shard, records)

    def append(self, shard: int, records: ShardRecords) -> None:
        """Appends the samples of a shard, or some of them, that were collected elsewhere."""
        rows, keys = records.records, records.keys
        rows["shard"] = shard
        rows["key_offset"] += np.uint64(self._key_offset)
        self._records.write(rows.tobytes())
        self._keys.write(keys)
        self._key_offset += len(keys)
        self.num_samples += len(rows)
        self._num_in_shard[shard] += len(rows)

    def close(
        self,
        shards: Sequence[Path],
        bad: Sequence[BadSample],
        shard_bytes: Sequence[int] | None = None,
    ) -> None:
        """Writes what belongs to the whole and renames the index into place.

        `shard_bytes` are the sizes of shards that are no files here.
        """
        sizes = shard_bytes or [path.stat().st_size for path in shards]
        self._records.seek(0)
        self._write_header()
        self._records.close()
        self._keys.close()
        description = {
            "version": FORMAT_VERSION,
            "num_samples": self.num_samples,
            "num_bad_samples": len(bad),
            "shards": [
                {
                    "name": path.name,
                    "bytes": sizes[number],
                    "num_samples": self._num_in_shard[number],
                }
                for number, path in enumerate(shards)
            ],
        }
        (self.partial / "shards.json").write_text(json.dumps(description, indent=1) + "\n")
        write_list(self.partial / "bad_samples.jsonl", bad)
        try:
            self.partial.rename(self.folder)
        except OSError:
            if not (self.folder / "shards.json").exists():
                raise  # Otherwise another process wrote the same index first.

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for file in (self._records, self._keys):
            with contextlib.suppress(OSError):  # on a full disk, closing fails again
                file.close()
        self._scratch.close()

    def _write_header(self) -> None:
        # numpy pads the header so that a longer first axis still fits into its bytes.
        header: dict[str, Any] = {"descr": np.lib.format.dtype_to_descr(RECORD)}
        header |= {"fortran_order": False, "shape": (self.num_samples,)}
        np.lib.format.write_array_header_1_0(self._records, header)


class Index:
    """An index on disk. Its files are opened on first use, in each process for itself."""

    def __init__(self, shard_folder: Path) -> None:
        self.shard_folder = shard_folder
        description = _description(shard_folder)
        self.num_samples: int = description["num_samples"]
        self.num_bad_samples: int = description["num_bad_samples"]
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
        self._files: tuple[BinaryIO, BinaryIO] | None = None

    def __len__(self) -> int:
        return self.num_samples

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": None}

    @property
    def records(self) -> np.ndarray:
        """All records, RECORD (num_samples,), mapped: for columns such as the luminance."""
        path = self.shard_folder / INDEX_FOLDER / "records.npy"
        return np.load(path, mmap_mode="r")

    def record(self, index: int) -> np.void:
        """Returns the RECORD of sample `index`."""
        records, _ = self._open()
        start = self._records_start + index * RECORD.itemsize
        return np.frombuffer(os.pread(records.fileno(), RECORD.itemsize, start), RECORD)[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns a copy of records [start, stop): memory that is freed, unlike a map's pages."""
        records, _ = self._open()
        size = (stop - start) * RECORD.itemsize
        at = self._records_start + start * RECORD.itemsize
        return np.frombuffer(os.pread(records.fileno(), size, at), RECORD)

    def key(self, index: int) -> str:
        """Returns the key of sample `index`."""
        _, keys = self._open()
        record = self.record(index)
        return os.pread(keys.fileno(), int(record["key_size"]), int(record["key_offset"])).decode()

    def _open(self) -> tuple[BinaryIO, BinaryIO]:
        if self._files is None:
            folder = self.shard_folder / INDEX_FOLDER
            records, keys = (folder / "records.npy").open("rb"), (folder / "keys.bin").open("rb")
            np.lib.format.read_magic(records)
            np.lib.format.read_array_header_1_0(records)
            self._records_start = records.tell()
            found = os.fstat(records.fileno()).st_size - self._records_start
            if found != self.num_samples * RECORD.itemsize:
                raise UserError(
                    f"{folder / 'records.npy'}: holds {found} bytes of records, not those of "
                    f"{self.num_samples} samples. Remove {folder}; the next run builds it anew."
                )
            self._files = (records, keys)
        return self._files

    def digest(self, shards: Sequence[Path]) -> str:
        """Returns what tells these shards from others: names, sizes, places of their samples."""
        whole = blake2b(digest_size=DIGEST_BYTES)
        records = self.records
        for name in sorted(path.name for path in shards):
            samples = self.shard_samples[name]
            whole.update(f"{name}/{self.shard_bytes[name]}/{len(samples)}/".encode())
            for first in range(samples.start, samples.stop, ROWS_AT_ONCE):
                rows = records[first : min(first + ROWS_AT_ONCE, samples.stop)].copy()
                rows["shard"], rows["key_offset"] = 0, 0  # of the folder, not of the shard
                whole.update(rows.tobytes())
        return whole.hexdigest()

    def check_shards(self, shards: Sequence[Path]) -> None:
        """Raises UserError if a shard is not the one that was indexed."""
        for path in shards:
            size = self.shard_bytes.get(path.name)
            if size is None or size != path.stat().st_size:
                how = "is not in" if size is None else "has changed since"
                raise UserError(
                    f"{path} {how} the index {self.shard_folder / INDEX_FOLDER}. "
                    "Remove that folder; the next run builds it anew."
                )


def has_index(shard_folder: Path) -> bool:
    """Tells whether the shards of a folder are indexed."""
    return (shard_folder / INDEX_FOLDER / "shards.json").exists()


def build_index(
    folder: Path,
    max_bad_share: float = 0.01,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    num_processes: int = 1,
    shards: Sequence[Path] | None = None,
    remote: RemoteShards | None = None,
) -> list[BadSample]:
    """Writes the index of some shards, whoever made them, and returns the bad samples.

    By default they are all .tar files of `folder`. data/scan.py says what a sample is. Every image
    is decoded once, for its size and luminance. Raises UserError above `max_bad_share`, and
    NotWritable.
    """
    shards = folder_shards(folder) if shards is None else shards
    bad: list[BadSample] = []
    shard_bytes: list[int] = []
    try:
        with IndexWriter(folder) as writer, progress("indexing", len(shards)) as advance:
            for number, scan in enumerate(
                scan_shards(shards, max_image_pixels, num_processes, False, advance, remote)
            ):
                writer.append(number, scan.records)
                shard_bytes.append(scan.num_bytes)
                bad += scan.bad
            num_samples = writer.num_samples + len(bad)
            if not num_samples:
                raise UserError(f"{folder}: {len(shards)} shards hold no samples.")
            if too_many(len(bad), num_samples, max_bad_share) or not writer.num_samples:
                raise refusal(str(folder), bad, num_samples, max_bad_share, "max_bad_share")
            writer.close(shards, bad, shard_bytes)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise NotWritable(
                f"{folder} has no index and can't be written to ({error.strerror}). "
                "Copy the shards to where you may write, or index them as their owner."
            ) from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFailed(f"{folder}: the disk is full; the index was not written.") from None
        raise
    return bad


def _description(shard_folder: Path) -> dict[str, Any]:
    path = shard_folder / INDEX_FOLDER / "shards.json"
    remedy = f"Remove {path.parent}; the next run builds it anew."
    try:
        description = json.loads(path.read_text())
        if description["version"] == FORMAT_VERSION:
            return description
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}). {remedy}") from None
    raise UserError(f"{path}: is of version {description['version']}. {remedy}")
