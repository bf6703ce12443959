"""The report page: self-contained, with the pictures, plots, numbers and command that it
promises."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from sampling.errors import UserError
from sampling.evaluation import plots
from sampling.evaluation.black_point import BlackPointConfig
from sampling.evaluation.black_point_study import Identity, reference_rows, run_study
from sampling.evaluation.black_point_summary import write_summary
from sampling.evaluation.digit_reader import DigitReader
from sampling.evaluation.rows import read_rows, write_rows
from scripts.run_evaluate import digit_captions
from scripts.run_report import ReportConfig, collect, write
from tests.digit_painter import load_square_painter


def make_run(run_dir: Path, checkpoints: dict[str, str]) -> Path:
    """Writes a run directory with a study by stand-in models, a loss and a preview."""
    torch.manual_seed(0)
    DigitReader().save(run_dir / "reader")
    config = BlackPointConfig(
        checkpoints=checkpoints,
        output=str(run_dir / "black_point"),
        digit_reader=str(run_dir / "reader"),
        num_images=12,
        read_images=30,
        guidance_scales=[1.0, 3.0],
        num_processes=1,
    )
    images = torch.linspace(0, 255, 5).repeat(4)[:, None, None, None].expand(20, 3, 16, 16).byte()
    real = reference_rows(images, [("a red one", 1)] * 20, DigitReader().eval())
    identities = dict.fromkeys(checkpoints, Identity("x"))
    rows = run_study(config, digit_captions(), real, identities, load_square_painter)
    write_summary(run_dir / "black_point", rows, list(checkpoints), 3.0)
    lines = ["step,name,value"]
    for step in range(10, 500, 10):
        lines.append(f"{step},train/loss,{1 / step}")
        if step % 100 == 0:
            lines += [f"{step},validation/{name},{2 / step}" for name in ("loss", "loss_terminal")]
    (run_dir / "metrics.csv").write_text("\n".join(lines) + "\n")
    (run_dir / "environment.json").write_text('{"command": "a <b>", "versions": {"torch": "2.14"}}')
    (run_dir / "timings.json").write_text('{"fine-tune": 61.4}')
    return run_dir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "some_run"
    return make_run(folder, {"base": "pull=0.9", "fine_tuned": "pull=0"})


class Elements(HTMLParser):
    """Counts elements, checks that they nest, and collects what could be fetched."""

    VOID = ("meta", "img", "path", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and value is not None:
                self.links.append(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_whole_and_refers_to_nothing_outside(run_dir: Path, tmp_path: Path) -> None:
    page = write(ReportConfig(str(run_dir), str(tmp_path / "page.html"), committed_rows="absent"))
    text = page.read_text(encoding="utf-8")
    elements = Elements(text)
    assert not elements.open
    assert elements.counts["svg"] == 5  # open, black, white, guidance, loss
    assert elements.counts["img"] == 2 * (8 + 8 + 8 + 6)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in elements.links)
    assert not re.search(r"(?:src|href)=\"https?:|@import|url\(http", text)
    for words in (
        "a black zero on a white background",
        "seed 3",
        "n=30",
        "fine-tune",
        "61",
        "a &lt;b&gt;",
    ):
        assert words in text
    assert "control" not in text


def test_control_comes_from_committed_rows(run_dir: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", {"base": "pull=0.9", "control": "pull=0.95"})
    committed = tmp_path / "docs" / "rows.csv.gz"
    write_rows(committed, read_rows(other / "black_point" / "rows.csv.gz"))
    content = collect(run_dir, run_dir / "black_point", committed)
    assert content.control is not None
    assert {row.checkpoint for row in content.control.rows} == {"control"}
    text = write(
        ReportConfig(str(run_dir), str(tmp_path / "page.html"), committed_rows=str(committed))
    )
    assert "blackpoint demo control=true" in text.read_text(encoding="utf-8")
    assert "<th>control</th>" in text.read_text(encoding="utf-8")


def test_a_run_without_a_study_has_its_losses(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes((run_dir / "metrics.csv").read_bytes())
    text = write(ReportConfig(str(tmp_path))).read_text(encoding="utf-8")
    assert Elements(text).counts["svg"] == 1
    assert "The numbers" not in text


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither metrics\.csv"):
        write(ReportConfig(str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_losses_that_are_not_there_are_not_drawn() -> None:
    assert plots.loss_curves({"train/images_per_s": [(1, 2.0)]}) is None
    assert plots.loss_curves({"train/loss": [(1, 0.5)]}) is not None
    assert plots.bin_label("validation/loss_log_snr_-inf_-2") == "log SNR -inf to -2"
    assert plots.bin_label("validation/loss_terminal") == "terminal"
