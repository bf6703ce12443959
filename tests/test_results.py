"""The report of evaluations, searches and sweeps: its tables, and the page in a real browser."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blackpoint.sampling.report.results import Cell, Picture, Results, Value
from blackpoint.sampling.report.results_page import page_of, tables_of, write_results
from blackpoint.sampling.report.results_plots import scaling_curves, series_of
from blackpoint.sampling.report.results_tables import (
    cells_table,
    metrics_table,
    seeds_table,
    win_matrix,
)
from blackpoint.sampling.statistics.estimates import Estimate
from blackpoint.sampling.statistics.table import Place, Table
from blackpoint.scripts.cli import main
from tests import browser

NUM_PROMPTS = 30


def made_up(tmp_path: Path, seeds: int = 3) -> Results:
    """Two arms at two numbers of steps: `better` has .2 more, `worse` an alarm; one cell failed."""
    rng = np.random.default_rng(0)
    cells = []
    for arm, gain in (("worse", 0.0), ("better, 8", 0.2), ("better, 16", 0.3)):
        for seed in range(seeds):
            scores = {
                (n, f"prompt <{n}>", 0): float(gain + 0.05 * rng.normal())
                for n in range(NUM_PROMPTS)
            }
            mean = float(np.mean(list(scores.values())))
            path = tmp_path / f"{arm}-{seed}.png"
            Image.new("RGB", (16, 16), (60 * seed, 10, 10)).save(path)
            cells.append(
                Cell(
                    f"{arm} {seed}",
                    arm,
                    {"evaluate.seed": seed},
                    {"evaluate.seed": seed, "evaluate.sampler": "ddim"},
                    values={
                        "score": Value(
                            Estimate(mean, mean - 0.02, mean + 0.02, NUM_PROMPTS), "higher"
                        ),
                        "FID": Value(Estimate(9 - gain, math.nan, math.nan, 30), "lower"),
                    },
                    paired={"score": scores},
                    pictures={(n, f"prompt <{n}>", 0): Picture(seed, path) for n in range(10)},
                    luminance=list(rng.random(20)),
                    alarms=["score rises, judge falls"] if arm == "worse" and seed == 0 else [],
                    nfe=16.0 if "16" in arm else 8.0,
                    seconds=0.5,
                    peak_gb=1.0,
                )
            )
    cells.append(Cell("lost", "lost", {"evaluate.seed": 0}, {}, "failed", "killed by SIGKILL"))
    return Results("made up", cells, "worse", list(rng.random(50)))


def column(table: Table, heading: str) -> list[Place]:
    place = table.header.index(heading)
    return [row[place] for row in table.places()]


def texts(table: Table, heading: str) -> list[str]:
    return [each.text for each in column(table, heading)]


def estimates(table: Table, heading: str) -> list[Any]:
    key = list(table.columns)[table.header.index(heading)]
    return [row[key].value if row.get(key) else None for row in table.rows]


def test_settings_over_seeds_are_compared_with_the_baseline_pair_by_pair(tmp_path: Path) -> None:
    results = made_up(tmp_path)
    table = seeds_table(results)
    assert table is not None
    assert texts(table, "setting") == ["worse", "better, 8", "better, 16"]
    assert texts(table, "seeds") == ["3", "3", "3"]
    shown = column(table, "score: minus worse")
    assert shown[0].text == "" and shown[1].is_bold
    change = estimates(table, "score: minus worse")[1]
    by_seed = [
        results.cells[3 + n].values["score"].estimate.value
        - results.cells[n].values["score"].estimate.value
        for n in range(3)
    ]
    assert change.value == pytest.approx(np.mean(by_seed)) and change.n == 3
    assert [each.is_bold for each in column(table, "score")] == [False, False, True]
    assert seeds_table(made_up(tmp_path, seeds=1)) is None


def test_every_cell_is_there_and_the_best_is_marked(tmp_path: Path) -> None:
    table = cells_table(made_up(tmp_path))
    assert len(table.rows) == 10 and texts(table, "state")[-1] == "failed"
    assert [each.is_bold for each in column(table, "score")].count(True) == 1
    title = "FID at n = 30; interval at this n"
    values = [each.value for each in estimates(table, title)[:-1]]
    best = values.index(min(values))
    assert column(table, title)[best].is_bold and texts(table, "arm")[best] == "better, 16"


def test_fid_says_at_which_n_it_is_wherever_it_is_shown(tmp_path: Path) -> None:
    """Also of evaluations made before: the title is made where it is shown."""
    results, title = made_up(tmp_path), "FID at n = 30; interval at this n"
    settings = seeds_table(results)
    assert settings is not None and f"{title}: minus worse" in settings.header
    assert texts(metrics_table(results.cells[0]), "metric")[1] == title
    for table in (settings, cells_table(results)):
        assert title in table.csv() and title in table.markdown()
    assert [name for name, _ in scaling_curves(results, ["FID"])] == [title]
    for cell in results.cells[:3]:
        cell.values["FID"] = Value(Estimate(8, 7, 9, 50), "lower")
    assert "FID at n = 30 to 50; interval at each n" in cells_table(results).header


def test_the_matrix_says_who_beats_whom_with_a_correction(tmp_path: Path) -> None:
    table = win_matrix(made_up(tmp_path), "score")
    assert table is not None and table.header == ["", "worse", "better, 8", "better, 16"]
    ahead, behind = table.rows[1]["worse"], table.rows[0]["better, 8"]
    assert ahead.value == f"{NUM_PROMPTS} : 0" and ahead.is_bold
    assert behind.value == f"0 : {NUM_PROMPTS}" and not behind.is_bold
    assert win_matrix(made_up(tmp_path), "FID") is None


def test_the_matrix_has_win_rates_of_what_is_no_tie_with_wilsons_interval() -> None:
    """57 of 100, and 5 ties: Wilson's interval of 57 / 100 is [47.2, 66.3] (Brown et al. 2001)."""

    def cell(name: str, wins: int) -> Cell:
        scores = {(n, "p", 0): 1.0 if n < wins else -float(n < 100) for n in range(105)}
        return Cell(name, name, values={"HPSv2": Value(Estimate(0, 0, 0, 105), "higher")},
                    paired={"HPSv2": scores})  # fmt: skip

    plain = {key: 0.0 for key in cell("", 0).paired["HPSv2"]}
    baseline = replace(cell("one image", 0), paired={"HPSv2": plain})
    table = win_matrix(Results("qi", [baseline, cell("noise selection", 57)]), "HPSv2")
    assert table is not None
    assert table.rows[1]["one image"].value == "57 : 43"
    assert table.rows[1]["one image"].detail == "57.0% [47.2, 66.3], p 0.19"
    assert table.rows[0]["noise selection"].detail == "43.0% [33.7, 52.8], p 0.19"
    same = win_matrix(Results("qi", [baseline, replace(baseline, name="b", arm="b")]), "HPSv2")
    assert same is not None and same.rows[1]["one image"].detail == "p 1"


