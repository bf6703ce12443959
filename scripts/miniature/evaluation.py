"""The black-point study of checkpoints on the embedded data's captions and real digits."""

from pathlib import Path

import torch

from blackpoint.sampling.checkpoints.fingerprint import model_digest
from blackpoint.sampling.evaluation.black_point import BlackPointConfig, Captions
from blackpoint.sampling.evaluation.black_point_study import (
    Identity,
    Load,
    load_painter,
    reference_rows,
    run_study,
)
from blackpoint.sampling.evaluation.black_point_summary import Finding, write_summary
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.report.rows import Row
from blackpoint.scripts.miniature.digit_reader import DigitReader
from blackpoint.scripts.miniature.digits import BACKGROUNDS, INKS, caption, digit_samples


def evaluate(
    config: BlackPointConfig, load: Load = load_painter
) -> tuple[list[Row], list[Finding]]:
    """Runs what the study still lacks and returns its rows and findings."""
    identities = {
        name: identify(checkpoint, config.allow_unsound)
        for name, checkpoint in config.checkpoints.items()
    }
    rows = run_study(config, digit_captions(), real_rows(config), identities, load)
    names = list(config.checkpoints)
    return rows, write_summary(Path(config.output), rows, names, config.read_guidance_scale)


def digit_captions() -> Captions:
    """Lists every caption of the embedded data, so that any ten in a row name ten digits."""

    def with_background(background: str | None) -> list[tuple[str, int]]:
        inks = [ink for ink in INKS if ink != background]
        return [
            (caption(inks[(digit + turn) % len(inks)], digit, background), digit)
            for turn in range(len(inks))
            for digit in range(10)
        ]

    left_open = with_background(None)
    named = {background: with_background(background) for background in BACKGROUNDS}
    others = [named[name] for name in BACKGROUNDS if name not in ("black", "white")]
    mixed = []
    for start in range(0, max(map(len, [*others, left_open])), 10):
        for captions in [*others, left_open]:  # ten digits of each gray, then ten that are open
            mixed += captions[start : start + 10]
    return Captions(left_open, named["black"], named["white"], mixed)


def real_rows(config: BlackPointConfig) -> list[Row]:
    """Measures real held-out digits, composed by the rule of the training data."""
    images, captions, labels = digit_samples(config.reference_images, config.seed, split="held_out")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    labelled = list(zip(captions, labels.tolist(), strict=True))
    return reference_rows(pixels, labelled, DigitReader.load(config.digit_reader))


def identify(checkpoint: str, allow_unsound: bool = False) -> Identity:
    """Loads a checkpoint once (which says what is unsound about it); hashes its UNet and
    process."""
    model = DiffusionModel.load(checkpoint)
    model.process.check_sound(allow_unsound)
    return Identity(model_digest(model), model.process.incompatibility())
