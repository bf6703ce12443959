"""`blackpoint show`: the page samples, searches and says errors; nobody else is answered."""

import http.client
import json
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.runtime.pictures import eight_bit
from blackpoint.scripts.show.config import ShowConfig
from blackpoint.scripts.show.models import Models
from blackpoint.scripts.show.search import PageSearch
from blackpoint.scripts.show.server import ShowServer
from tests import browser

BASE = Path(__file__).resolve().parents[1] / "assets/tiny_sd"
JSON = {"Content-Type": "application/json"}
PROMPT = "a white three on a black background"
SAMPLE = f"""<script>
fields.prompt.value = {json.dumps(PROMPT)};
fields.num_steps.value = 2;
sample().then(() => {{ fields.num_steps.value = 0; return sample(); }});
</script></body>"""
SEARCH = """<script>
show("search");
fields.num_steps.value = 2;
fields.budget_nfe.value = 1;
search().then(() => {
  document.title = problem.textContent;
  fields.budget_nfe.value = 12;
  return search();
});
</script></body>"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the embedded base that has trained nothing yet, as far as the page looks at it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    (run / "export").mkdir(parents=True)
    model = DiffusionModel.load(BASE)
    model.save(run / "export")
    (run / "config.yaml").write_text(
        f"checkpoint: {BASE}\npreview: {{prompts: ['</script><b>{PROMPT}']}}\n", encoding="utf-8"
    )
    return run


@pytest.fixture(scope="module")
def models(run_dir: Path) -> Models:
    return Models(ShowConfig(str(run_dir), device="cpu"))


@contextmanager
def served(models: Models, config: ShowConfig, output: Path) -> Iterator[ShowServer]:
    with ShowServer(models, config, output) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.search.stop()
            server.shutdown()


@pytest.fixture
def server(models: Models, run_dir: Path, tmp_path: Path) -> Iterator[ShowServer]:
    config = ShowConfig(str(run_dir), output=str(tmp_path / "kept"), port=0, device="cpu")
    with served(models, config, tmp_path / "kept") as server:
        yield server


def sent(
    server: ShowServer, method: str, path: str, content: Any = None, **headers: str
) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, None if content is None else json.dumps(content), named)
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


def test_a_run_stands_beside_its_base_and_each_has_its_own_process(models: Models) -> None:
    assert models.titles == ["base", "fine-tune"] and len(models.about()) == 2
    assert "epsilon, non-zero terminal SNR, leading timesteps" in models.about()[0]
    asked = {"prompts": [PROMPT], "num_steps": 1, "guidance_scale": 1.0}
    trailing = models.sample(1, timestep_spacing="trailing", **asked)
    assert models.sample(1, **asked)["image"] != trailing["image"]  # the other's is not kept
    assert sum(trailing["histogram"]) == pytest.approx(1)


def test_a_picture_is_that_of_the_library(models: Models) -> None:
    asked = {"num_steps": 2, "guidance_scale": 3.0, "sampler": "euler"}
    shown = models.sample(0, prompts=[PROMPT], seed=5, **asked)
    image = DiffusionModel.load(BASE).sample([PROMPT], seeds=[5], **asked)[0]
    red, green, blue = eight_bit(image).double().mean((1, 2)) / 255
    # A pixel on the edge of two of the 256 levels may fall to either.
    expected = 0.299 * red + 0.587 * green + 0.114 * blue
    assert_close(torch.tensor(shown["luminance"]).double(), expected, atol=1e-4, rtol=0)


def test_values_are_refused_in_words(server: ShowServer) -> None:
    for values, words in (
        ({"num_steps": 0}, "num_steps=0"),
        ({"sampler": "fastest"}, "expected ddim | euler"),
        ({"seed": -1}, "seed=-1"),
        ({"guidance_rescale": 2}, "guidance_rescale=2"),
        ({"steps": 3}, "did you mean `num_steps`?"),
    ):
        asked = {"side": 0, "prompts": [PROMPT], **values}
        status, text = sent(
            server, "POST", "/sample", asked, **{"Content-Type": JSON["Content-Type"]}
        )
        assert status == 400 and words in json.loads(text)["error"]
    status, text = sent(server, "POST", "/search/state", {"known": 0, "shown": 0}, **JSON)
    assert status == 400 and "no search has been started" in text


def test_other_names_and_other_sites_are_not_answered(server: ShowServer) -> None:
    port = server.server_address[1]
    asked = {"side": 0, "prompts": [PROMPT], "num_steps": 1}
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost:9"):  # the last: a tunnel
        assert sent(server, "GET", "/", Host=host)[0] == 200
        answer = sent(
            server, "POST", "/search/stop", {}, Host=host, Origin=f"http://{host}", **JSON
        )
        assert answer == (200, "{}")
    for headers in (
        {"Host": "rebound.example"},
        {"Host": f"127.0.0.1.example:{port}"},
        {"Host": ""},
        {"Origin": "http://site.example"},
        {"Origin": "null"},
        {"Origin": f"https://127.0.0.1:{port}"},
    ):
        assert sent(server, "GET", "/", **headers)[0] == 403
        assert sent(server, "POST", "/sample", asked, **headers, **JSON)[0] == 403
    assert sent(server, "POST", "/sample", asked, **{"Content-Type": "text/plain"})[0] == 403
    assert sent(server, "POST", "/sample", "x" * 200_000, **JSON)[0] == 403
    assert sent(server, "GET", "/config.yaml")[0] == 403
    assert server.server_address[0] == "127.0.0.1"


def test_texts_of_a_run_are_not_run(server: ShowServer) -> None:
    _, page = sent(server, "GET", "/")
    assert "</script><b>" not in page and "\\u003c/script>\\u003cb>" in page


def test_searches_that_start_together_leave_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Counted(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Counted)
    monkeypatch.setattr("blackpoint.scripts.show.search.verb_command", lambda *_: ["sleep", "99"])
    search = PageSearch(ShowConfig("x"), tmp_path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: search.start("a cat", 0.5), range(4)))
    search.stop()
    left = [process for process in started if process.poll() is None]
    for process in left:
        process.kill()
    assert len(started) == 4 and not left


def test_a_port_that_is_taken_is_named(server: ShowServer, models: Models, tmp_path: Path) -> None:
    for port in (server.server_address[1], 70_000):
        with pytest.raises(UserError, match=f"port={port} cannot be opened"):
            ShowServer(models, ShowConfig("x", port=port), tmp_path)


@pytest.mark.slow
@browser.needs_chromium
def test_the_page_samples_searches_and_shows_errors_in_a_browser(
    server: ShowServer, tmp_path: Path
) -> None:
    """It names no other address, and its policy lets the browser ask none."""
    page, url = server.page, f"http://127.0.0.1:{server.server_address[1]}/"
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    server.page = page.replace("</body>", SAMPLE)
    done = browser.loaded(url, tmp_path / "profile")
    assert "CONSOLE" not in done.stderr.replace("400 (Bad Request)", ""), done.stderr
    assert done.stdout.count("data:image/png;base64,") == 2
    assert done.stdout.count("num_steps=0 must be at least 1") == 2
    server.page = page.replace("</body>", SEARCH)
    done = browser.loaded(url, tmp_path / "profile")
    shown = done.stdout.partition('id="tiles"')[2]
    curve = done.stdout.partition('<svg id="curve"')[2].partition("</svg>")[0]
    assert "hidden" not in curve.partition(">")[0] and '<path d="M' in curve
    assert "best score so far against NFE" in curve
    assert "first seed" in shown and "winner: " in shown and "from the first to the best" in shown
    assert "<title>budget_nfe=1 is smaller than one image" in done.stdout
    assert len(list((tmp_path / "kept").glob("*/winners.jsonl"))) == 1
