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
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from blackpoint.data.files.errors import Unreachable, UserError, disk_writes
from blackpoint.data.files.signals import sleep
from blackpoint.data.shards.remote_address import (
    COMMAND,
    http_version,
    is_http,
    open_file_system,
    request,
    shown,
    stored_version,
    total_bytes,
)
from blackpoint.data.shards.shard_digest import new_digest

ResultT = TypeVar("ResultT")

CHUNK_BYTES = 1 << 22
PAUSES_S = (0.5, 1, 2, 4, 8, 16, 30)
"""Before each new try; the count starts again when a download has gone on."""
STALL_S = 60
"""A server that sends nothing for so long has dropped the connection."""
PASSING_STATUS = (0, 408, 425, 429)  # and all from 500
NETWORK_PACKAGES = ("aiohttp", "aiobotocore", "botocore", "gcsfs", "http", "requests", "urllib3")


class Changed(Exception):
    """A file has not the size or the bytes that it had when it was indexed."""


class Refused(UserError):
    """The server knows the file, or does not say, and will not give it."""


class TooLarge(Exception):
    """A file is larger than may be fetched."""


@dataclass(frozen=True)
class Facts:
    """Size of a remote file, None where the server does not say, and whether it serves ranges.

    `version` is ETag or Last-Modified; "" where the server gives neither.
    """

    num_bytes: int | None
    ranges: bool
    version: str = ""


class Fetched(NamedTuple):
    """Size and digest of the fetched bytes, and the server's version of them."""

    num_bytes: int
    whole: str
    version: str = ""


def fetch(
    source: str,
    path: Path | None,
    num_bytes: int | None = None,
    max_bytes: int | None = None,
    whole: str = "",
) -> Fetched:
    """Writes a URL, or a command's output, into the file `path`; None: it is read and not kept.

    Raises FileNotFoundError, Changed where it has not `num_bytes` or the digest `whole`, TooLarge
    above `max_bytes`, UserError, Unreachable after the last try, and WriteFailed where `path` can't
    be written.
    """
    with disk_writes():
        file = path.open("wb") if path else None
    with file or nullcontext():
        sink = _Sink(file)
        if source.startswith(COMMAND):
            version = _run(source, sink)
        else:
            version = _download(source, sink, num_bytes, max_bytes)
        fetched = Fetched(sink.num_bytes, sink.digest.hexdigest(), version)
        if num_bytes is not None and fetched.num_bytes != num_bytes:
            raise Changed(f"{num_bytes} bytes when it was indexed, {fetched.num_bytes} now")
        if max_bytes is not None and fetched.num_bytes > max_bytes:
            raise TooLarge(fetched.num_bytes)
        if whole and fetched.whole != whole:
            raise Changed("other bytes than when it was indexed")
        if file:
            with disk_writes():
                file.flush()
                os.fsync(file.fileno())
    return fetched


class _Sink:
    """Digests the incoming bytes and writes them into a file, if there is one."""

    def __init__(self, file: BinaryIO | None) -> None:
        self._file, self.num_bytes, self.digest = file, 0, new_digest()

    def go_on_from(self, offset: int) -> None:
        """Prepares for the next bytes, or for a new beginning."""
        if offset != self.num_bytes:
            assert offset == 0, "a download goes on where it stopped, or begins anew"
            self.num_bytes, self.digest = 0, new_digest()
        if self._file:
            with disk_writes():
                self._file.seek(offset)
                self._file.truncate()

    def write(self, chunk: bytes) -> None:
        if self._file:
            with disk_writes():
                self._file.write(chunk)
        self.num_bytes += len(chunk)
        self.digest.update(chunk)


def read_bytes(source: str, tries: int | None = None) -> bytes:
    """Returns a small file; raises what `fetch` raises."""
    file_system, path = open_file_system(source, STALL_S)
    return _until_it_works(source, lambda: file_system.cat_file(path), tries)


def read_range(source: str, offset: int, size: int) -> bytes:
    """Returns `size` bytes of a URL from `offset`; raises what `fetch` raises."""
    file_system, path = open_file_system(source, STALL_S)

    def read() -> bytes:
        content = file_system.cat_file(path, start=offset, end=offset + size)
        if len(content) != size:
            raise ConnectionError(f"{len(content)} bytes came, not the {size} asked for")
        return content

    return _until_it_works(source, read)


def facts(source: str, tries: int | None = None) -> Facts:
    """Asks for the first byte of a URL, and for its size and version."""
    file_system, path = open_file_system(source, STALL_S)

    def ask() -> Facts:
        if not is_http(file_system):
            info = file_system.info(path)
            return Facts(info.get("size"), True, stored_version(info))
        with closing(request(file_system, path, "bytes=0-0")) as stream:
            answer = stream.r
            return Facts(total_bytes(answer), answer.status == 206, http_version(answer))

    return _until_it_works(source, ask, tries)