def test_tables_are_written_with_their_intervals(tmp_path: Path) -> None:
    table = cells_table(made_up(tmp_path))
    rows = list(csv.DictReader(io.StringIO(table.csv())))
    assert len(rows) == 10 and float(rows[0]["score: low"]) < float(rows[0]["score"])
    assert rows[0]["score: n"] == "30" and rows[-1]["score"] == ""
    lines = table.markdown().splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_curves_join_an_arm_at_several_costs(tmp_path: Path) -> None:
    results = made_up(tmp_path)
    assert {series_of(cell) for cell in results.cells} == {"worse", "better", "lost"}
    [(name, svg), *_] = scaling_curves(results, ["score"])
    assert name == "score" and svg.startswith("<svg") and svg.count("<path") > 10
    assert scaling_curves(Results("one", results.cells[:3]), ["score"]) == []


def test_the_page_refers_to_nothing_outside_and_escapes_what_it_shows(tmp_path: Path) -> None:
    results = made_up(tmp_path)
    page = page_of(results, tables_of(results), {"evaluate.sampler": "ddim"}).html()
    assert "prompt &lt;0&gt;" in page and "killed by SIGKILL" in page
    assert "score rises, judge falls" in page
    for word in ("http://", "https://", 'src="/', "url("):
        outside = page.replace("http://www.w3.org", "").replace("https://www.w3.org", "")
        outside = outside.replace("http://purl.org", "").replace("https://matplotlib.org", "")
        outside = outside.replace("http://creativecommons.org", "").replace("url(#", "")
        assert word not in outside, word


