"""What a page says of its results: arms by their settings, single images, searches, two runs."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from blackpoint.sampling.report.page import Page
from blackpoint.sampling.report.results import Results, Value, read_results
from blackpoint.sampling.report.results_page import page_of, tables_of
from blackpoint.sampling.report.results_plots import luminance_parts
from blackpoint.sampling.report.results_tables import cells_table
from blackpoint.sampling.statistics.estimates import Estimate
from blackpoint.scripts.cli import main
from tests.test_report import Elements, write_run
from tests.test_results import made_up
from tests.test_results_reading import WINNER, write_search


def test_names_of_arms_are_explained_and_repeated_metrics_left_out(tmp_path: Path) -> None:
    results = made_up(tmp_path, seeds=1)
    for cell, rescale in zip(results.cells, (0.0, 0.7, 0.7), strict=False):
        cell.settings["evaluate.guidance_rescale"] = rescale
        cell.values["score, black"] = cell.values["score"]
    page = page_of(results, tables_of(results), {"evaluate.sampler": "ddim"}).html()
    assert "<dt>better, 8</dt><dd>evaluate.guidance_rescale=0.7</dd>" in page
    assert "<dt>worse</dt><dd>evaluate.guidance_rescale=0.0</dd>" in page
    assert not any("score, black" in head for head in cells_table(results).header)
    results.cells[0].values["score, black"] = Value(Estimate(0, 0, 0, 9), "higher")
    assert any("score, black" in head for head in cells_table(results).header)


def test_the_luminance_of_one_image_is_a_number(tmp_path: Path) -> None:
    results = made_up(tmp_path, seeds=1)
    results.cells[0].luminance = [0.125]
    figure, single = luminance_parts(results)
    assert "luminance 0.125" in Page("", [single]).markdown() and figure.content
    for cell in results.cells:
        cell.luminance = cell.luminance[:1]
    page = Page("", luminance_parts(Results("", results.cells))).html()
    assert "<svg" not in page and page.count("of one image") == 3


def test_a_search_shows_plain_images_above_winners_with_their_seeds(tmp_path: Path) -> None:
    """Those that no seed re-makes by that of their draws, in candidates.jsonl."""
    folder = tmp_path / "search"
    write_search(folder, WINNER)
    (folder / "images").mkdir()
    rows, candidates = [], []
    for index, seed in enumerate((77, None)):
        for name, level in (("", 200), (".baseline", 0)):
            Image.new("RGB", (8, 8), (level,) * 3).save(folder / f"images/{index:06d}{name}.png")
        plain = {"seed": 5 + index, "image": f"images/{index:06d}.baseline.png"}
        plain |= {"scores": {"dark": 0.5}, "held_out": {}}
        row = {
            "prompt_index": index,
            "image": f"images/{index:06d}.png",
            "seed": seed,
            "score": 0.9,
        }
        rows.append(WINNER | row | {"candidate": 3, "note": "", "baseline": plain})
        candidates.append({"prompt_index": index, "candidate": 3, "seed": 40 + index})
        candidates[-1] |= {"scores": {"dark": 0.9}}
    for name, lines in (("winners", rows), ("candidates", candidates)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "search.json").write_text(json.dumps({"algorithm": "zero_order"}))
    page = page_of(read_results(folder), [], {}).html()
    assert "seed 5 -&gt; 77" in page and "seed 6 -&gt; from 41" in page
    assert "seed None" not in page and "not chosen" not in page
    elements = Elements(page)
    assert elements.counts["img"] == 4
    assert page.index(">first seed<") < page.index(">winner<") and 'data-before="line"' in page


def test_two_runs_stand_side_by_side(pipeline: Path, tmp_path: Path) -> None:
    """The same checkpoint twice: the same pictures and luminance, and what differs of the runs."""
    for name in ("a", "b"):
        run_dir = write_run(tmp_path / name)
        shutil.copytree(pipeline, run_dir / "export")
        (run_dir / "checkpoints").mkdir()
    config = (tmp_path / "b" / "config.yaml").read_text()
    (tmp_path / "b" / "config.yaml").write_text(f"{config}optimizer: {{learning_rate: 0.5}}\n")
    page = tmp_path / "page.html"
    arguments = [f'compare=["{tmp_path}/a", "{tmp_path}/b"]', f"output={page}"]
    arguments += ['prompts=["a plain black image", "a cat"]', "images.num_steps=1"]
    assert main(["report", *arguments, "images.device=cpu"]) == 0
    text = page.read_text(encoding="utf-8")
    elements = Elements(text)
    assert not elements.open and elements.counts["img"] == 4 and elements.counts["svg"] == 1
    pictures = re.findall(r'<img src="([^"]+)"', text)
    assert pictures[:2] == pictures[2:] and pictures[0] != pictures[1]
    luminance = text.partition("Mean luminance")[2].partition("</table>")[0]
    row = re.findall(r"<b>(.*?)</b>", luminance)
    assert row[0] == "a plain black image" and row[1] == row[2] and row[3] == "0.00"
    differing = text.partition("Settings that differ")[2]
    assert "optimizer.learning_rate" in differing and "trainer.max_steps" not in differing


def test_a_comparison_is_of_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in ('["a"]', '["a", "a"]', '["a", "b", "c"]'):
        assert main(["report", f"compare={given}"]) == 2
        assert "must be two checkpoints, [A, B]" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "run_dir=..." in capsys.readouterr().err
