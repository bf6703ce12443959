"""The report page: self-contained, with the pictures, plots, numbers and command that it
promises."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.prompts.brightness_target import prompt_slugs
from blackpoint.sampling.report import training_plots as run_plots
from blackpoint.sampling.report.page import WIDEST_PX, Gallery, embedded
from blackpoint.sampling.report.results import read_results
from blackpoint.sampling.report.results_page import page_of
from blackpoint.sampling.report.training_page import at_a_glance, previews, run_figures
from blackpoint.sampling.report.training_series import (
    NUM_STRETCHES,
    bin_label,
    bin_order,
    extremes,
    preview_luminance,
    smoothed,
)
from blackpoint.sampling.runtime.picture_grid import caption_grid, pictures_of_grid
from blackpoint.scripts.verbs import report_content
from blackpoint.scripts.verbs.report_config import ReportConfig
from blackpoint.scripts.verbs.report_content import write
from tests.test_results import made_up
from tests.test_results_reading import WINNER, write_search


def make_run(run_dir: Path) -> Path:
    """Writes a run directory with a loss, a sweep that is not done, and what an earlier one has."""
    (run_dir / "evaluation").mkdir(parents=True)
    (run_dir / "evaluation" / "sweep.json").write_text("{}")
    lines = ["step,name,value"]
    for step in range(10, 500, 10):
        lines.append(f"{step},train/loss,{1 / step}")
        if step % 100 == 0:
            lines += [f"{step},validation/{name},{2 / step}" for name in ("loss", "loss_terminal")]
    (run_dir / "metrics.csv").write_text("\n".join(lines) + "\n")
    environment = {
        "command": "a <b>",
        "versions": {"torch": "2.14"},
        "starts": [{"step": 0, "num_processes": 1}, {"step": 90, "num_processes": 8}],
    }
    (run_dir / "environment.json").write_text(json.dumps(environment))
    (run_dir / "timings.json").write_text('{"fine-tune": 61.4}')
    return run_dir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "some_run")


class Elements(HTMLParser):
    """Counts elements, checks that they nest, and collects what could be fetched."""

    VOID = ("meta", "img", "path", "br", "input")

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


def test_page_is_whole_and_refers_to_nothing_outside(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = made_up(tmp_path)
    monkeypatch.setattr(report_content, "read_results", lambda folder: results)
    page = write(ReportConfig(str(run_dir), str(tmp_path / "page.html")), "What <this> is.")
    text = page.read_text(encoding="utf-8")
    elements = Elements(text)
    assert not elements.open
    assert elements.counts["svg"] == 3  # luminance, loss, loss by SNR
    assert elements.counts["img"] == 3 * 8
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in elements.links)
    assert not re.search(r"(?:src|href)=\"https?:|@import|url\(http", text)
    for words in (
        "What &lt;this&gt; is.",
        "prompt &lt;9&gt;",
        "better, 16",
        "Every cell",
        "fine-tune",
        "61",
        "a &lt;b&gt;",
        "step 0, num processes 1; step 90, num processes 8",
    ):
        assert words in text


def test_an_evaluation_that_is_not_done_or_of_an_earlier_version_is_named(
    run_dir: Path, tmp_path: Path
) -> None:
    assert "another version" in write(ReportConfig(str(run_dir))).read_text(encoding="utf-8")
    (tmp_path / "black_point").mkdir()
    (tmp_path / "black_point" / "summary.md").write_text("numbers")
    text = write(ReportConfig(str(tmp_path))).read_text(encoding="utf-8")
    assert "blackpoint evaluate configs/black_point.yaml" in text


def write_run(run_dir: Path, num_rows: int = 40) -> Path:
    """Writes what a run under way leaves: every kind of series, two grids, a config, a torn row."""
    lines = ["step,name,value"]
    for step in range(10, 10 * num_rows + 1, 10):
        for name in ("loss", "loss_log_snr_0_2", "loss_terminal", "gradient_norm"):
            lines.append(f"{step},train/{name},{5 / step}")
        lines += [f"{step},train/learning_rate,1e-5", f"{step},train/images_per_s,{20 + step % 3}"]
        lines += [f"{step},train/data_wait_share,0.25", f"{step},memory/process_peak_gb,1.5"]
        if step % 100 == 0:
            lines += [f"{step},weights/{name},{step}" for name in ("norm", "norm_conv_in")]
            lines += [f"{step},weights/ema_distance,0.01", f"{step},validation/loss,{2 / step}"]
            lines += [f"{step},validation/loss_terminal,{3 / step}"]
            for slug in ("a_red_one_on_a_black_background", "a_cat"):
                lines += [f"{step},preview/luminance_{slug},0.3"]
                lines += [f"{step},preview/border_luminance_{slug},{10 / step}"]
            lines += [f"{step},preview/luminance_error,{10 / step}"]
    (run_dir / "previews").mkdir(parents=True)
    for step in (100, 200):
        Image.new("RGB", (20, 10)).save(run_dir / "previews" / f"step_{step:08d}.png")
    (run_dir / "metrics.csv").write_text("\n".join(lines) + "\n9000,train/lo")
    (run_dir / "config.yaml").write_text(
        "preview: {prompts: [a red one on a black background, a cat]}\n"
        "trainer: {max_steps: 900}\nseed: null\n"
    )
    return run_dir


def test_page_of_a_run_shows_every_series(tmp_path: Path) -> None:
    text = write(ReportConfig(str(write_run(tmp_path / "run")))).read_text(encoding="utf-8")
    elements = Elements(text)
    assert not elements.open
    assert elements.counts["svg"] == 7
    assert elements.counts["img"] == 2
    for words in (
        "400 of 900",
        "The black point as it trains",
        "Loss of the fine-tune",
        "Loss by signal-to-noise ratio",
        "Gradient and learning rate",
        "Weights and their average",
        "25.0% of the time",
        "1.50 GB",
        "0.1 \u2192 0.025",
        "step 200",
        "trainer.max_steps",
        "a red one on a black background; a cat",
        "not set",
    ):
        assert words in text
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in elements.links)


def test_previews_are_drawn_where_their_prompts_fix_luminance() -> None:
    slugs = ("a_red_one_on_a_black_background", "a_cat")
    metrics = {f"preview/luminance_{slug}": [(1, 0.5)] for slug in slugs}
    metrics |= {f"preview/border_luminance_{slug}": [(1, 0.1)] for slug in slugs}
    metrics["preview/luminance_error"] = [(1, 0.1)]
    expected = {"a red one on a black background": [(1, 0.1)], "A cat!": [(1, 0.5)]}
    assert preview_luminance(metrics, ["a red one on a black background", "A cat!"]) == expected
    assert list(preview_luminance(metrics, [])) == ["a red one on a black background", "a cat"]


def test_long_series_keep_their_spikes() -> None:
    series = [(step, 1.0) for step in range(5000)]
    series[1234] = (1234, 99.0)
    thinned = extremes(series)
    assert len(thinned) <= 2 * NUM_STRETCHES and (1234, 99.0) in thinned
    assert thinned == sorted(thinned)
    assert extremes(series[:50]) == series[:50]


def test_running_mean_passes_over_what_is_not_finite() -> None:
    assert smoothed([2.0, float("nan"), 2.0, float("inf")]) == pytest.approx([2.0] * 4)


def test_wide_grids_are_embedded_smaller(tmp_path: Path) -> None:
    Image.new("RGB", (WIDEST_PX + 1, 100)).save(tmp_path / "step_00000001.png")
    assert embedded(tmp_path / "step_00000001.png").startswith("data:image/jpeg;base64,")
    for step in range(2, 30):
        Image.new("RGB", (20, 10)).save(tmp_path / f"step_{step:08d}.png")
    labels = [figure.note for figure in previews(tmp_path, ["a", "b"], 1)]
    assert labels == ["step 1", "step 7", "step 12", "step 18", "step 23", "step 29"]


@pytest.mark.parametrize("side", [8, 64, 200])
def test_previews_are_lines_of_their_steps(tmp_path: Path, side: int) -> None:
    prompts = ["a red three on a black background, with a caption of several lines", "a cat"]
    for step in (0, 10, 20):
        level = step * 10
        rows = [
            [Image.new("RGB", (side, side), (level, n, row)) for n in (40, 90)] for row in (0, 200)
        ]
        grid = caption_grid(prompts, rows, [f"step {step}, seed {seed}" for seed in (0, 1)])
        grid.save(tmp_path / f"step_{step:08d}.png")
        cut = pictures_of_grid(grid, 2, 2)
        assert cut is not None
        colors = [[picture.getcolors() for picture in row] for row in cut]
        area = cut[0][0].width ** 2
        assert colors == [[[(area, (level, n, row))] for n in (40, 90)] for row in (0, 200)]
        assert pictures_of_grid(grid, 3, 2) is None
        assert pictures_of_grid(grid, 2, 3) is None
    [gallery] = previews(tmp_path, prompts, 2)
    assert isinstance(gallery, Gallery) and gallery.captions == ["step 0", "step 10", "step 20"]
    assert [name for name, _ in gallery.content][2:] == ["a cat, seed 0", "a cat, seed 1"]
    assert all(len(pictures) == 3 for _, pictures in gallery.content)


def test_a_caption_that_does_not_fit_says_so() -> None:
    picture = Image.new("RGB", (128, 128))
    whole, cut = (caption_grid(["word " * n], [[picture]], ["t"]) for n in (30, 300))
    box = (0, 0, 200, whole.height)
    assert whole.crop(box).tobytes() != cut.crop(box).tobytes()
    assert (
        caption_grid(["word " * 400], [[picture]], ["t"]).crop(box).tobytes()
        == cut.crop(box).tobytes()
    )


def test_the_page_of_a_run_under_way_is_written_and_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until its last step: then it stays."""
    run_dir = write_run(tmp_path / "run")
    pages, page = [], run_dir / "report.html"

    def goes_on(seconds: float) -> None:
        pages.append(page.read_text(encoding="utf-8"))
        rows = (run_dir / "metrics.csv").read_text().rpartition("\n")[0]
        (run_dir / "metrics.csv").write_text(f"{rows}\n900,train/loss,0.1\n")

    monkeypatch.setattr(report_content, "sleep", goes_on)
    write(ReportConfig(str(run_dir), every_s=30))
    refreshed = '<meta http-equiv="refresh" content="30">'
    assert len(pages) == 1 and refreshed in pages[0]
    assert "900 of 900" in page.read_text() and "refresh" not in page.read_text()
    write(ReportConfig(str(write_run(tmp_path / "other"))))
    assert "http-equiv" not in (tmp_path / "other" / "report.html").read_text()


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,name,value\n")
    assert "holds no rows yet" in write(ReportConfig(str(tmp_path))).read_text(encoding="utf-8")
    assert at_a_glance({}) == {}


