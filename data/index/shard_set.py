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
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

from blackpoint.data.bad_samples import BadSample
from blackpoint.data.files.errors import UserError
from blackpoint.data.files.lock import locked
from blackpoint.data.index.index import INDEX_FOLDER, Index, NotWritable, build_index, has_index
from blackpoint.data.index.remote_index import fetch_index
from blackpoint.data.shards.listing import (
    expand_braces,
    find_shards,
    folder_shards,
    is_encoded,
    is_remote,
)
from blackpoint.data.shards.options import ShardOptions, cache_folder
from blackpoint.data.shards.remote import COMMAND, facts, list_names, shown
from blackpoint.data.shards.remote_shards import RemoteShards
from blackpoint.data.shards.sample_keys import AUTOMATIC, SampleKeys
from blackpoint.data.shards.shard_cache import GIGABYTE, ShardCache

_SHELL = re.compile(r"(pipe|exec|cmd|popen|sh|bash|shell):|[|!]", re.IGNORECASE)


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
    names = [pattern] if Path(pattern).is_dir() else expand_braces(pattern, field)
    cache_dir, section = cache_folder(config.cache_dir), config.SECTION
    keys = SampleKeys(config.image_key, config.caption_key)
    if not any(is_remote(name) or _SHELL.match(name) for name in names):
        return replace(_local(find_shards(pattern, field), cache_dir), keys=keys, section=section)
    where = f"{field}={shown(pattern)}"
    commands = [name for name in names if _SHELL.match(name)]
    if commands:
        _check_commands(commands, names, where, section, config.allow_shell_urls)
        width = max(6, len(str(len(commands))))
        sources = {f"{n:0{width}d}.tar": command for n, command in enumerate(commands)}
        folder, is_whole = _kept(cache_dir, "commands", pattern), True
    else:
        folder, sources, is_whole = _beside_urls(names, where, cache_dir)
    max_bytes = int(config.cache_gigabytes * GIGABYTE)
    cache = ShardCache(cache_dir / "shards", max_bytes, f"{section}cache_gigabytes")
    shard_bytes = _indexed_sizes(folder, sources, where)
    by_range, notes = False, list[str]()
    if shard_bytes:
        by_range, notes = _manner(sources, cache, shard_bytes, where, in_order)
    elif not max_bytes:
        raise UserError(
            f"{where}: has no index, and what reads the shards to make one needs room "
            f"for the largest of them: set {cache.setting} above 0"
        )
    digests = Index(folder).digests if shard_bytes else {}
    known = {name: digests[name].whole for name in sources if name in digests}
    remote = RemoteShards(sources, cache, shard_bytes, folder / INDEX_FOLDER, by_range, known)
    paths = [folder / name for name in sources]
    return ShardSet(folder, paths, folder, remote, is_whole, notes, keys, section)


def index_shards(
    shards: ShardSet, max_bad_share: float, max_image_pixels: int, num_processes: int = 1
) -> tuple[Path, list[BadSample]]:
    """Indexes the shards, which have none; returns where the index is, and the bad samples."""
    limits = (max_bad_share, max_image_pixels, num_processes)
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
        raise UserError(f"{where}: {other[0]} is no .tar file; shards are plain tars")
    wanted = sorted(set(wanted))
    sources = {name: f"{folder}/{name}{query}" for name in wanted}
    if has_index(kept) or is_encoded(kept):
        return kept, sources, has_index(kept) and set(wanted) == set(Index(kept).shard_names)
    own = _kept(cache_dir, folder.rpartition("/")[2], "\n".join([folder, *wanted]))
    return own, sources, True


def _split(url: str) -> tuple[str, str, str]:
    """Returns (folder, name, ?query) of a URL; the name is "" if it is that of a folder."""
    path, mark, query = url.partition("?") if url.startswith("http") else (url, "", "")
    folder, _, name = path.rpartition("/")
    if "." not in name and "*" not in name or folder.endswith("/"):
        return path.rstrip("/"), "", mark + query
    return folder, name, mark + query


def _indexed_sizes(folder: Path, sources: dict[str, str], where: str) -> dict[str, int]:
    """Returns the sizes that the index of `folder` has of some shards; empty without an index."""
    if not has_index(folder):
        return {}
    sizes = Index(folder).shard_bytes
    absent = [name for name in sources if name not in sizes]
    if absent:
        raise UserError(
            f"{where}: {len(absent)} shards are not in the index beside them, first {absent[0]}; "
            "name others, or write that index anew"
        )
    return {name: sizes[name] for name in sources}


def _manner(
    sources: dict[str, str],
    cache: ShardCache,
    shard_bytes: dict[str, int],
    where: str,
    in_order: bool,
) -> tuple[bool, list[str]]:
    """Returns whether members are read by range, and notes for the user."""
    total, largest = sum(shard_bytes.values()), max(shard_bytes.values())
    name = max(shard_bytes, key=shard_bytes.__getitem__)
    if 0 < cache.max_bytes < largest:
        raise cache.too_small(shown(sources[name]), largest)
    if total <= cache.max_bytes:
        return False, [
            f"{where}: {len(shard_bytes)} shards, {total / GIGABYTE:.3g} GB, are fetched into "
            f"{cache.folder} as they are read, each once"
        ]
    size = f"{where}: {total / GIGABYTE:.3g} GB, above {cache.setting}={_gigabytes(cache)}"
    enough = f"{cache.setting}={total / GIGABYTE + 0.01:.2f} and more"
    if in_order and cache.max_bytes:
        return False, [f"{size}: read in order, so each shard is fetched once and then makes room"]
    if not sources[name].startswith(COMMAND) and facts(sources[name]).ranges:
        return True, [
            f"{size}: each sample is read by a range request, and nothing is kept; with {enough}, "
            "each shard is fetched once"
        ]
    if not cache.max_bytes:
        raise UserError(
            f"{size}: without a cache samples are read by range requests, which "
            f"{shown(sources[name])} does not serve; set {enough}"
        )
    share = 1 - cache.max_bytes / total
    return False, [
        f"{size}, and ranges are not served: {share:.0%} of the samples cost a whole shard each, "
        f"{total / len(shard_bytes) / 1e6:.3g} MB; set {enough}, or copy the shards here"
    ]


def _gigabytes(cache: ShardCache) -> str:
    return f"{cache.max_bytes / GIGABYTE:g}"
