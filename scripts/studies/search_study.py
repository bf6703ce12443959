"""What searching the noise buys, at equal NFE: python -m blackpoint.scripts.studies.search_study
[key=value ...].

Searches 77 captions with the digit reader as the verifier, by every algorithm and at budgets of 1
to 32 images, and lets another reader judge the winners, of another architecture and trained on
other digits. Beside them: one image of as many NFE, in more denoising steps; and a search for
darkness, which is not what the prompts ask for.

Every search resumes or is skipped when it is done; arms=[random] does a part, for a second process.
The page is written from all searches that are there.
"""

import gzip
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blackpoint.data.files.plain import csv_text
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.journal import read_rows
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.scripts.config import load
from blackpoint.scripts.stand_alone import run_script
from blackpoint.scripts.studies.search_study_arms import (
    NUM_STEPS,
    Arm,
    hacked_arm,
    study_arms,
    study_prompts,
)
from blackpoint.scripts.studies.search_study_page import write_page

READER = {
    "kind": "classifier",
    "module": "blackpoint.scripts.miniature.digit_reader:DigitReader",
    "checkpoint": "assets/digit_reader",
}
JUDGE = {
    "kind": "classifier",
    "module": "blackpoint.scripts.miniature.digit_perceptron:DigitPerceptron",
    "checkpoint": "assets/digit_perceptron",
    "output": "top1",
}
LABELS = "[zero,one,two,three,four,five,six,seven,eight,nine]"
COLUMNS = ("arm", "multiple", "prompt_index", "candidate", "nfe", "score", "judged", "plain_judged")


@dataclass
class SearchStudyConfig:
    """What is searched, and where it goes."""

    checkpoint: str = "runs/demo"
    """The fine-tuned embedded model: what `make demo` leaves."""
    work: str = "runs/search_study"
    """Folder of the searches."""
    output: str = "docs/search_study"
    """Folder of the rows, the page and the figure."""
    arms: list[str] = field(default_factory=list)
    """Names of the arms to do; all if empty."""
    limit: int | None = None
    """Take only so many prompts."""
    seed: int = 0
    """Seed of every search."""
    batch_size: int = 64
    """Candidates at once."""


def study(config: SearchStudyConfig) -> None:
    """Runs what is missing and writes the page."""
    for arm in study_arms():
        if not config.arms or arm.name in config.arms:
            search(config, arm, study_prompts(), reader_settings())
    hacked, prompts = hacked_arm()
    if not config.arms or hacked.name in config.arms:
        dark = {"kind": "luminance", "target": 0.0}
        search(config, hacked, prompts, group("verifiers.darkness", dark))
    rows = [row for arm in [*study_arms(), hacked] for row in rows_of(config, arm)]
    output = Path(config.output)
    write_whole(output / "rows.csv.gz", gzip.compress(csv_text(rows).encode(), mtime=0))
    write_page(output, rows, records(config))


def reader_settings() -> list[str]:
    """Returns the searched verifier as command-line settings."""
    return [*group("verifiers.reader", READER), f"verifiers.reader.labels={LABELS}"]


def group(prefix: str, values: dict[str, Any]) -> list[str]:
    """Returns settings of one verifier."""
    return [f"{prefix}.{key}={value}" for key, value in values.items()]


def search(config: SearchStudyConfig, arm: Arm, prompts: Sequence[str], wanted: list[str]) -> None:
    """Runs one arm; continues what was stopped."""
    file = Path(config.work) / "prompts" / f"{len(prompts)}.txt"
    if not file.is_file():
        write_whole(file, "\n".join(prompts) + "\n")
    settings = {
        "checkpoint": config.checkpoint,
        "prompts": str(file),
        "output": str(folder_of(config, arm)),
        "budget_nfe": round(arm.multiple * NUM_STEPS),
        "num_steps": NUM_STEPS,
        "guidance_scale": 1.0,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "channels_last": True,
    } | arm.settings
    arguments = [f"{key}={value}" for key, value in settings.items()]
    arguments += [*wanted, *group("held_out.judge", JUDGE), f"held_out.judge.labels={LABELS}"]
    arguments += [] if config.limit is None else [f"limit={config.limit}"]
    print(f"* {arm.name} x {arm.multiple:g}", flush=True)
    _, lines = search_to_folder(load(SearchConfig, arguments))
    print("\n".join(lines), flush=True)


def folder_of(config: SearchStudyConfig, arm: Arm) -> Path:
    """Returns the folder of an arm's search."""
    return Path(config.work) / "searches" / arm.title


def rows_of(config: SearchStudyConfig, arm: Arm) -> list[dict[str, Any]]:
    """Returns a row for each prompt of an arm that is done; none of one that is not."""
    folder = folder_of(config, arm)
    if not (folder / "hacking.json").is_file():
        return []
    rows = []
    for line in (folder / "winners.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        plain = row["baseline"]
        values = (arm.name, arm.multiple, row["prompt_index"], row["candidate"], row["nfe"])
        judged = (row["held_out"]["judge"], plain["held_out"]["judge"] if plain else "")
        rows.append(dict(zip(COLUMNS, (*values, row["score"], *judged), strict=True)))
    return rows


def records(config: SearchStudyConfig) -> dict[str, Any]:
    """Returns what the searches have measured beside their winners."""
    found: dict[str, Any] = {"kendall": {}, "calibration_nfe": 0, "hacking": []}
    for arm in [*study_arms(), hacked_arm()[0]]:
        folder = folder_of(config, arm)
        if not (folder / "hacking.json").is_file():
            continue
        kendall = folder / "calibration" / "kendall.json"
        if kendall.is_file():
            found["kendall"] = json.loads(kendall.read_text(encoding="utf-8"))
            measured = read_rows(folder / "calibration" / "candidates.jsonl", repair=False)
            found["calibration_nfe"] = sum(row["nfe"] for row in measured)
        if arm == hacked_arm()[0]:
            found["hacking"] = json.loads((folder / "hacking.json").read_text(encoding="utf-8"))
    return found


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("search_study", lambda: study(load(SearchStudyConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
