"""Writing an index: shard by shard into a folder that takes its name when it is whole."""

import contextlib
import json
import logging
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from blackpoint.data.bad_samples import BadSample, write_list
from blackpoint.data.files.whole_file import scratch_folder
from blackpoint.data.images.luminance import REC_601
from blackpoint.data.index.contents import (
    DIGESTS_FILE,
    INDEX_FOLDER,
    ORIGINALS,
    ORIGINALS_FILE,
    STAMPS_FILE,
    ShardDigests,
    digests_json,
    stamped,
    stamps_json,
)
from blackpoint.data.record import ORIGINAL, RECORD, ShardRecords
from blackpoint.data.shards.sample_keys import AUTOMATIC, SampleKeys
from blackpoint.data.shards.shard_digest import ShardContent, samples_digest

FORMAT_VERSION = 1

log = logging.getLogger(__name__)


class IndexWriter:
    """Writes an index folder shard by shard; the index appears, whole, when it is closed.

    As a context manager. It grows in a folder inside `working`, by default the shards' own; what an
    exception leaves behind is removed. `keys` are those by which its samples were found.
    """

    def __init__(
        self, shard_folder: Path, working: Path | None = None, keys: SampleKeys = AUTOMATIC
    ) -> None:
        self.folder = shard_folder / INDEX_FOLDER
        self.num_samples = 0
        self.bad: list[BadSample] = []
        """Samples left out, for the caller to add."""
        self._working, self._keys_chosen = working or shard_folder, keys
        self._shards: list[dict[str, Any]] = []
        self._digests: dict[str, ShardDigests] = {}
        self._stamps: dict[str, str] = {}
        self._luminance_weights: set[str] = set()
        self._partial: Path
        self._records: BinaryIO
        self._keys: BinaryIO
        self._originals: BinaryIO
        self._knows_originals = False

    def __enter__(self) -> "IndexWriter":
        with contextlib.ExitStack() as stack:
            self._partial = stack.enter_context(scratch_folder(self._working)) / INDEX_FOLDER
            self._partial.mkdir()
            self._records = (self._partial / "records.npy").open("wb")
            self._keys = (self._partial / "keys.bin").open("wb")
            self._originals = (self._partial / ORIGINALS_FILE).open("wb")
            self._write_header()
            self._scratch = stack.pop_all()
        return self

    def append(self, name: str, records: ShardRecords, content: ShardContent) -> None:
        """Appends the samples of the next shard, whose bytes were digested on the way."""
        rows = records.records
        if len(rows):
            self._luminance_weights.add(records.luminance_weights)
        if content.whole:  # else it could not be read to its end
            samples = samples_digest(rows, self._keys_chosen.field)
            self._digests[name] = ShardDigests(content.whole, content.text, samples)
            if content.stamp:
                self._stamps[name] = stamped(content.stamp, content.whole)
        rows["shard"] = len(self._shards)
        rows["key_offset"] += np.uint64(self._keys.tell())
        self._records.write(rows.tobytes())
        self._keys.write(records.keys)
        self._originals.write(records.originals or bytes(2 * ORIGINAL.itemsize * len(rows)))
        self._knows_originals |= bool(records.originals)
        self.num_samples += len(rows)
        self._shards.append({"name": name, "bytes": content.num_bytes, "num_samples": len(rows)})

    def close(self) -> None:
        """Writes the files of the whole and renames the index into place."""
        self._records.seek(0)
        self._write_header()
        self._records.close()
        self._keys.close()
        self._originals.close()
        if not self._knows_originals:
            (self._partial / ORIGINALS_FILE).unlink()
        weights = " and ".join(sorted(self._luminance_weights))
        if len(self._luminance_weights) > 1:
            log.warning(
                "note: the index %s has luminances of %s, since an earlier version began it; "
                "remove the folder, and the next run measures all by one",
                self.folder,
                weights,
            )
        description = {
            "version": FORMAT_VERSION,
            "luminance": weights or REC_601,
            "num_samples": self.num_samples,
            "num_bad_samples": len(self.bad),
            **self._keys_chosen.chosen(),
            **({ORIGINALS: True} if self._knows_originals else {}),
            "shards": self._shards,
        }
        (self._partial / "shards.json").write_text(json.dumps(description, indent=1) + "\n")
        write_list(self._partial / "bad_samples.jsonl", self.bad)
        (self._partial / DIGESTS_FILE).write_text(digests_json(self._partial, self._digests))
        (self._partial / STAMPS_FILE).write_text(stamps_json(self._stamps))
        put_index(self._partial, self.folder)

    def __exit__(self, *error: object) -> None:
        for file in (self._records, self._keys, self._originals):
            with contextlib.suppress(OSError):  # on a full disk, closing fails again
                file.close()
        self._scratch.close()

    def _write_header(self) -> None:
        # numpy pads the header so that a longer first axis still fits into its bytes.
        header: dict[str, Any] = {"descr": np.lib.format.dtype_to_descr(RECORD)}
        header |= {"fortran_order": False, "shape": (self.num_samples,)}
        np.lib.format.write_array_header_1_0(self._records, header)


def put_index(scratch: Path, folder: Path) -> None:
    """Renames a whole index, inside a scratch folder, to `folder`; raises OSError.

    What is there without shards.json, such as a copy that was stopped, makes room for it.
    """
    description = folder / "shards.json"
    if folder.exists() and not description.exists():
        with contextlib.suppress(FileNotFoundError):  # another process was first
            folder.rename(scratch.with_name("incomplete"))
    try:
        scratch.rename(folder)
    except OSError:
        if not description.exists():
            raise  # Otherwise another process wrote the same index first.
