"""Bytes from elsewhere: any URL that fsspec opens, or the output of a command.

A dropped connection, a stall, a short read or a busy server is tried again after growing pauses.
A download goes on where it stopped if the server can (by a range, of the same version of the
file), else from its beginning. What will not pass, such as a wrong name, is an error at once.
"""

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from data.errors import Unreachable, UserError, disk_writes

ResultT = TypeVar("ResultT")

CHUNK_BYTES = 1 << 22
PAUSES_S = (0.5, 1, 2, 4, 8, 16, 30)
"""Before each new try; the count starts again when a download has gone on."""
STALL_S = 60
"""A server that sends nothing for so long has dropped the connection."""
COMMAND = "pipe:"
PASSING_STATUS = (0, 408, 425, 429)  # and all from 500
NETWORK_PACKAGES = ("aiohttp", "aiobotocore", "botocore", "gcsfs", "http", "requests", "urllib3")
# What pip has to install for a protocol that fsspec knows and has no package for.
EXTRAS = {"s3": "blackpoint[remote]", "gs": "blackpoint[remote]", "gcs": "blackpoint[remote]"}


class Changed(Exception):
    """A file has not the size that it had when it was indexed."""


class Refused(UserError):
    """The server knows the file, or does not say, and will not give it."""


class TooLarge(Exception):
    """A file is larger than what may be fetched."""


@dataclass(frozen=True)
class Facts:
    """Size of a remote file, None where the server does not say, and whether it serves ranges."""

    num_bytes: int | None
    ranges: bool


def shown(source: str) -> str:
    """Returns a URL without what may be secret, its query and password; a command as it is."""
    if source.startswith(COMMAND):
        return source
    return re.sub(r"//[^/@]*@", "//", source.partition("?")[0])


def fetch(
    source: str, path: Path, num_bytes: int | None = None, max_bytes: int | None = None
) -> int:
    """Writes a URL, or a command's output, into the file `path`; returns its size.

    Raises FileNotFoundError, Changed where it has not `num_bytes`, TooLarge above `max_bytes`,
    UserError, Unreachable after the last try, and WriteFailed where `path` can't be written.
    """
    with disk_writes():
        file = path.open("wb")
    with file:
        if source.startswith(COMMAND):
            found = _run(source, file)
        else:
            found = _download(source, file, num_bytes, max_bytes)
        if num_bytes is not None and found != num_bytes:
            raise Changed(f"{num_bytes} bytes when it was indexed, {found} now")
        if max_bytes is not None and found > max_bytes:
            raise TooLarge(found)
        with disk_writes():
            file.flush()
            os.fsync(file.fileno())
    return found


def read_bytes(source: str, tries: int | None = None) -> bytes:
    """Returns a small file; raises what `fetch` raises."""
    file_system, path = _open_file_system(source)
    return _until_it_works(source, lambda: file_system.cat_file(path), tries)


def read_range(source: str, offset: int, size: int) -> bytes:
    """Returns `size` bytes of a URL from `offset`; raises what `fetch` raises."""
    file_system, path = _open_file_system(source)

    def read() -> bytes:
        found = file_system.cat_file(path, start=offset, end=offset + size)
        if len(found) != size:
            raise ConnectionError(f"{len(found)} bytes came, not the {size} asked for")
        return found

    return _until_it_works(source, read)


def facts(source: str) -> Facts:
    """Asks for the first byte of a URL, and for its size."""
    file_system, path = _open_file_system(source)

    def ask() -> Facts:
        if not _is_http(file_system):
            return Facts(file_system.size(path), True)
        with closing(_request(file_system, path, "bytes=0-0")) as stream:
            total = _total_bytes(stream.r)
            return Facts(total, stream.r.status == 206)

    return _until_it_works(source, ask)


def list_names(folder: str) -> list[str]:
    """Returns the names of the files of a folder's URL, sorted; empty where it can't be listed."""
    file_system, path = _open_file_system(folder)

    def names() -> list[str]:
        try:
            return sorted(name.rpartition("/")[2] for name in file_system.ls(path, detail=False))
        except (FileNotFoundError, NotImplementedError):
            return []

    return _until_it_works(folder, names)


def _download(source: str, file: BinaryIO, num_bytes: int | None, max_bytes: int | None) -> int:
    file_system, path = _open_file_system(source)
    patience = _Patience(source)
    done, version, total = 0, "", num_bytes
    while True:
        begun = done
        try:
            with _stream(file_system, path, done, version) as stream:
                if num_bytes is not None and stream.total not in (None, num_bytes):
                    raise Changed(f"{num_bytes} bytes when it was indexed, {stream.total} now")
                if max_bytes is not None and (stream.total or 0) > max_bytes:
                    raise TooLarge(stream.total)
                if stream.start and stream.total != total:
                    begun = done = 0
                    raise ConnectionError("it changed while it was fetched")
                begun = done = stream.start
                version = stream.version
                total = num_bytes if stream.total is None else stream.total
                with disk_writes():
                    file.seek(done)
                    file.truncate()
                while chunk := stream.read(CHUNK_BYTES):
                    with disk_writes():
                        file.write(chunk)
                    done += len(chunk)
                    if max_bytes is not None and done > max_bytes:
                        raise TooLarge(done)
            if total is not None and done < total:
                raise ConnectionError(f"it ended after {done} of {total} bytes")
            return done
        except Exception as error:
            # Going on by a range gets to the end at last; beginning anew each time may not.
            patience.failed(error, progress=0 < begun < done)


@dataclass
class _Stream:
    """A file from byte `start`; `version` is what proves a later range to be of the same file."""

    start: int
    total: int | None
    version: str
    read: Callable[[int], bytes]


