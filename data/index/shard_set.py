"""A data set as a config names it: local shards, URLs or commands, and where its index is.

What is kept of data sets whose index can't be beside the shards is in the cache folder:

    CACHE_DIR/shards/    whole shards from elsewhere: data/shards/shard_cache.py
    CACHE_DIR/indices/   one folder per data set: index/, and encoding.json of latents

The index beside remote shards is fetched, and again when it has changed. Where there is none the
shards are read once, through the cache, and their index stays in CACHE_DIR, as does that of local
shards on a disk that can't be written.
"""

import fnmatch
import hashlib
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from blackpoint.data.bad_samples import BadSample
from blackpoint.data.files.errors import UserError
from blackpoint.data.files.lock import locked
from blackpoint.data.files.paths import is_command, is_remote, is_verbatim
from blackpoint.data.index.index import INDEX_FOLDER, Index, NotWritable, build_index, has_index
from blackpoint.data.index.remote_index import fetch_index
from blackpoint.data.shards.listing import (
    expand_braces,
    find_shards,
    folder_shards,
    is_encoded,
)
from blackpoint.data.shards.options import ShardOptions, cache_folder
from blackpoint.data.shards.remote import COMMAND, facts, list_names, shown
from blackpoint.data.shards.remote_shards import RemoteShards
from blackpoint.data.shards.sample_keys import AUTOMATIC, SampleKeys
from blackpoint.data.shards.shard_cache import GIGABYTE, RemoteShard, ShardCache


@dataclass(frozen=True)
class ShardSet:
    """Some shards of one data set."""

    folder: Path
    """Where index/ is or will be, and encoding.json of latents."""
    paths: list[Path]
    """One per shard; a remote shard's is folder/name, and no file."""
    kept: Path
    """Where the index goes if `folder` can't be written."""
    remote: RemoteShards | None = None
    is_whole: bool = True
    """Whether these are all shards that an index of `folder` is to cover."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user before it is read."""
    keys: SampleKeys = AUTOMATIC
    """Which members the user chose, by keys of `section`."""
    section: str = ""


def open_shards(pattern: str, field: str, config: ShardOptions, in_order: bool = False) -> ShardSet:
    """Finds the shards that `pattern`, the value of the config's `field`, names.

    `in_order` says that samples are read in the order of the shards, so that a small cache serves.
    Raises UserError, which names the field, and Unreachable where a server does not answer.
    """
    names = [pattern] if os.path.isdir(pattern) else expand_braces(pattern, field)
    cache_dir, section = cache_folder(config.cache_dir), config.SECTION
    keys = SampleKeys(config.image_key, config.caption_key)
    if not any(map(is_verbatim, names)):
        return replace(_local(find_shards(pattern, field), cache_dir), keys=keys, section=section)
    where = f"{field}={shown(pattern)}"
    commands = [name for name in names if is_command(name)]
    if commands:
        _check_commands(commands, names, where, section, config.allow_shell_urls)
        width = max(6, len(str(len(commands))))
        sources = {f"{n:0{width}d}.tar": command for n, command in enumerate(commands)}
        folder, is_whole = _kept(cache_dir, "commands", pattern), True
    else:
        folder, sources, is_whole = _beside_urls(names, where, cache_dir)
    max_bytes = int(config.cache_gigabytes * GIGABYTE)
    cache = ShardCache(cache_dir / "shards", max_bytes, f"{section}cache_gigabytes")
    shards = _remote_shards(folder, sources, where)
    by_range, notes = False, list[str]()
    if has_index(folder):
        by_range, notes = _manner(list(shards.values()), cache, where, in_order)
    elif not max_bytes:
        raise UserError(
            f"{where}: has no index, and what reads the shards to make one needs room "
            f"for the largest of them: set {cache.setting} above 0"
        )
    remote = RemoteShards(shards, cache, folder / INDEX_FOLDER, by_range)
    paths = [folder / name for name in sources]
    return ShardSet(folder, paths, folder, remote, is_whole, notes, keys, section)


def index_shards(shards: ShardSet, options: ShardOptions) -> tuple[Path, list[BadSample]]:
    """Indexes the shards, which have none; returns where the index is, and the bad samples."""
    limits = options.max_bad_share, options.max_image_pixels
    paths, reason = shards.paths, ""
    if shards.remote is None:
        try:
            return shards.folder, build_index(shards.folder, *limits, keys=shards.keys)
        except NotWritable as error:
            paths, reason = folder_shards(shards.folder), f"{error}, or set cache_dir elsewhere: "
    try:
        shards.kept.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{reason}{shards.kept} can't be written ({error.strerror})") from None
    with locked(shards.kept / "lock"):
        if has_index(shards.kept):  # Another process was quicker.
            return shards.kept, []
        return shards.kept, build_index(shards.kept, *limits, paths, shards.remote, shards.keys)


def indexing_command(shards: ShardSet, pattern: str, config: ShardOptions) -> str:
    """Returns the command that indexes the shards of `pattern`, all that an index covers."""
    arguments = [f"shards={pattern if shards.remote else shards.folder}"]
    if config.cache_dir is not None:
        arguments.append(f"cache_dir={config.cache_dir}")
    if config.allow_shell_urls:
        arguments.append("allow_shell_urls=true")
    arguments += [f"{name}={value}" for name, value in shards.keys.chosen().items()]
    return f"blackpoint data check {shlex.join(arguments)}"


def _local(paths: list[Path], cache_dir: Path) -> ShardSet:
    beside = paths[0].parent
    kept = _kept(cache_dir, beside.name, str(beside.resolve()))
    is_whole = set(paths) == set(folder_shards(beside))
    if has_index(beside) or not has_index(kept):
        return ShardSet(beside, paths, kept, is_whole=is_whole)
    return ShardSet(
        kept, paths, kept, None, is_whole, [f"{beside} has no index; that in {kept} is used"]
    )


