"""Whether a run is finished, and whether what it is made of is still what it began with."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from data.files.errors import UserError
from data.module import CaptionedImages
from sampling.model import DiffusionModel
from train.base_identity import base_identity, check_same_base
from train.config import TrainConfig
from train.encoders import check_encodings
from train.resume_keys import When
from train.run_directory import names_other, steps_done
from train.run_identity import check_same_data, read_identity
from train.sizes import sized


def is_finished(run_dir: Path, max_steps: int) -> bool:
    """Tells whether the run was exported, after no less than `max_steps`."""
    return (run_dir / "export").exists() and steps_done(run_dir) >= max_steps


def checked_identity(
    config: TrainConfig,
    run_dir: Path,
    model: DiffusionModel,
    images: CaptionedImages,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Returns the sections of identity.json; raises UserError where a run began with others.

    Also for latents that the encoders of the base would not make. `images` are set up.
    """
    base = base_identity(config, model, read_identity(run_dir).get("base"), note)
    identity = {"data": images.identity(), "base": base}
    for text in (
        check_same_data(run_dir, identity["data"]),
        check_same_base(run_dir, base, config),
    ):
        if text:
            note(text)
    check_encodings(model, images.encodings(), base)
    return identity


def check_renamed(config: TrainConfig, run_dir: Path) -> None:
    """Raises UserError where what a run names otherwise now is not what it began with."""
    config = sized(config, run_dir, lambda text: None)
    if names_other(run_dir, config, When.SAME_DATA):
        images = CaptionedImages(config.data, config.seed, config.batch_size)
        images.prepare_data()
        images.setup("fit")
        check_same_data(run_dir, images.identity())
    if names_other(run_dir, config, When.SAME_BASE):
        try:
            base = base_identity(config)
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename} is missing: checkpoint={config.checkpoint} is no whole base; "
                "name the one that the run began with"
            ) from None
        check_same_base(run_dir, base, config)


def keep_earlier_export(run_dir: Path) -> str:
    """Puts an export aside, for another follows; returns a note, "" where there is none."""
    export = run_dir / "export"
    if not export.exists():
        return ""
    steps = steps_done(run_dir)
    earlier = run_dir / f"export_step_{steps:08d}"
    for number in count(2):
        if not earlier.exists():
            break
        earlier = run_dir / f"export_step_{steps:08d}_{number}"
    export.rename(earlier)
    return f"{run_dir} was finished and goes on; its export of step {steps} is kept in {earlier}"