@contextmanager
def _stream(file_system: Any, path: str, start: int, version: str) -> Iterator[_Stream]:
    if not _is_http(file_system):
        total = file_system.size(path)
        with file_system.open(path, "rb", cache_type="none") as file:
            file.seek(start)
            yield _Stream(start, total, "", file.read)
        return
    wanted = f"bytes={start}-" if start else ""
    with closing(_request(file_system, path, wanted, version)) as stream:
        answer = stream.r
        found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        begin = int(found[1]) if answer.status == 206 and found else 0
        strong = answer.headers.get("ETag", "")
        if strong.startswith("W/"):
            strong = ""
        tag = strong or answer.headers.get("Last-Modified", "")
        yield _Stream(begin, _total_bytes(answer), tag, stream.read)


def _request(file_system: Any, path: str, wanted: str = "", version: str = "") -> Any:
    """Returns fsspec's stream of a GET, whose answer is `.r`; raises for an error status."""
    headers = {"Accept-Encoding": "identity"}
    if wanted:
        headers["Range"] = wanted
    if version and wanted:
        headers["If-Range"] = version  # A file that changed meanwhile comes whole.
    # The size is a dummy: without one, fsspec would ask for it first.
    return file_system.open(path, "rb", block_size=0, size=1, headers=headers)


def _total_bytes(answer: Any) -> int | None:
    whole = re.match(r"bytes [\d-]+/(\d+)", answer.headers.get("Content-Range", ""))
    if answer.status == 206:
        return int(whole[1]) if whole else None
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _run(source: str, file: BinaryIO) -> int:
    """Runs a command and writes what it prints; a command that fails is run again."""
    command = source.removeprefix(COMMAND)
    patience = _Patience(source)
    while True:
        with disk_writes():
            file.seek(0)
            file.truncate()
        with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
            assert process.stdout
            try:
                while chunk := process.stdout.read(CHUNK_BYTES):
                    with disk_writes():
                        file.write(chunk)
            except BaseException:
                process.kill()
                raise
        if process.returncode == 0 and file.tell():
            return file.tell()
        if process.returncode in (126, 127):
            raise UserError(f"{source}: the shell can't run it; what it says is above.")
        why = f"exit status {process.returncode}" if process.returncode else "it printed nothing"
        patience.failed(ConnectionError(why), progress=False)


class _Patience:
    """Counts the failures of one file: waits after each, and raises what ends the matter."""

    def __init__(self, source: str, tries: int | None = None) -> None:
        self.source, self.tries, self.failures = source, tries or len(PAUSES_S) + 1, 0

    def failed(self, error: Exception, progress: bool) -> None:
        if isinstance(error, FileNotFoundError) or not _is_of_a_server(error):
            raise error
        if not _may_pass(error):
            raise Refused(
                f"{shown(self.source)}: can't be read ({_reason(error)}). Check the address, and "
                "the credentials that the protocol takes from its environment."
            ) from None
        self.failures = 1 if progress else self.failures + 1
        if self.failures >= self.tries:
            raise Unreachable(
                f"{shown(self.source)}: can't be read after {self.tries} tries "
                f"({_reason(error)}). Start the same command again when the server answers: it "
                "goes on from where it stands."
            ) from None
        pause_s = PAUSES_S[min(self.failures, len(PAUSES_S)) - 1]
        what = f"{shown(self.source)}: {_reason(error)}; trying again in {pause_s:g} s"
        print(what, file=sys.stderr, flush=True)
        time.sleep(pause_s)


def _until_it_works(source: str, read: Callable[[], ResultT], tries: int | None = None) -> ResultT:
    patience = _Patience(source, tries)
    while True:
        try:
            return read()
        except Exception as error:
            patience.failed(error, progress=False)


def _is_of_a_server(error: Exception) -> bool:
    """Tells an error of the other side from one of our own, or of the disk."""
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | asyncio.TimeoutError | EOFError) or (
        package in NETWORK_PACKAGES
    )


def _may_pass(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status in PASSING_STATUS or status >= 500
    lasting = (PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
    return not isinstance(error, lasting) and "Credentials" not in type(error).__name__


def _reason(error: Exception) -> str:
    status = getattr(error, "status", 0)
    if status:
        return f"HTTP status {status}"
    text = str(error).partition("\n")[0].partition(": <")[0]
    return text if text and "://" not in text else f"{type(error).__name__}"


def _is_http(file_system: Any) -> bool:
    return "http" in _protocols(file_system)


def _protocols(file_system: Any) -> tuple[str, ...]:
    protocol = file_system.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _open_file_system(source: str) -> tuple[Any, str]:
    """Returns fsspec's file system, one a process, and the path in it; raises UserError."""
    from fsspec.core import url_to_fs  # It takes a tenth of a second: not for local shards.

    protocol = re.match(r"[a-z0-9+.-]*", source)
    name = protocol[0] if protocol else ""
    options: dict[str, Any] = {}
    try:
        if name in ("http", "https"):
            from aiohttp import ClientTimeout

            # aiohttp's own limit of five minutes is for a whole file, however large.
            limit = ClientTimeout(total=None, sock_connect=STALL_S, sock_read=STALL_S)
            options = {"client_kwargs": {"timeout": limit, "trust_env": True}}
        return url_to_fs(source, **options)
    except ImportError as error:
        package = EXTRAS.get(name)
        remedy = f"pip install '{package}'" if package else str(error).partition("\n")[0]
        raise UserError(
            f"{shown(source)}: reading {name}:// needs a package that is not installed: {remedy}"
        ) from None
    except ValueError as error:
        raise UserError(f"{shown(source)}: no such kind of URL ({error}).") from None