COMPARED = [False, "uncover worse:", "inset(0px 75% 0px 0px)"]
PROBE = """
<script>
window.errors = [];
window.addEventListener("error", (event) => errors.push(event.message || "resource"), true);
</script>
"""
CLICKS = """
<script>
window.addEventListener("load", async () => {
  for (const each of document.images) each.loading = "eager";
  await new Promise((done) => setTimeout(done, 1000));
  const table = document.querySelector("#cells");
  const heads = [...table.tHead.querySelectorAll("th")];
  const column = heads.findIndex((head) => head.textContent.startsWith("score"));
  const rows = () => [...table.tBodies[0].rows];
  const values = () => rows().map((row) => row.cells[column].dataset.value || "");
  heads[column].click();
  const up = values();
  heads[column].click();
  const down = values();
  const controls = table.closest("section").querySelector(".controls");
  const choice = controls.querySelector("select");
  choice.value = "worse";
  choice.dispatchEvent(new Event("change"));
  const chosen = controls.querySelector("output").textContent;
  choice.value = "";
  const search = controls.querySelector("input");
  search.value = "sigkill";
  search.dispatchEvent(new Event("input"));
  const searched = controls.querySelector("output").textContent;
  document.querySelector(".gallery img").click();
  const zoom = document.getElementById("zoom");
  const zoomed = zoom.open && zoom.querySelector("img").naturalWidth > 0;
  const caption = () => zoom.querySelector("p").textContent;
  const captions = [caption()];
  const before = zoom.querySelector(".before");
  const press = (key) => zoom.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const alone = before.hidden;
  for (const key of ["ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft"]) {
    press(key);
    captions.push(caption());
  }
  const slider = zoom.querySelector("input");
  slider.value = 25;
  slider.dispatchEvent(new Event("input"));
  const uncovered = zoom.querySelector("span").textContent.slice(0, 14);
  const compared = [before.hidden, uncovered, before.style.clipPath];
  zoom.click();
  const broken = [...document.images].filter((i) => i.src && i.naturalWidth === 0).length;
  const answer = { up, down, chosen, searched, zoomed, captions, alone, compared, broken,
    closed: !zoom.open,
    pictures: document.querySelectorAll(".gallery img").length, errors,
    plots: document.querySelectorAll("svg").length };
  document.body.innerHTML = "";
  const out = document.createElement("pre");
  out.id = "answer";
  out.textContent = JSON.stringify(answer);
  document.body.append(out);
});
</script>
"""


