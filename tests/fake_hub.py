"""A hub on loopback, as far as the hub's client asks one for models."""

import hashlib
import json
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from tests.shard_server import answering

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Serves the folders OWNER/NAME of a folder as models; those of `gated` need a licence."""

    daemon_threads = True

    def __init__(self, folder: Path, gated: tuple[str, ...] = ()) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.gated = folder, gated
        self.fetched: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        words = unquote(self.path.partition("?")[0]).strip("/").split("/")
        is_question = words[:2] == ["api", "models"]
        owner, name, *rest = words[2:] if is_question else words
        model, folder = f"{owner}/{name}", self.server.folder / owner / name
        if model in self.server.gated:
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif not folder.is_dir():
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif is_question:
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            names = [str(path.relative_to(folder)) for path in files]
            about = {"id": model, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            tree = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": COMMIT}
                for name, path in zip(names, files, strict=True)
            ]
            content = json.dumps(tree if rest[:1] == ["tree"] else about).encode()
            self._answer(200, content, {"Content-Type": "application/json"})
        else:
            path = folder.joinpath(*rest[2:])  # resolve/REVISION/FILE
            if not path.is_file():
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            if self.command == "GET":
                self.server.fetched.add(f"{model}/{path.relative_to(folder)}")
            content = path.read_bytes()
            etag = hashlib.sha1(content).hexdigest()
            self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Stays silent."""


def fake_hub(folder: Path, gated: tuple[str, ...] = ()) -> AbstractContextManager[FakeHub]:
    """Runs one for as long as the block."""
    return answering(FakeHub(folder, gated))
