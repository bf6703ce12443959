"""`blackpoint search` in several processes, and killed: the same winners, nothing paid twice."""

import contextlib
import json
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.runtime.sharing import (
    FolderInUse,
    share_of,
    stopped,
    telling_stop,
    wait_until,
)
from blackpoint.sampling.runtime.tasks import Task
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.sampling.verifiers.load import VerifierConfig
from tests.waiting import names_in, wait_for
from tests.warm_verb import WarmVerb

PROMPTS = ["a red photo of snow", "a blue night", "a white wall", "a gray sea", "a black cat"]


def arguments(pipeline: Path, output: Path, *more: str) -> list[str]:
    return [
        f"checkpoint={pipeline}",
        f"prompts={json.dumps(PROMPTS)}",
        f"output={output}",
        "budget_nfe=40",
        "num_steps=4",
        "guidance_scale=1",
        "verifiers.dark.kind=luminance",
        "verifiers.dark.target=0",
        "held_out.border.kind=luminance",
        "held_out.border.target=0",
        "held_out.border.where=border",
        *more,
    ]


def start(given: list[str], **environment: str) -> WarmVerb:
    """Starts the command as a user or a launcher would."""
    return WarmVerb("search", *given, environment=environment)


def start_all(given: list[str], count: int) -> list[WarmVerb]:
    return [
        start(given, RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
        for rank in range(count)
    ]


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def assert_same_search(folder: Path, whole: Path) -> None:
    """Compares winners, pictures and costs; seconds differ."""
    keys = ("prompt_index", "prompt", "candidate", "seed", "score", "nfe", "image", "rejected")
    found, expected = (rows(each, "winners.jsonl") for each in (folder, whole))
    assert [[row[key] for key in keys] for row in found] == [
        [row[key] for key in keys] for row in sorted(expected, key=lambda row: row["prompt_index"])
    ]
    for row in found:
        one, two = (np.asarray(Image.open(each / row["image"])) for each in (folder, whole))
        assert np.abs(one.astype(int) - two).max() <= 1  # 1e-4 can round to another level
    paid = Counter((r["prompt_index"], r["candidate"]) for r in rows(folder, "candidates.jsonl"))
    assert set(paid.values()) == {1}
    assert set(paid) == {
        (row["prompt_index"], row["candidate"]) for row in rows(whole, "candidates.jsonl")
    }
    one, two = (json.loads((each / "ledger.json").read_text()) for each in (folder, whole))
    for name in ("nfe", "decoded_images", "verifier_calls", "conditional_rows"):
        assert one[name] == two[name] and one["beside"][name] == two["beside"][name]
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in whole.iterdir()}
    assert not names & {"parts", "states", "bests"}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["zero_order", "halving", "draft"])
def test_three_processes_find_what_one_finds(
    algorithm: str, pipeline: Path, tmp_path: Path
) -> None:
    few = [f"{name}.calibration_prompts=2" for name in ("halving", "draft")]
    given = [f"algorithm={algorithm}", *few, "batch_size=3"]
    one = start(arguments(pipeline, tmp_path / "one", *given))
    several = start_all(arguments(pipeline, tmp_path / "several", *given), 3)
    for process in (one, *several):
        _, error = process.communicate()
        assert process.returncode == 0, error
    assert_same_search(tmp_path / "several", tmp_path / "one")


@pytest.mark.slow
def test_a_search_that_is_killed_ten_times_ends_as_if_it_had_not_been(
    pipeline: Path, tmp_path: Path
) -> None:
    """The last starts have another number of processes."""
    given = ["algorithm=paths", "paths.num_expansions=2", "budget_nfe=120", "batch_size=2"]
    whole, killed = (arguments(pipeline, tmp_path / name, *given) for name in ("whole", "killed"))
    _, error = (process := start(whole)).communicate()
    assert process.returncode == 0, error
    rng, folder = random.Random(0), tmp_path / "killed"
    for _ in range(10):
        before = size(folder)
        processes = start_all(killed, 2)
        while size(folder) == before and any(p.poll() is None for p in processes):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        for process in processes:
            process.kill()
            process.communicate()
    for process in start_all(killed, 1):
        _, error = process.communicate()
        assert process.returncode == 0, error
    assert_same_search(folder, tmp_path / "whole")