@browser.needs_chromium
def test_a_browser_sorts_filters_and_enlarges_without_errors(tmp_path: Path) -> None:
    results = made_up(tmp_path)
    [path, *_] = write_results(tmp_path / "report.html", results, {})
    text = path.read_text(encoding="utf-8")
    probed = text.replace("<head>", "<head>" + PROBE).replace("</body>", CLICKS + "</body>")
    page = tmp_path / "probed.html"
    page.write_text(probed, encoding="utf-8")
    done = browser.loaded(page, tmp_path / "profile")
    assert "CONSOLE" not in done.stderr, done.stderr
    answer = json.loads(
        done.stdout.partition('<pre id="answer">')[2]
        .partition("</pre>")[0]
        .replace("&lt;", "<")
        .replace("&gt;", ">")
    )
    numbers = [float(value) for value in answer["up"] if value]
    assert len(numbers) == 9 and numbers == sorted(numbers)
    assert [float(v) for v in answer["down"] if v] == numbers[::-1]
    assert answer["up"][-1] == answer["down"][-1] == ""  # what has no number comes last
    assert answer["chosen"] == "3 of 10" and answer["searched"] == "1 of 10"
    assert answer["zoomed"] and answer["closed"]
    places = [(text.partition(":")[0], text.partition("<")[2][0]) for text in answer["captions"]]
    walk = [("worse", 0), ("worse", 1), ("better, 8", 1), ("better, 16", 1), ("better, 16", 0)]
    assert places == [(arm, str(prompt)) for arm, prompt in [*walk, walk[-1]]]  # the last: no more
    assert answer["alone"] and answer["compared"] == COMPARED
    assert answer["broken"] == 0 and answer["pictures"] == 3 * 8 and answer["plots"] >= 2
    assert answer["errors"] == []


def cell_of(arm: str, value: float, seeds: dict[str, int], prompt: str = "a cat") -> Cell:
    estimate = Value(Estimate(value, math.nan, math.nan, 1), "higher")
    return Cell(
        f"{arm} {seeds}",
        arm,
        dict(seeds),
        values={"score": estimate},
        paired={"score": {(0, prompt, 0): value}},
        nfe=4.0,
    )


def test_seeds_of_evaluation_within_a_training_are_no_repetitions() -> None:
    cells = [
        cell_of(arm, gain + train + 0.1 * seed, {"train.seed": train, "evaluate.seed": seed})
        for arm, gain in (("base", 0.0), ("fixed", 1.0))
        for train in range(2)
        for seed in range(3)
    ]
    table = seeds_table(Results("crossed", cells))
    assert table is not None and texts(table, "seeds") == ["2", "2"]
    first, second = estimates(table, "score")
    assert (first.n, second.n) == (2, 2) and first.value == pytest.approx(0.6)
    change = estimates(table, "score: minus base")[1]
    assert change.value == pytest.approx(1.0) and change.n == 2
    once = [cell for cell in cells if cell.varied["train.seed"] == 0]
    alone = seeds_table(Results("one training", once))
    assert alone is not None and texts(alone, "seeds") == ["3", "3"]


def test_cells_of_other_prompts_are_not_paired() -> None:
    cells = [cell_of("one", 1.0, {}), cell_of("two", 2.0, {}, "a dog"), cell_of("three", 3.0, {})]
    table = win_matrix(Results("prompts", cells), "score")
    assert table is not None
    assert [[each.text for each in row[1:]] for row in table.places()] == [
        ["", "", "0 : 1"],
        ["", "", ""],
        ["1 : 0", "", ""],
    ]


def test_the_tables_and_the_page_go_to_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    sent: dict[str, Any] = {}

    class Run:
        summary: dict[str, float] = {}

        def log(self, row: dict[str, Any]) -> None:
            sent.update(row)

        def finish(self) -> None:
            sent["finished"] = True

    monkeypatch.setattr("blackpoint.scripts.verbs.report_results.start_run", lambda *_: Run())
    monkeypatch.setattr(
        "blackpoint.scripts.verbs.report_results.read_results", lambda _: made_up(tmp_path)
    )
    (tmp_path / "sweep.json").write_text("{}")
    assert main(["report", f"run_dir={tmp_path}", "wandb.enabled=true"]) == 0
    assert {"settings", "cells", "wins_score", "report", "finished"} <= set(sent)
    assert len(sent["cells"].data) == 10
    assert Run.summary["better, 8 0/score"] == pytest.approx(0.2, abs=0.05)
    assert "report.html" in capsys.readouterr().out