def list_names(folder: str) -> list[str]:
    """Returns the names of the files of a folder's URL, sorted; empty where it can't be listed."""
    file_system, path = open_file_system(folder, STALL_S)

    def names() -> list[str]:
        try:
            return sorted(name.rpartition("/")[2] for name in file_system.ls(path, detail=False))
        except (FileNotFoundError, NotImplementedError):
            return []

    return _until_it_works(folder, names)


def _download(source: str, sink: _Sink, num_bytes: int | None, max_bytes: int | None) -> str:
    """Fetches a URL into `sink` and returns its version."""
    file_system, path = open_file_system(source, STALL_S)
    patience = _Patience(source)
    done, resumes, version, total = 0, "", "", num_bytes
    while True:
        begun = done
        try:
            with _stream(file_system, path, done, resumes) as stream:
                if num_bytes is not None and stream.total not in (None, num_bytes):
                    raise Changed(f"{num_bytes} bytes when it was indexed, {stream.total} now")
                if max_bytes is not None and (stream.total or 0) > max_bytes:
                    raise TooLarge(stream.total)
                before = (done, total, version)
                if stream.start and (stream.start, stream.total, stream.version) != before:
                    begun = done = 0
                    raise ConnectionError("it changed while it was fetched")
                begun = done = stream.start
                resumes, version = stream.resumes, stream.version
                total = num_bytes if stream.total is None else stream.total
                sink.go_on_from(done)
                while chunk := stream.read(CHUNK_BYTES):
                    sink.write(chunk)
                    done += len(chunk)
                    if max_bytes is not None and done > max_bytes:
                        raise TooLarge(done)
            if total is not None and done < total:
                raise ConnectionError(f"it ended after {done} of {total} bytes")
            return version
        except Exception as error:
            # Going on by a range gets to the end at last; beginning anew each time may not.
            patience.failed(error, progress=0 < begun < done)


@dataclass
class _Stream:
    """A file from byte `start`; `resumes` proves a later range to be of the same file."""

    start: int
    total: int | None
    resumes: str
    version: str
    read: Callable[[int], bytes]


@contextmanager
def _stream(file_system: Any, path: str, start: int, resumes: str) -> Iterator[_Stream]:
    if not is_http(file_system):
        info = file_system.info(path)
        with file_system.open(path, "rb", cache_type="none") as file:
            file.seek(start)
            yield _Stream(start, info.get("size"), "", stored_version(info), file.read)
        return
    wanted = f"bytes={start}-" if start else ""
    with closing(request(file_system, path, wanted, resumes)) as stream:
        answer = stream.r
        content_range = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        begin = int(content_range[1]) if answer.status == 206 and content_range else 0
        strong = answer.headers.get("ETag", "")
        if strong.startswith("W/"):
            strong = ""
        tag = strong or answer.headers.get("Last-Modified", "")
        yield _Stream(begin, total_bytes(answer), tag, http_version(answer), stream.read)


def _run(source: str, sink: _Sink) -> str:
    """Writes the output of a command; one that fails is run again. Returns "", its version."""
    command = source.removeprefix(COMMAND)
    patience = _Patience(source)
    while True:
        sink.go_on_from(0)
        with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
            assert process.stdout
            try:
                while chunk := process.stdout.read(CHUNK_BYTES):
                    sink.write(chunk)
            except BaseException:
                process.kill()
                raise
        if process.returncode == 0 and sink.num_bytes:
            return ""
        if process.returncode in (126, 127):
            raise UserError(f"{source}: the shell can't run it; what it says is above")
        why = f"exit status {process.returncode}" if process.returncode else "it printed nothing"
        patience.failed(ConnectionError(why), progress=False)


class _Patience:
    """Counts the failures of one file: waits after each, and raises the final error."""

    def __init__(self, source: str, tries: int | None = None) -> None:
        self.source, self.tries, self.failures = source, tries or len(PAUSES_S) + 1, 0

    def failed(self, error: Exception, progress: bool) -> None:
        if isinstance(error, FileNotFoundError) or not _is_of_a_server(error):
            raise error
        if not _may_pass(error):
            raise Refused(
                f"{shown(self.source)}: can't be read ({_reason(error)}); check the address, and "
                "the credentials that the protocol takes from its environment"
            ) from None
        self.failures = 1 if progress else self.failures + 1
        if self.failures >= self.tries:
            raise Unreachable(
                f"{shown(self.source)}: can't be read after {self.tries} tries "
                f"({_reason(error)}); start the same command again when the server answers: it "
                "goes on from where it stands"
            ) from None
        pause_s = PAUSES_S[min(self.failures, len(PAUSES_S)) - 1]
        what = f"{shown(self.source)}: {_reason(error)}; trying again in {pause_s:g} s"
        print(what, file=sys.stderr, flush=True)
        sleep(pause_s)


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
