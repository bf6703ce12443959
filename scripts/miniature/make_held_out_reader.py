"""Makes the reader that judges searches: python -m
blackpoint.scripts.miniature.make_held_out_reader [key=value ...].

It is trained on digits that nothing else here is trained on: the 1,797 of the UCI repository, by
other writers, and the 500 held-out ones of MNIST; its accuracy is measured on all 4,500 digits that
it did not see, which are those that the embedded model and the first reader learned from.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from blackpoint.sampling.statistics.estimates import proportion
from blackpoint.scripts.config import load
from blackpoint.scripts.miniature.digit_readers import (
    DigitPerceptron,
    DigitReader,
    save_weights,
    train_reader,
)
from blackpoint.scripts.miniature.digits import compose, draw_colours, mnist_digits, uci_digits
from blackpoint.scripts.stand_alone import run_script


@dataclass
class HeldOutReaderConfig:
    """How the held-out reader is trained."""

    output: str = "assets/digit_perceptron"
    """Folder of its weights."""
    other: str = "assets/digit_reader"
    """The reader that it is compared with."""
    num_steps: int = 12000
    """Optimizer steps, 128 images each."""
    seed: int = 2
    """Seed of colours, order, jitter and weights."""
    num_compositions: int = 4
    """Colours that each digit is painted in."""


def make(config: HeldOutReaderConfig) -> None:
    """Trains the reader, saves it and prints how well it reads what it never saw."""
    own, other = mnist_digits("held_out"), uci_digits()
    masks, labels = (np.concatenate(pair) for pair in zip(own, other, strict=True))
    # as many MNIST digits as others: their strokes are what the embedded model paints
    rows = np.concatenate([np.tile(np.arange(len(own[0])), 3), np.arange(len(own[0]), len(masks))])
    rows = np.tile(rows, config.num_compositions)
    images = paint(masks[rows], config.seed)
    reader = train_reader(
        DigitPerceptron, images, labels[rows].tolist(), config.seed, config.num_steps,
        learning_rate=1e-3,
    )  # fmt: skip
    save_weights(reader.half(), Path(config.output))
    reader.float()
    masks, labels = mnist_digits("train")
    unseen = paint(masks, config.seed + 1)
    for name, each in (
        ("held-out reader", reader),
        ("first reader", DigitReader.load(config.other)),
    ):
        with torch.inference_mode():
            found = [each(part.float() / 255).argmax(1) for part in unseen.split(256)]
        right = int((torch.cat(found).numpy() == labels).sum())
        share = proportion(right, len(labels))
        print(f"{name}: {share:.1%}")


def paint(masks: np.ndarray, seed: int) -> torch.Tensor:
    """Paints masks (N, 56, 56) in random colours; returns uint8 (N, 3, 64, 64)."""
    rng = np.random.default_rng(seed)
    images = [compose(mask, *draw_colours(rng)) for mask in masks]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("make_held_out_reader", lambda: make(load(HeldOutReaderConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