def test_a_run_without_a_study_has_its_losses(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes((run_dir / "metrics.csv").read_bytes())
    text = write(ReportConfig(str(tmp_path))).read_text(encoding="utf-8")
    assert Elements(text).counts["svg"] == 2
    assert "Every cell" not in text


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no metrics\.csv"):
        write(ReportConfig(str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_what_is_not_there_is_not_drawn() -> None:
    speed = {"train/images_per_s": [(1, 2.0)]}
    assert run_plots.loss_curves(speed) is None
    assert run_plots.loss_by_snr(speed) is None
    assert run_plots.black_point(speed) is None
    assert run_plots.weight_curves(speed) is None
    assert run_plots.optimizer_curves(speed) is None
    assert run_plots.memory_curves(speed) is None
    assert run_plots.speed_curves(speed) is not None
    assert run_plots.loss_curves({"train/loss": [(1, 0.5)]}) is not None


def test_a_page_says_of_what_its_losses_are_where_the_network_predicts_no_v() -> None:
    rows = {"train/loss": [(1, 0.2)], "validation/loss": [(1, 0.9)]}
    assert at_a_glance(rows)["validation loss"] == "0.9"
    assert not any("own output" in part.note for part in run_figures(rows))
    rows["validation/epsilon_loss"] = [(1, 0.3)]
    assert at_a_glance(rows)["validation loss, of v"] == "0.9"
    rows = {name: [*series, (2, 0.1)] for name, series in rows.items()}
    assert "Both are of the network's own output" in run_figures(rows)[0].note


def test_metrics_of_one_row_are_numbers() -> None:
    rows = {"train/loss": [(1, 0.2)], "train/learning_rate": [(1, 1e-5), (2, 1e-5)]}
    figure, single = run_figures(rows)
    assert figure.title == "Gradient and learning rate"
    assert single.content == {"train/loss": "0.2 at step 1"}


def test_what_a_run_is_of_comes_first(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    config = "checkpoint: some/base\ndata: {shards: some/shards, resolution: 64}\n"
    (run_dir / "config.yaml").write_text(config)
    environment = {"command": "blackpoint train", "starts": [{"images_per_step": 16}]}
    (run_dir / "environment.json").write_text(json.dumps(environment))
    text = write(ReportConfig(str(run_dir))).read_text(encoding="utf-8")
    words = ("some/base", "some/shards; 64 px; 16 images per step", "blackpoint train")
    places = [text.index(word) for word in (*words, "Previews", "optimizer steps", "<svg")]
    assert places == sorted(places)


def test_any_prompt_can_be_drawn() -> None:
    prompts = [f"{number} times $x^2 \\frac$ _ on a white background" for number in range(7)]
    metrics = {f"preview/luminance_{slug}": [(1, 0.5)] for slug in prompt_slugs(prompts)}
    metrics |= {f"preview/border_luminance_{slug}": [(1, 0.9)] for slug in prompt_slugs(prompts)}
    assert run_plots.black_point(metrics, prompts) is not None


def test_ranges_of_snr_are_named_and_ordered_by_noise() -> None:
    assert bin_label("validation/loss_log_snr_-inf_-2") == "log SNR -inf to -2"
    assert bin_label("validation/loss_terminal") == "terminal"
    names = ["loss_log_snr_6_inf", "loss_log_snr_-2_0", "loss_log_snr_-inf_-6", "loss_terminal"]
    assert sorted(reversed(names), key=bin_order) == names


def test_an_alarm_that_could_not_tell_is_not_called_silent(tmp_path: Path) -> None:
    for notes, said in (
        ([], "No search has raised the hacking alarm."),
        (["dark: 1 prompt is too few"], "The hacking alarm could not tell: dark: 1 prompt is too"),
    ):
        folder = tmp_path / str(len(notes))
        write_search(folder, WINNER)
        (folder / "hacking.json").write_text(json.dumps([{"findings": [], "notes": notes}]))
        (folder / "search.json").write_text(json.dumps({"algorithm": "paths"}))
        assert said in page_of(read_results(folder), [], {}).html()
