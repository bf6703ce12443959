"""At the start of a run: whether shards are still those that were indexed.

- Local shards: size and time of change decide; where the time differs, all but the images is
  compared (`Index.check_shards`).
- Shards on a server: size and version (ETag, Last-Modified) decide; where the version differs from
  the one that was seen last, the shard is read there and all bytes are compared.
- An index from before there were digests is taken at its word once: the digests are those of the
  shards that are there now, which are read for it, and that is said.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blackpoint.data.files.errors import Unreachable, UserError
from blackpoint.data.index.contents import (
    ShardDigests,
    add_stamps,
    read_stamps,
    stamped,
    write_digests,
)
from blackpoint.data.index.index import Index
from blackpoint.data.index.shard_set import ShardSet
from blackpoint.data.shards.listing import is_encoded
from blackpoint.data.shards.remote import COMMAND, Changed, Refused, facts, fetch, shown
from blackpoint.data.shards.remote_shards import RemoteShards, server_stamp
from blackpoint.data.shards.shard_cache import GIGABYTE, RemoteShard
from blackpoint.data.shards.shard_digest import (
    ShardContent,
    file_digest,
    headers_fit,
    samples_digest,
    shard_content,
)
from blackpoint.data.work.progress import in_threads

NUM_REQUESTS = 16
"""Requests to a server at a time."""
TRIES = 3


def verify(shards: ShardSet) -> list[str]:
    """Returns notes for the user; raises UserError, which names shards that have changed."""
    index = Index(shards.folder, shards.kept)
    check_index_keys(shards, index)
    if shards.remote is None:
        notes = adopt(index, shards.paths)
        index.check_shards(shards.paths)
        return notes
    changed, notes = changed_on_server(index, shards.remote)
    if changed:
        first, *others = (shards.remote.shards[name] for name in changed)
        raise shards.remote.unlike_the_index(first, changed[first.name], others)
    return notes


def check_index_keys(shards: ShardSet, index: Index) -> None:
    """Raises UserError where another image or caption is asked for than was indexed."""
    made_with = index.keys.chosen()
    for name, value in shards.keys.chosen().items():
        if made_with.get(name) != value:
            then = f"with {name}={made_with[name]}" if name in made_with else f"without {name}"
            there = " (of shards on a server, there)" if shards.remote else ""
            remedy = f"remove {index.places[0]}{there}; the next run builds it anew"
            if is_encoded(shards.folder):
                remedy = "those of latents were chosen when their images were encoded"
            raise UserError(
                f"{shards.section}{name}={value}: the index {index.places[0]} was made {then}; "
                f"{remedy}; or leave {shards.section}{name} at null, which takes what is indexed"
            )


def adopt(index: Index, shards: Sequence[Path]) -> list[str]:
    """Digests local shards whose index has none; returns notes for the user.

    Raises UserError for a shard whose size, or the headers of whose samples, are others than the
    index says.
    """
    unknown = [path for path in shards if path.name not in index.digests]
    if not unknown:
        return []
    index.check_shards(unknown)
    digests, stamps, changed = dict(index.digests), dict[str, str](), dict[str, str]()
    total = sum(index.shard_bytes[path.name] for path in unknown) / GIGABYTE
    for path, content in in_threads("digesting", lambda path: _adopted(index, path), unknown):
        if content is None:
            changed[path.name] = "has changed since"
            continue
        samples = samples_digest(index.rows(path.name), index.keys.field)
        digests[path.name] = ShardDigests(content.whole, content.text, samples)
        if content.stamp:
            stamps[path.name] = stamped(content.stamp, content.whole)
    index.refuse_changed(changed, unknown)
    return [_note(index, digests, stamps, f"{len(unknown)} shards, {total:.3g} GB,")]


def compare_bytes(index: Index, shards: Sequence[Path]) -> None:
    """Compares all bytes of local shards with the digests of their index; raises UserError."""
    known = [path for path in shards if path.name in index.digests]
    changed = {
        path.name: "has changed since"
        for path, whole in in_threads("comparing", file_digest, known)
        if whole != index.digests[path.name].whole
    }
    index.refuse_changed(changed, known)


def _adopted(index: Index, shard: Path) -> ShardContent | None:
    rows = index.rows(shard.name)
    content = shard_content(shard, rows)
    return content if headers_fit(shard, rows) else None


def _note(index: Index, digests: dict[str, ShardDigests], stamps: dict[str, str], what: str) -> str:
    folder = write_digests(index.places, index.places[0], digests)
    text = f"{index.places[0]} had no digests of its shards: {what} were read to make them"
    if folder is None:
        return f"{text}; no folder takes them, so the next start reads the shards again"
    del index.digests  # read again
    add_stamps([folder], stamps)
    return text if folder == index.places[0] else f"{text}; they are kept in {folder}"


def changed_on_server(index: Index, remote: RemoteShards) -> tuple[dict[str, Exception], list[str]]:
    """Returns the fault of each shard, by name, that has changed, and notes for the user.

    What can't be asked, a command or a server that does not answer, has not changed.
    """
    stamps = read_stamps(index.places)
    shards = [s for s in remote.shards.values() if not s.source.startswith(COMMAND)]
    changed, fresh = dict[str, Exception](), dict[str, str]()
    notes, moved = list[str](), list[RemoteShard]()
    first = next((shard.name for shard in shards if not shard.whole), None)
    if first and first not in stamps:
        notes.append(
            f"{index.places[0]} has no digests of its shards: those on the server are known by "
            "size and version until their index is written anew"
        )
    try:
        answers = list(map(_stamp, shards[:1]))  # alone: a server that is down is waited for once
        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            answers += pool.map(_stamp, shards[1:])
    except (Unreachable, Refused) as error:
        return {}, [*notes, f"{error}; the shards are not compared with their index"]
    for shard, stamp in zip(shards, answers, strict=True):
        if isinstance(stamp, Exception):
            changed[shard.name] = stamp
        elif stamp and stamped(stamp, shard.whole) not in stamps.get(shard.name, ()):
            problem = None
            if shard.name in stamps:
                moved.append(shard)
                problem = _difference(shard)
            if problem:
                changed[shard.name] = problem
            else:
                fresh[shard.name] = stamped(stamp, shard.whole)
    if moved:
        notes.append(
            f"{len(moved)} shards have another version on the server than before, first "
            f"{shown(moved[0].source)}: read there and compared"
        )
    if fresh:
        add_stamps(index.places, fresh)
    return changed, notes


def _stamp(shard: RemoteShard) -> str | Exception:
    try:
        now = facts(shard.source, TRIES)
    except FileNotFoundError as error:
        return error
    if now.num_bytes not in (None, shard.num_bytes):
        return Changed(f"{shard.num_bytes} bytes when it was indexed, {now.num_bytes} now")
    return server_stamp(now.num_bytes, now.version)


def _difference(shard: RemoteShard) -> Exception | None:
    """Reads a shard where it is and returns its difference from the indexed one."""
    if not shard.whole:
        return Changed("another version than before, and the index has no digest to compare it by")
    try:
        fetch(shard.source, None, shard.num_bytes, whole=shard.whole)
    except (Changed, FileNotFoundError) as error:
        return error
    return None
