"""Identity of a run's data, wherever they are: digests, and no path.

A shard counts by its bytes, by what the index says of its samples, and by the number of its first
sample, from which the draws of crop, flip and caption follow. Of latents the embedding
of the empty caption counts as well. Names are there for messages alone, and the version of the
decoder so that a run goes on with the one that it began with.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blackpoint.data.index.contents import ORIGINALS
from blackpoint.data.shards.listing import EMPTY_FILE, is_encoded
from blackpoint.data.shards.shard_digest import file_digest, samples_digest

if TYPE_CHECKING:  # torch takes a second
    from blackpoint.data.reader import Reader

NUM_NAMED = 5


def identity(reader: "Reader") -> dict[str, Any]:
    """Returns the identity of one data set, for json: rows of (name, first sample, whole, samples).

    `whole` is "" for a shard on a server whose index has no digests.
    """
    index, rows = reader.index, list[list[Any]]()
    for name in sorted(path.name for path in reader.shards):
        digests = index.digests.get(name)
        samples = digests.samples if digests else samples_digest(index.rows(name), index.keys.field)
        if reader.has_original_sizes:
            samples += f" {ORIGINALS}"
        first = reader.offset + index.shard_samples[name].start
        rows.append([name, first, digests.whole if digests else "", samples])
    empty = None
    if is_encoded(index.shard_folder):
        empty = file_digest(index.shard_folder / EMPTY_FILE)
    return {"shards": rows, "empty_caption": empty, "decoder": reader.decoder}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns the differences of each field whose data changed; [] if none."""
    changes = []
    for field in sorted(before.keys() | now.keys()):
        if field not in before or field not in now:
            changes.append(f"{field}: " + ("was not set" if field in now else "was set"))
            continue
        then, here = before[field], now[field]
        if len(then["shards"]) != len(here["shards"]):
            changes.append(f"{field}: {len(here['shards'])} shards, {len(then['shards'])} then")
            continue
        pairs = zip(then["shards"], here["shards"], strict=True)
        others = [(old, new) for old, new in pairs if not _same_shard(old, new)]
        if others:
            names = [new[0] for _, new in others]
            more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
            what = f"{', '.join(names[:NUM_NAMED])}{more}"
            content = "other content in"
            if all(old[2] == new[2] != "" for old, new in others):
                content = (
                    "an index that was made anew and numbers samples otherwise, or has other "
                    "original sizes (put the earlier "
                    "index/ back beside the same shards) of"
                )
            changes.append(f"{field}: {content} {what}, of {len(here['shards'])} shards")
        elif then["empty_caption"] != here["empty_caption"]:
            changes.append(f"{field}: another embedding of the empty caption")
    return changes


def is_certain(of: Mapping[str, Any]) -> bool:
    """Tells whether every shard is known by the digest of its bytes."""
    return all(row[2] for data_set in of.values() for row in data_set["shards"])


def _same_shard(old: list[Any], new: list[Any]) -> bool:
    return (
        old[1:2] == new[1:2] and old[3] == new[3] and (old[2] == new[2] or "" in (old[2], new[2]))
    )
