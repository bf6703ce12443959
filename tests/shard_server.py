"""A web server on loopback that serves a folder, as well or as badly as a test wants."""

import email.utils
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar

from tests.waiting import PATIENCE_S

ServerT = TypeVar("ServerT", bound=ThreadingHTTPServer)
Fault = Callable[["Handler", bytes], bool]
"""Answers a GET of what is left to send in its own way; False: as if there were no fault."""


class ShardServer(ThreadingHTTPServer):
    """Serves `folder`; each GET of a .tar takes the next fault of `faults`, while there are any."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: list[Fault] = []
        self.serves_ranges = True
        self.lists = False
        self.is_down = False
        self.num_gets: Counter[str] = Counter()
        self.ranges: list[str] = []
        """Of samples; who asks for a size and version alone is counted by `num_asked`."""
        self.num_asked: Counter[str] = Counter()
        self.versions = True
        """Whether answers say when a file was last changed."""
        self.active: Counter[str] = Counter()
        self.most_at_once: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Stays silent: clients that hang up are what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: ShardServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].lstrip("/")
        server = self.server
        if server.is_down:
            self.close_connection = True
            return
        if self.headers.get("Range") == "bytes=0-0":
            with server.lock:
                server.num_asked[name] += 1
            self._answer(server.folder / name, None)
            return
        with server.lock:
            server.num_gets[name] += 1
            server.active[name] += 1
            server.most_at_once[name] = max(server.most_at_once[name], server.active[name])
            fault = server.faults.pop(0) if name.endswith(".tar") and server.faults else None
        try:
            self._answer(server.folder / name, fault)
        finally:
            with server.lock:
                server.active[name] -= 1

    def _answer(self, path: Path, fault: Fault | None) -> None:
        if self.server.lists and path.is_dir():
            links = "".join(f'<a href="{child.name}">x</a>' for child in path.iterdir())
            self.head(200, len(links), kind="text/html")
            self.wfile.write(links.encode())
            return
        if not path.is_file():
            self.head(404, 0)
            return
        content = path.read_bytes()
        self.modified = email.utils.formatdate(path.stat().st_mtime, usegmt=True)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.server.serves_ranges:
            with self.server.lock:
                if self.headers["Range"] != "bytes=0-0":
                    self.server.ranges.append(self.headers["Range"])
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            part = content[first : last + 1]
            self.status = 206
            self.extra = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        else:
            part, self.status, self.extra = content, 200, {}
        if fault and fault(self, part):
            return
        self.head(self.status, len(part), **self.extra)
        self.wfile.write(part)

    def head(self, status: int, length: int | None, kind: str = "", **headers: str) -> None:
        """Sends the status and the headers."""
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if hasattr(self, "modified") and self.server.versions:
            self.send_header("Last-Modified", self.modified)
        if kind:
            self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Is silent."""


def drops_after(num_bytes: int) -> Fault:
    """Promises everything, sends the first bytes and closes the connection."""

    def fault(handler: Handler, part: bytes) -> bool:
        handler.head(handler.status, len(part), **handler.extra)
        handler.wfile.write(part[:num_bytes])
        handler.wfile.flush()
        handler.close_connection = True
        return True

    return fault


def cut_short(num_bytes: int) -> Fault:
    """Sends the first bytes as if they were all, without saying how many come."""

    def fault(handler: Handler, part: bytes) -> bool:
        handler.head(handler.status, None, Connection="close", **handler.extra)
        handler.wfile.write(part[:num_bytes])
        handler.close_connection = True
        return True

    return fault


def stalls_after(num_bytes: int, released: threading.Event) -> Fault:
    """Sends the first bytes and then nothing, until `released`."""

    def fault(handler: Handler, part: bytes) -> bool:
        handler.head(handler.status, len(part), **handler.extra)
        handler.wfile.write(part[:num_bytes])
        handler.wfile.flush()
        released.wait(PATIENCE_S)
        handler.close_connection = True
        return True

    return fault


def answers(status: int) -> Fault:
    """Answers with an error status."""

    def fault(handler: Handler, part: bytes) -> bool:
        handler.head(status, 0)
        return True

    return fault


@contextmanager
def answering(server: ServerT) -> Iterator[ServerT]:
    """Runs a server in a thread of this process."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def serving(folder: Path) -> AbstractContextManager[ShardServer]:
    """Runs a server of shards in a thread of this process."""
    return answering(ShardServer(folder))
