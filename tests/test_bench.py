"""The benchmark times contestants in turn, compares them within a round, and says what it saw."""

import json
import math
import subprocess
import types
from pathlib import Path
from typing import Any

import pytest

from blackpoint.data.files.errors import UserError
from blackpoint.scripts.bench import draws as bench_draws
from blackpoint.scripts.bench import memory as bench_memory
from blackpoint.scripts.bench import reader as bench_reader
from blackpoint.scripts.bench.bench import PARTS, BenchConfig, main, table
from blackpoint.scripts.bench.startup import commands, required_keys
from blackpoint.scripts.bench.timing import Seconds, ratio_row, row, time_round
from blackpoint.scripts.cli import VERBS
from blackpoint.scripts.config import to_yaml
from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_run import make_tiny_shards, tiny_config
from tests.warm_verb import WarmVerb


def test_every_contestant_runs_once_a_round_and_each_comes_first_in_turn() -> None:
    order: list[str] = []
    parts = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds: Seconds = {}
    for number in range(3):
        time_round(parts, number, seconds)
    assert order == [*"abc", *"bca", *"cab"]
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 3)


def test_a_ratio_is_taken_within_each_round() -> None:
    """A machine that slows down tenfold between rounds leaves the ratio as it is."""
    found = ratio_row("g", "a / b", [1.0, 10.0, 100.0], [2.0, 20.0, 200.0], at_most=0.6)
    assert found.median == found.lowest == found.highest == 0.5
    assert found.interval is not None
    assert all(math.isclose(edge, 0.5) for edge in found.interval)
    assert found.n == 3 and found.met and found.wanted == "<= 0.6"


def test_interval_of_a_ratio_holds_its_geometric_mean() -> None:
    found = ratio_row("g", "a / b", [1.0, 4.0, 2.0, 8.0], [1.0] * 4)
    assert found.interval is not None
    assert found.interval[0] < (1 * 4 * 2 * 8) ** 0.25 < found.interval[1]


def test_bounds_that_are_not_kept_are_said_so() -> None:
    rows = [
        row("speed", "kept", "s", [1.0, 2.0], at_least=1.0),
        row("speed", "missed", "s", [1.0, 2.0], at_most=1.0),
        row("memory", "no bound", "MB", [1.0]),
    ]
    assert [found.met for found in rows] == [True, False, None]


@pytest.mark.parametrize("verb", VERBS)
def test_start_up_of_every_verb_is_timed_with_its_required_keys(verb: str) -> None:
    timed = commands([verb])
    assert {f"blackpoint {verb} --help", f"blackpoint {verb} --print-config"} < timed.keys()
    assert all("=" in argument for argument in required_keys(verb))


def warm_run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Is subprocess.run of one of our modules; what starts more processes starts as ever."""
    if '"trainer.devices": 2' in command[-1] or '"data.num_workers": 2' in command[-1]:
        return subprocess.run(command, **options)
    assert command[1] == "-m"
    process = WarmVerb(*command[3:], module=command[2])
    output, error = process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess(command, process.returncode, output, error)


@pytest.mark.slow
def test_quick_bench_writes_the_table_and_every_raw_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (bench_memory, bench_reader):
        monkeypatch.setattr(module, "subprocess", types.SimpleNamespace(run=warm_run))
    monkeypatch.setattr("blackpoint.train.encode.tasks.usable_cores", lambda: 1)
    base, shards = make_tiny_pipeline(tmp_path / "base"), make_tiny_shards(tmp_path / "images")
    config = tmp_path / "tiny.yaml"
    config.write_text(to_yaml(tiny_config(tmp_path / "unused", base, shards)))
    output = tmp_path / "out"
    main([f"config={config}", f"output={output}", "quick=true"])
    result = json.loads((output / "benchmarks.json").read_text())
    page = (output / "benchmarks.md").read_text()
    assert page == table(result)
    parts = result["parts"]
    assert list(parts) == list(PARTS)
    for name in ("training", "captions", "cached"):
        assert {name: len(values) for name, values in parts[name]["raw"].items()} == {
            "ours": 2,
            "bare": 2,
            "accelerate": 2,
            "accelerate_ema": 2,
        }
    rows = [row for part in parts.values() for row in part["rows"]]
    whats = {row["what"] for row in rows}
    assert {"ours / bare loop", "ours / accelerate loop, with EMA", "blackpoint --help"} <= whats
    measured = [
        row for row in rows if row["what"] != "added per step"
    ]  # a difference, of noise here
    assert all(row["median"] > 0 for row in measured)
    assert parts["startup"]["versions"]["diffusers"] in page
    assert BenchConfig(**parts["startup"]["settings"]).quick
    main([f"config={config}", f"output={output}", "quick=true", "parts=[reader]"])
    again = json.loads((output / "benchmarks.json").read_text())["parts"]
    assert again.pop("reader")["raw"] != parts.pop("reader")["raw"]
    assert again == parts
    with pytest.raises(UserError, match="is none of training, captions"):
        main([f"config={config}", f"output={output}", "parts=[all]"])


def test_draws_are_timed_in_the_step_and_from_a_reader(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_draws, "CASES", {"tiny": (2, 8)})
    monkeypatch.setattr("sys.argv", ["draws", "num_batches=2"])
    bench_draws.main()
    header, _, line = capsys.readouterr().out.strip().splitlines()[-3:]
    assert "| tiny: 2 x 4 x 8 x 8 |" in line
    assert line.count("|") == header.count("|") == 5
