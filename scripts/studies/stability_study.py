"""Are stable noises better noises? python -m blackpoint.scripts.studies.stability_study [key=value
...].

Runs configs/stability.yaml on the embedded base and its fine-tune, FID and KID against real digits
composed as the training data, and keeps the tables, plots and rows in docs/stability_study. It
stops and continues at any time; num_processes share the searches.
"""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from blackpoint.data.files.errors import RunFailed
from blackpoint.data.files.signals import stoppable
from blackpoint.sampling.evaluation.stability import StabilityStudyConfig
from blackpoint.sampling.evaluation.stability_page import RESULTS
from blackpoint.sampling.evaluation.stability_study import CHOSEN, PAIRS, PEAKS, SETS
from blackpoint.sampling.runtime.pictures import to_picture
from blackpoint.scripts.config import load
from blackpoint.scripts.miniature.digits import digit_samples
from blackpoint.scripts.stand_alone import run_script
from blackpoint.scripts.verb_process import verb_command

SETS_OF_DIGITS = (
    "sets.features.module=blackpoint.scripts.miniature.digit_reader:DigitReader",
    "sets.features.checkpoint=assets/digit_reader",
)
KEPT = (RESULTS, PAIRS, CHOSEN, SETS, PEAKS)


@dataclass
class StudyConfig:
    """What is run, and where its results are kept."""

    config: str = "configs/stability.yaml"
    """The study."""
    output: str = "docs/stability_study"
    """Folder of what is kept."""
    num_references: int = 1000
    """Real pictures that sets are compared with."""
    num_processes: int = 2
    """Processes that share the searches, of one thread each."""


def study(config: StudyConfig) -> None:
    """Runs what is missing and keeps the results."""
    settings = load(StabilityStudyConfig, [config.config])
    with stoppable():
        references = write_references(Path(f"{settings.output}_reference"), config.num_references)
        run_in_processes(config, [*SETS_OF_DIGITS, f"sets.reference={references}"])
    source, output = Path(settings.output), Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    for path in (*(source / name for name in KEPT), *source.glob("*.svg")):
        if path.is_file():
            shutil.copy2(path, output / path.name)


def write_references(folder: Path, count: int) -> Path:
    """Writes real held-out digits, composed by the rule of the training data, as PNG files."""
    if len(list(folder.glob("*.png"))) == count:
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    for old in (folder, partial):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    images, _, _ = digit_samples(count, seed=0, split="held_out")
    for number, image in enumerate(torch.from_numpy(images).permute(0, 3, 1, 2)):
        to_picture(image.float() / 255).save(partial / f"{number:05d}.png")
    partial.rename(folder)
    return folder


def run_in_processes(config: StudyConfig, settings: list[str]) -> None:
    """Runs the verb in processes that meet in its folder; raises RunFailed where one fails."""
    command = verb_command("evaluate", config.config, *settings)
    count = config.num_processes
    processes = [
        subprocess.Popen(
            command,
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
            | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(count)
    ]
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                break  # the others would wait for it
            time.sleep(0.5)
    finally:
        for process in processes:
            process.terminate()
        statuses = [process.wait() for process in processes]
    if any(statuses):
        raise RunFailed(f"the study ended with {statuses}; the same command continues it")


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("stability_study", lambda: study(load(StudyConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
