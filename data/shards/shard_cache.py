"""Whole shards from elsewhere on the local disk, up to a bound; shared by all processes.

    FOLDER/<hash of the URL>/<digest>/<name>.tar  a shard that holds what the digest is of
    FOLDER/<hash of the URL>/<name>.tar           one whose index has no digests, of the right size
    FOLDER/<hash of the URL>/<name>.tar.partial   one that is being fetched
    FOLDER/<hash of the URL>/copy.json            size, digest and server's version of the last one
    FOLDER/<hash of the URL>/lock, FOLDER/lock    see below

A shard's lock is held by who fetches it: two processes never fetch the same one at a time. What is
fetched takes its name in one step, under the lock of the folder, after the shards that were not
read for the longest time have made room: the shards never exceed the bound, and beside them lies
only what is being fetched. A killed process leaves a .partial, which the next one removes. Readers
take no lock: a shard that is removed while it is open can be read to its end.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from blackpoint.data.files.errors import RunFailed, UserError, WriteFailed, disk_writes
from blackpoint.data.files.lock import locked
from blackpoint.data.shards.remote import Fetched, TooLarge, facts, fetch, shown
from blackpoint.data.shards.shard_digest import file_digest

GIGABYTE = 10**9


class RemoteShard(NamedTuple):
    """A shard that is elsewhere, and what it was when it was indexed."""

    name: str
    source: str
    """URL, or pipe:COMMAND."""
    num_bytes: int | None = None
    """None without an index: the shard is what the server has now."""
    whole: str = ""
    """Digest of all bytes; "" where the index was written before there were digests."""


@dataclass(frozen=True)
class ShardCache:
    """Shards fetched into `folder`, `max_bytes` at most; `setting` is the field of that bound."""

    folder: Path
    max_bytes: int
    setting: str

    def find(self, shard: RemoteShard) -> int | None:
        """Returns a descriptor of a shard that is here already, or None."""
        path = self._path(shard, shard.whole)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if os.fstat(descriptor).st_size != shard.num_bytes:
            os.close(descriptor)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # The shard read last is removed last.
        return descriptor

    def open(self, shard: RemoteShard) -> int:
        """Returns a descriptor of a shard, fetched first where it is not here.

        Raises FileNotFoundError, Changed if it is not the one that was indexed, UserError and
        RunFailed.
        """
        descriptor = self.find(shard)
        while descriptor is None:
            with self.held(shard):
                descriptor = self.find(shard)
        return descriptor

    @contextmanager
    def held(self, shard: RemoteShard, anew: bool = False) -> Iterator[Path]:
        """Yields the file of a shard, which stays until the context ends.

        `anew`: what is here is not trusted.
        """
        folder = self._folder(shard.source)
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder / "lock"))
            except OSError as error:
                raise self.unwritable(error.strerror) from None
            yield (None if anew else self._here(shard)) or self._fetch(shard)

    def copy(self, source: str) -> Fetched | None:
        """Returns the last copy from a URL; None: none, or not known."""
        try:
            return Fetched(*json.loads((self._folder(source) / "copy.json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def too_small(self, what: str, num_bytes: int) -> UserError:
        """Returns the error for a shard that is larger than the bound."""
        return UserError(
            f"{self.setting}={self.max_bytes / GIGABYTE:g}: {what} alone has "
            f"{num_bytes / GIGABYTE:.3g} GB; set {self.setting} at least that high; best as high "
            "as the data set is large"
        )

    def unwritable(self, reason: str | None) -> UserError:
        """Returns the error for a folder that can't be used."""
        field = self.setting.replace("gigabytes", "dir")
        return UserError(
            f"{self.folder} can't be used as the cache of shards: {reason}; name another folder, "
            f"on a local disk: {field}=..."
        )

    def _folder(self, source: str) -> Path:
        return self.folder / hashlib.blake2b(source.encode(), digest_size=12).hexdigest()

    def _path(self, shard: RemoteShard, whole: str) -> Path:
        return self._folder(shard.source) / whole / shard.name

    def _here(self, shard: RemoteShard) -> Path | None:
        """Returns the file of a shard that is here already, or None; for who has its lock."""
        if shard.num_bytes is None:  # the server's version decides; of a command there is none
            copy = self.copy(shard.source)
            if copy is None or not copy.version:
                return None
            now = facts(shard.source)
            if now.version != copy.version or now.num_bytes not in (None, copy.num_bytes):
                return None
            shard = shard._replace(num_bytes=copy.num_bytes, whole=copy.whole)
        path, old = self._path(shard, shard.whole), self._path(shard, "")
        if shard.whole and not path.exists() and _size(old) == shard.num_bytes:
            # Fetched when there was only its size to know it by.
            if file_digest(old) == shard.whole:
                path.parent.mkdir(exist_ok=True)
                old.replace(path)
            else:
                old.unlink()
        return path if _size(path) == shard.num_bytes else None

    def _fetch(self, shard: RemoteShard) -> Path:
        partial = self._folder(shard.source) / f"{shard.name}.partial"
        try:
            fetched = fetch(shard.source, partial, shard.num_bytes, self.max_bytes, shard.whole)
            # An index without digests finds its shards by name alone.
            is_known = shard.num_bytes is None or shard.whole
            path = self._path(shard, fetched.whole if is_known else "")
            with disk_writes(), locked(self.folder / "lock"):
                self._make_room(fetched.num_bytes, path)
                path.parent.mkdir(exist_ok=True)
                partial.replace(path)
                (partial.parent / "copy.json").write_text(json.dumps(fetched))
            return path
        except TooLarge as error:
            raise self.too_small(shown(shard.source), error.args[0]) from None
        except WriteFailed as error:
            used = sum(size for _, size, _ in self._shards()) / GIGABYTE
            raise RunFailed(
                f"{partial.parent}: can't be written: {error}; the cache of shards holds "
                f"{used:.3g} GB; free some space, lower {self.setting}, or name a folder on a "
                "larger disk; the same command goes on from there"
            ) from None
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int, path: Path) -> None:
        """Removes the least recently read shards, and leftovers of killed processes."""
        shards = [shard for shard in self._shards() if shard[2] != path]
        total = sum(size for _, size, _ in shards)
        for _, size, victim in sorted(shards):
            if total + num_bytes <= self.max_bytes:
                break
            if self._remove_unheld(victim, path):
                total -= size
        for partial in self.folder.glob("*/*.partial"):
            if partial.parent not in path.parents:
                self._remove_unheld(partial, path)

    def _remove_unheld(self, victim: Path, path: Path) -> bool:
        """Removes a file unless another holds its shard; the lock of `path` is held here."""
        folder = self.folder / victim.relative_to(self.folder).parts[0]
        is_ours = folder in path.parents  # an earlier version of the same URL
        try:
            with nullcontext() if is_ours else locked(folder / "lock", wait=False):
                victim.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        return True

    def _shards(self) -> list[tuple[int, int, Path]]:
        """Lists (time of the last reading, bytes, path)."""
        shards = []
        for path in (*self.folder.glob("*/*.tar"), *self.folder.glob("*/*/*.tar")):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                shards.append((status.st_mtime_ns, status.st_size, path))
        return shards


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
