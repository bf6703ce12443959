"""Writing an index: sample by sample into a folder that takes its name when it is whole."""

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from blackpoint.data.bad_samples import BadSample, write_list
from blackpoint.data.files.whole_file import scratch_folder
from blackpoint.data.images.luminance import REC_601
from blackpoint.data.index.contents import (
    DIGESTS_FILE,
    INDEX_FOLDER,
    STAMPS_FILE,
    ShardDigests,
    digests_json,
    stamped,
    stamps_json,
)
from blackpoint.data.record import RECORD, ShardRecords
from blackpoint.data.shards.sample_keys import AUTOMATIC, SampleKeys
from blackpoint.data.shards.shard_digest import ShardContent, samples_digest, shard_content

FORMAT_VERSION = 1

log = logging.getLogger(__name__)


class IndexWriter:
    """Writes an index folder sample by sample; the index appears, whole, when it is closed.

    As a context manager. It grows in a folder inside `working`, by default the shards' own; what an
    exception leaves behind is removed. `keys` are those by which its samples were found.
    """

    def __init__(
        self, shard_folder: Path, working: Path | None = None, keys: SampleKeys = AUTOMATIC
    ) -> None:
        self.folder = shard_folder / INDEX_FOLDER
        self.partial: Path
        self._working = working or shard_folder
        self._keys_chosen = keys
        self.num_samples = 0
        self._num_in_shard: Counter[int] = Counter()
        self._samples: dict[int, str] = {}
        self._luminance_weights: set[str] = set()
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

    def append(self, shard: int, records: ShardRecords) -> None:
        """Appends the samples of a shard that were collected elsewhere."""
        rows, keys = records.records, records.keys
        if len(rows):
            self._luminance_weights.add(records.luminance_weights)
        self._samples[shard] = samples_digest(rows, self._keys_chosen.field)
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
        contents: Sequence[ShardContent] | None = None,
    ) -> None:
        """Writes the files of the whole and renames the index into place.

        `contents` were taken while the shards were read or written; by default they are read again.
        """
        self._records.seek(0)
        self._write_header()
        self._records.close()
        self._keys.close()
        if contents is None:
            rows = np.load(self.partial / "records.npy", mmap_mode="r")
            numbers = range(len(shards))
            contents = [shard_content(shards[n], rows[rows["shard"] == n]) for n in numbers]
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
            "num_bad_samples": len(bad),
            **self._keys_chosen.chosen(),
            "shards": [
                {
                    "name": path.name,
                    "bytes": contents[number].num_bytes,
                    "num_samples": self._num_in_shard[number],
                }
                for number, path in enumerate(shards)
            ],
        }
        (self.partial / "shards.json").write_text(json.dumps(description, indent=1) + "\n")
        write_list(self.partial / "bad_samples.jsonl", bad)
        self._write_contents([path.name for path in shards], contents)
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

    def _write_contents(self, names: Sequence[str], contents: Sequence[ShardContent]) -> None:
        digests, stamps = dict[str, ShardDigests](), dict[str, str]()
        for number, (name, content) in enumerate(zip(names, contents, strict=True)):
            if content.whole:  # else it could not be read to its end
                digests[name] = ShardDigests(content.whole, content.text, self._samples[number])
                if content.stamp:
                    stamps[name] = stamped(content.stamp, content.whole)
        (self.partial / DIGESTS_FILE).write_text(digests_json(self.partial, digests))
        (self.partial / STAMPS_FILE).write_text(stamps_json(stamps))

    def _write_header(self) -> None:
        # numpy pads the header so that a longer first axis still fits into its bytes.
        header: dict[str, Any] = {"descr": np.lib.format.dtype_to_descr(RECORD)}
        header |= {"fortran_order": False, "shape": (self.num_samples,)}
        np.lib.format.write_array_header_1_0(self._records, header)
