"""The ablation: python -m scripts.ablation makes its data, runs its sweep and keeps its tables.

configs/ablation.yaml says what is trained and evaluated. Every step is skipped when its result is
there, so the same command continues a night that was cut short.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from data.digits import Split, write_digit_folder
from data.pack import PackConfig, pack
from sampling.errors import RunFailed
from scripts.config import load
from scripts.keep_sweep import KeepConfig, keep
from scripts.stand_alone import run_script

YAML, RUN_DIR = "configs/ablation.yaml", Path("runs/ablation")
BASE, RESOLUTION = "assets/tiny_sd", 64
FIGURE = [
    "luminance, black",
    "luminance, white",
    "luminance spread over the references', open",
    "noise-invariance",
    "KID",
    "digits",
]


@dataclass
class AblationConfig:
    """How much data, and where the tables go."""

    num_train_images: int = 9000
    """Compositions of real digits that are trained on; two of each of 4,500 digits."""
    num_held_out_images: int = 2000
    """Compositions of held-out digits: the references."""
    seed: int = 0
    """Seed of the compositions."""
    num_processes: int = 2
    """Cells that are run at once."""
    output: str = "docs/ablation"
    """Folder of the tables."""


def ablate(config: AblationConfig) -> None:
    """Runs every step that is not done yet."""
    counts: dict[Split, int] = {
        "train": config.num_train_images,
        "held_out": config.num_held_out_images,
    }
    for split, count in counts.items():
        digits, shards = RUN_DIR / "digits" / split, RUN_DIR / "shards" / split
        if not (digits / "metadata.jsonl").is_file():  # it is written last
            write_digit_folder(digits, count, config.seed, split)
        if not shards.exists():
            shards.parent.mkdir(parents=True, exist_ok=True)
            pack(PackConfig(source=str(digits), output=str(shards)))
        latents = RUN_DIR / "latents" / split
        arguments = [f"source={shards}", f"checkpoint={BASE}", f"output={latents}"]
        arguments += [f"resolution={RESOLUTION}", "dtype=float32", "batch_size=64"]
        if not latents.exists():
            blackpoint("data", "encode", *arguments, "num_workers=0")
    blackpoint("sweep", YAML, f"num_processes={config.num_processes}")
    blackpoint("report", f"run_dir={RUN_DIR}")
    keep(KeepConfig(str(RUN_DIR), config.output, FIGURE, without=["luminance error, "]))


def blackpoint(*arguments: str) -> None:
    """Runs a verb in a process of its own; raises RunFailed where it fails."""
    command = [sys.executable, "-m", "scripts.cli", *arguments]
    status = subprocess.run(command, check=False).returncode
    if status:
        raise RunFailed(f"blackpoint {' '.join(arguments)} ended with {status}; run this again")


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("ablation", lambda: ablate(load(AblationConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