def _kept(cache_dir: Path, name: str, identity: str) -> Path:
    """Returns the folder of a data set's index in the cache."""
    digest = hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[-40:] or "shards"
    return cache_dir / "indices" / f"{readable}-{digest}"


def _check_commands(
    commands: list[str], names: list[str], where: str, section: str, allowed: bool
) -> None:
    if not allowed:
        raise UserError(
            f"{where}: would run a shell command, which is refused unless "
            f"{section}allow_shell_urls=true is set; set it if you trust the command, or name the "
            "shards by URL, such as https:// or s3://."
        )
    if len(commands) < len(names) or not all(name.startswith(COMMAND) for name in commands):
        raise UserError(f"{where}: a shard from a command is written {COMMAND}COMMAND, all alike")


def _beside_urls(
    names: list[str], where: str, cache_dir: Path
) -> tuple[Path, dict[str, str], bool]:
    """Returns the folder of the index, the URLs by name, and whether it covers just these."""
    parts = [_split(name) for name in names]
    folders = sorted({(folder, query) for folder, _, query in parts})
    if len(folders) > 1 or not all(map(is_remote, names)):
        raise UserError(
            f"{where}: names shards of several folders; one data set is one folder: put or copy "
            "the shards into one"
        )
    folder, query = folders[0]
    kept = _kept(cache_dir, folder.rpartition("/")[2], folder)
    fetch_index(folder, query, kept)
    wanted = [name for _, name, _ in parts]
    if wanted == [""] or any("*" in name or "[" in name for name in wanted):
        there = Index(kept).shard_names if has_index(kept) else list_names(folder + query)
        patterns = [name or "*" for name in wanted]
        there = [name for name in there if name.endswith(".tar") and not name.startswith(".")]
        wanted = [n for n in there if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
        if not wanted:
            raise UserError(
                f"{where}: no .tar file is listed there, or the server lists none; name the shards "
                "with braces: .../shard-{000000..000099}.tar"
            )
    other = [name for name in wanted if not name.endswith(".tar")]
    if other:
        raise UserError(
            f"{where}: {other[0]} is no .tar file; shards are plain tars, and the URL of a folder "
            "whose name has a dot ends with /"
        )
    wanted = sorted(set(wanted))
    sources = {name: f"{folder}/{name}{query}" for name in wanted}
    if has_index(kept) or is_encoded(kept):
        return kept, sources, has_index(kept) and set(wanted) == set(Index(kept).shard_names)
    kept = _kept(cache_dir, folder.rpartition("/")[2], "\n".join([folder, *wanted]))
    return kept, sources, True


def _split(url: str) -> tuple[str, str, str]:
    """Returns (folder, name, ?query) of a URL; the name is "" if it is that of a folder."""
    path, mark, query = url.partition("?") if url.startswith("http") else (url, "", "")
    folder, _, name = path.rpartition("/")
    if "." not in name and "*" not in name or folder.endswith("/"):
        return path.rstrip("/"), "", mark + query
    return folder, name, mark + query


def _remote_shards(folder: Path, sources: dict[str, str], where: str) -> dict[str, RemoteShard]:
    """Returns the shards by name, with what an index of `folder` knows of them."""
    if not has_index(folder):
        return {name: RemoteShard(name, source) for name, source in sources.items()}
    index = Index(folder)
    absent = [name for name in sources if name not in index.shard_bytes]
    if absent:
        raise UserError(
            f"{where}: {len(absent)} shards are not in the index beside them, first {absent[0]}; "
            "name others, or write that index anew"
        )
    wholes = {name: digests.whole for name, digests in index.digests.items()}
    return {
        name: RemoteShard(name, source, index.shard_bytes[name], wholes.get(name, ""))
        for name, source in sources.items()
    }


def _manner(
    shards: Sequence[RemoteShard], cache: ShardCache, where: str, in_order: bool
) -> tuple[bool, list[str]]:
    """Returns whether members are read by range, and notes for the user."""
    sizes = [shard.num_bytes or 0 for shard in shards]
    total, largest = sum(sizes), max(sizes)
    source = shards[sizes.index(largest)].source
    if 0 < cache.max_bytes < largest:
        raise cache.too_small(shown(source), largest)
    if total <= cache.max_bytes:
        return False, [
            f"{where}: {len(shards)} shards, {total / GIGABYTE:.3g} GB, are fetched into "
            f"{cache.folder} as they are read, each once"
        ]
    limit = f"{cache.setting}={cache.max_bytes / GIGABYTE:g}"
    size = f"{where}: {total / GIGABYTE:.3g} GB, above {limit}"
    enough = f"{cache.setting}={total / GIGABYTE + 0.01:.2f} and more"
    if in_order and cache.max_bytes:
        return False, [f"{size}: read in order, so each shard is fetched once and then makes room"]
    if not source.startswith(COMMAND) and facts(source).ranges:
        return True, [
            f"{size}: each sample is read by a range request, and nothing is kept; with {enough}, "
            "each shard is fetched once"
        ]
    if not cache.max_bytes:
        raise UserError(
            f"{size}: without a cache samples are read by range requests, which "
            f"{shown(source)} does not serve; set {enough}"
        )
    share = 1 - cache.max_bytes / total
    return False, [
        f"{size}, and ranges are not served: {share:.0%} of the samples cost a whole shard each, "
        f"{total / len(shards) / 1e6:.3g} MB; set {enough}, or copy the shards here"
    ]
