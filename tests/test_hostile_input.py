"""Hostile input for every reader: refused in words or taken, and nothing else happens.

200 seeds of tests/hostile_run.py, which lists the laws; 2,000 are `python -m tests.hostile_run`.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.notes import for_terminal
from blackpoint.data.files.paths import inside
from blackpoint.data.files.plain import read_array, read_json, read_lines
from blackpoint.sampling.prompts.prompt_set import iterate_prompts
from blackpoint.scripts.cli import main
from tests import browser, hostile_run
from tests.hostile_inputs import CANARY, MARKUP, TEXTS, Assets

NUMBER, PROCESSES = 200, 10


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Assets]:
    yield Assets.make(tmp_path_factory.mktemp("hostile"))


@pytest.mark.slow
def test_no_law_is_broken_by_any_reader(assets: Assets) -> None:
    rows = [hostile_run.judge(seed, assets) for seed in range(NUMBER)]
    assert not [row for row in rows if row.broken]
    assert {row.kind for row in rows} == set(hostile_run.KINDS)
    assert {row.status for row in rows} >= {0, 2}, "some are taken, some refused"


@pytest.mark.slow
def test_so_it_is_in_processes_of_their_own(assets: Assets) -> None:
    seeds = range(NUMBER, NUMBER + PROCESSES)
    rows = [hostile_run.judge(seed, assets, hostile_run.in_its_own_process) for seed in seeds]
    assert not [row for row in rows if row.broken]


@pytest.mark.slow
def test_the_laws_see_what_they_are_for(
    assets: Assets, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A command that does all that is forbidden breaks every law."""

    def wicked(arguments: list[str]) -> tuple[int, str]:
        Path(CANARY).touch()
        Path("beside").touch()
        (tmp_path / "outside").write_text("x")
        Path("out.html").write_text(f"<p>{MARKUP}</p>")
        held = bytearray(2**20 * (hostile_run.MOST_MB + 100))
        return 1, f"Traceback {len(held)} \x1b[31m"

    broken = hostile_run.judge(0, assets, wicked).broken
    for law in ("traceback", "status 1", "control characters", "executed", "wrote beside"):
        assert law in broken
    assert f"wrote {tmp_path}/outside" in broken and "markup <script>" in broken and "MB" in broken

    def endless(arguments: list[str]) -> tuple[int, str]:
        while True:
            pass

    monkeypatch.setattr(hostile_run, "LIMIT_S", 0.2)
    assert "no end in 0.2 s" in hostile_run.judge(0, assets, endless).broken
    assert "refused without" in hostile_run.judge(0, assets, lambda arguments: (2, "")).broken


@pytest.mark.slow
@pytest.mark.parametrize("name, head, line", [("txt", "", "a cat"), ("csv", "prompt", "a cat")])
def test_a_million_prompts_are_passed_in_little_memory(
    name: str, head: str, line: str, tmp_path: Path
) -> None:
    """Held at once they would be 50 MB of texts and 100 MB of rows."""
    path = tmp_path / f"p.{name}"
    path.write_text((f"{head}\n" if head else "") + f"{line}\n" * 10**6)
    start_mb = hostile_run.reset_peak_mb()
    (prompt,) = iterate_prompts(path, limit=1, offset=10**6 - 1)
    assert prompt.index == 10**6 - 1 and hostile_run.peak() - start_mb < 50


# --- What reaches terminals and pages ---


@pytest.mark.parametrize("text", TEXTS)
def test_no_text_moves_a_terminal(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = for_terminal(text)
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert shown == text or not text.isprintable()
    assert main([text]) == 2  # no verb: the message repeats it
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.slow
@browser.needs_chromium
def test_a_browser_runs_nothing_of_prompts_and_metrics(assets: Assets, tmp_path: Path) -> None:
    search = tmp_path / "search"
    shutil.copytree(assets.folder / "search", search)
    for name in ("winners.jsonl", "candidates.jsonl"):
        rows = [json.loads(line) for line in (search / name).read_text().splitlines()]
        for row, text in zip(rows, TEXTS[:3], strict=False):
            row["prompt"] = text
        (search / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    names = [MARKUP, "train/loss", "</style></svg><img src=x onerror=document.title='ran'>"]
    lines = [f'{step},"{name}",{step}' for step in range(3) for name in names]
    (run / "metrics.csv").write_text("\n".join(["step,name,value", *lines]) + "\n")
    (run / "environment.json").write_text(json.dumps({"command": TEXTS[1], "note": TEXTS[2]}))
    probe = "<script>window.alert = () => { document.title = 'ran'; };</script>"
    for folder in (search, run):
        assert main(["report", f"run_dir={folder}"]) == 0
        page = folder / "report.html"
        page.write_text(page.read_text().replace("<head>", f"<head>{probe}", 1))
        done = browser.loaded(page, tmp_path / "profile")
        assert "7331" in done.stdout and "<title>ran" not in done.stdout
        assert '<img src="x"' not in done.stdout


# --- Files that were damaged, by the function that reads them ---


@pytest.mark.parametrize(
    "content",
    [b"", b"[" * 100_000, b"\xff{}", b"9" * 5000, b'{"a": \x01}', b"null", b"[1]", b'"x"'],
)
def test_what_is_no_json_object_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="file.json (is not JSON|holds)"):
        read_json(path)
    if content:
        with pytest.raises(UserError, match="file.json:1 (is not JSON|holds)"):
            read_lines(path)
    path.write_text("{}")
    with pytest.raises(UserError, match="holds dict instead of list"):
        read_array(path)


@pytest.mark.parametrize(
    "name, is_inside",
    [
        ("a.png", True),
        ("images/../a.png", True),
        ("/etc/passwd", False),
        ("../a.png", False),
        ("images/../../a.png", False),
        ("\0", False),
        (None, False),
        (3, False),
    ],
)
def test_a_folder_names_files_of_its_own(name: object, is_inside: bool, tmp_path: Path) -> None:
    assert (inside(tmp_path, name) is not None) == is_inside


def test_a_report_shows_no_picture_from_outside_its_folder(tmp_path: Path) -> None:
    from blackpoint.sampling.report.page import embedded
    from blackpoint.sampling.report.search_page import _picture

    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="outside of the folder"):
        _picture(tmp_path / "run", "../secret.png")
    (tmp_path / "text.png").write_text("root:x:0:0")
    with pytest.raises(UserError, match="cannot be read as an image"):
        embedded(tmp_path / "text.png")
