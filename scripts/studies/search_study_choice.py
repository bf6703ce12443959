"""Which sampling leaves something to search for: python -m
blackpoint.scripts.studies.search_study_choice.

Samples the study's prompts once at every number of steps and guidance scale, and writes the share
of digits that both readers read to docs/search_study/choice.csv.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from blackpoint.data.files.plain import csv_text
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.statistics.estimates import proportion
from blackpoint.scripts.config import load
from blackpoint.scripts.miniature.digit_perceptron import DigitPerceptron
from blackpoint.scripts.miniature.digit_reader import DigitReader
from blackpoint.scripts.miniature.digits import digit_of
from blackpoint.scripts.stand_alone import run_script
from blackpoint.scripts.studies.search_study_arms import study_prompts


@dataclass
class ChoiceConfig:
    """What is tried."""

    checkpoint: str = "runs/demo"
    """The fine-tuned embedded model."""
    output: str = "docs/search_study"
    """Folder of choice.csv."""
    num_steps: list[int] = field(default_factory=lambda: [4, 5, 6, 8, 10, 25])
    """Sampling steps."""
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 2.0, 3.0])
    """Guidance scales."""


def choose(config: ChoiceConfig) -> None:
    """Samples, reads and writes a row for every setting."""
    model = DiffusionModel.load(config.checkpoint)
    model.unet.to(memory_format=torch.channels_last)
    readers = {
        "read_first": DigitReader.load("assets/digit_reader"),
        "read_held_out": DigitPerceptron.load("assets/digit_perceptron"),
    }
    prompts = study_prompts()
    digits = torch.tensor([digit_of(prompt) for prompt in prompts])
    rows = []
    for scale in config.guidance_scales:
        for num_steps in config.num_steps:
            images = model.sample(
                prompts,
                seeds=list(range(len(prompts))),
                num_steps=num_steps,
                guidance_scale=scale,
                batch_size=50,
            )
            row = {"guidance_scale": scale, "num_steps": num_steps, "num_images": len(prompts)}
            for name, reader in readers.items():
                with torch.inference_mode():
                    right = int((reader(images).argmax(dim=1) == digits).sum())
                share = proportion(right, len(prompts))
                row |= {name: share.value, f"{name}_low": share.low, f"{name}_high": share.high}
            rows.append({key: round(value, 4) for key, value in row.items()})
            print(rows[-1], flush=True)
    write_whole(Path(config.output) / "choice.csv", csv_text(rows))


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("search_study_choice", lambda: choose(load(ChoiceConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