def size(folder: Path) -> int:
    """Returns the bytes of all rows so far; processes move their files meanwhile."""
    parts = folder / "parts"
    num_bytes = 0
    for path in (folder, *(parts / name for name in names_in(parts))):
        with contextlib.suppress(FileNotFoundError):
            num_bytes += (path / "candidates.jsonl").stat().st_size
    return num_bytes


@pytest.mark.slow
def test_a_schedulers_signal_stops_a_search_that_can_go_on(pipeline: Path, tmp_path: Path) -> None:
    given = arguments(pipeline, tmp_path / "out", "budget_nfe=4000", "batch_size=1")
    process = start(given)
    rows_file = tmp_path / "out" / "candidates.jsonl"
    wait_for(rows_file.is_file, lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 75, error
    assert "stopped by SIGTERM; the same command continues" in error


def test_prompts_are_shared_out_without_rest() -> None:
    shares = [share_of(range(11), Task(rank, 3)) for rank in range(3)]
    assert sorted(sum(shares, [])) == list(range(11))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_first_process_hears_that_another_stopped(tmp_path: Path) -> None:
    with pytest.raises(FolderInUse), telling_stop(tmp_path, Task(1, 2)):
        raise FolderInUse("another process does the work of this one")
    assert not stopped(tmp_path, since=0.0)
    with pytest.raises(OSError), telling_stop(tmp_path, Task(1, 2)):
        raise OSError("the disk is full")
    with pytest.raises(RunFailed, match="process 1 stopped: the disk is full"):
        wait_until(lambda: False, tmp_path, since=0.0)
    wait_until(lambda: True, tmp_path, since=0.0)
    with pytest.raises(RunFailed, match="stopped"):
        wait_until(lambda: False, tmp_path, since=time.time() - 60)
    assert not stopped(tmp_path, since=time.time() + 60)  # of an earlier start
    with telling_stop(tmp_path, Task(1, 2)):
        pass
    assert not stopped(tmp_path, since=0.0)


def test_a_process_that_cannot_begin_leaves_the_folder_as_it_was(
    pipeline: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    settings: dict[str, Any] = {
        "checkpoint": str(pipeline),
        "prompts": PROMPTS,
        "output": str(output),
        "budget_nfe": 8,
        "num_steps": 4,
        "guidance_scale": 1.0,
    }
    wrong = VerifierConfig(kind="clip_score", checkpoint=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="nothing"):
        search_to_folder(SearchConfig(verifiers={"clip": wrong}, **settings), Task(1, 2))
    assert not list(output.iterdir())
    assert "process 1" in stopped(output, since=0.0)
    dark = VerifierConfig(kind="luminance", target=0.0)
    search_to_folder(SearchConfig(verifiers={"dark": dark}, **settings))
    assert len(rows(output, "winners.jsonl")) == len(PROMPTS)


def test_a_verifier_of_sets_wants_one_process(pipeline: Path, tmp_path: Path) -> None:
    verifier = VerifierConfig(kind="oracle", checkpoint="features", metric="is")
    config = SearchConfig(
        checkpoint=str(pipeline),
        prompts=PROMPTS,
        output=str(tmp_path / "out"),
        budget_nfe=8,
        verifiers={"set": verifier},
    )
    with pytest.raises(UserError, match="verifiers.set: kind=oracle .* start one process, not 2"):
        search_to_folder(config, Task(0, 2))


def test_two_commands_do_not_write_into_one_folder(pipeline: Path, tmp_path: Path) -> None:
    from blackpoint.sampling.search.journal import Journal

    journal = Journal(tmp_path)
    with pytest.raises(UserError, match="another process is searching there"):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()
