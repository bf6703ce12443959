"""The server of the page: this machine's own address alone, and only what the page itself asks.

A page of another site can neither send to it (its Origin is another, and JSON is not sent across
origins unasked) nor read it by a name of its own that leads to 127.0.0.1 (the Host is another).
Paths, modules and commands are no part of a request.
"""

import contextlib
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.samplers import SAMPLERS
from blackpoint.scripts.show.config import ShowConfig
from blackpoint.scripts.show.models import Models
from blackpoint.scripts.show.search import PageSearch

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("show.html")
ADDRESS, NAMES = "127.0.0.1", ("127.0.0.1", "localhost")
MOST_BYTES = 100_000
POLICY = "default-src 'self' 'unsafe-inline' data:; frame-ancestors 'none'"


class ShowServer(ThreadingHTTPServer):
    """Answers the page of these models."""

    daemon_threads = True

    def __init__(self, models: Models, config: ShowConfig, output: Path) -> None:
        self.search = PageSearch(config, output)
        sides: dict[str, Any] = {
            "titles": models.titles,
            "lines": models.about(),
            "prompts": models.prompts,
        }
        about = sides | {"samplers": list(SAMPLERS), "search": config.search}
        text = json.dumps(about).replace("<", "\\u003c")
        self.page = PAGE.read_text(encoding="utf-8").replace('"ABOUT"', text)
        self.answers: Mapping[str, Callable[..., Mapping[str, Any]]] = {
            "/sample": models.sample,
            "/search": self.search.start,
            "/search/state": self.search.state,
            "/search/stop": self.search.stop,
        }
        try:
            super().__init__((ADDRESS, config.port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"port={config.port} cannot be opened ({error}); give another, or 0"
            ) from None


class Handler(BaseHTTPRequestHandler):
    """One request: the page, or what it asks for as JSON."""

    server: ShowServer

    def do_GET(self) -> None:
        if self._is_ours() and self.path == "/":
            self._send(200, self.server.page)
        else:
            self._send(403, {"error": f"this page answers at http://{ADDRESS} and to itself alone"})

    def do_POST(self) -> None:
        length, answer = self.headers.get("Content-Length", ""), self.server.answers.get(self.path)
        is_json = self.headers.get_content_type() == "application/json"
        is_short = length.isdecimal() and int(length) <= MOST_BYTES
        if answer is None or not (self._is_ours() and is_json and is_short):
            return self._send(403, {"error": "this is no request of the page's own"})
        try:
            content = answer(**json.loads(self.rfile.read(int(length))))
        except (UserError, RunFailed) as error:
            return self._send(400, {"error": str(error)})
        except Exception as error:
            log.exception("a request of the page failed")
            return self._send(500, {"error": f"{type(error).__name__}: {error}"})
        self._send(200, content)

    def _is_ours(self) -> bool:
        """Whether it comes by our own name, and not from a page of another site."""
        host = self.headers.get("Host", "")
        is_own = self.headers.get("Origin") in (None, f"http://{host}")
        return is_own and host.partition(":")[0] in NAMES

    def _send(self, status: int, content: str | Mapping[str, Any]) -> None:
        kind, text = "text/html", content
        if not isinstance(text, str):
            kind, text = "application/json", json.dumps(content)
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", POLICY)
        with contextlib.suppress(ConnectionError):  # the page was closed
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the terminal for notes and errors."""


def serve(config: ShowConfig) -> None:
    """Loads the models and answers until it is interrupted."""
    models = Models(config)
    with (
        tempfile.TemporaryDirectory(prefix="blackpoint-show-") as scratch,
        ShowServer(models, config, Path(config.output or scratch)) as server,
    ):
        address = f"http://{ADDRESS}:{server.server_address[1]}"
        print(f"{address} shows {config.checkpoint}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        finally:
            server.search.stop()
