"""What an output of `data encode` was begun with, and goes on with: number formats, the decoder."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from data.images.decode import DECODER_VERSION, STORED_COLORS
from data.latents import DEFAULT_FORMATS
from data.shards import ENCODING_FILE
from data.shared_partial import folder_beside
from sampling.choices import recorded_formats
from sampling.precision import settle
from train.encode_config import EncodeConfig


def settled(config: EncodeConfig, device: torch.device) -> tuple[EncodeConfig, bool]:
    """Returns the config with the number formats that `device` encodes in, and whether they are
    recorded with what `output` holds already.

    Raises UserError where that was begun in others; what has no record of them goes on as it was.
    """
    output, saved = Path(config.output), begun_settings(Path(config.output))
    kept, is_recorded = (None, True) if saved is None else recorded_formats(saved, DEFAULT_FORMATS)
    asked = {name: getattr(config, name) for name in DEFAULT_FORMATS}
    taken = settle(f"output={output}", asked, device, tell, kept, is_recorded)
    return dataclasses.replace(config, **taken), is_recorded


def begun_settings(output: Path) -> dict[str, Any] | None:
    """Returns the settings of what `output` holds, finished or not; None where there is nothing."""
    saved = None
    for path in (folder_beside(output) / "settings.json", output / ENCODING_FILE):
        with contextlib.suppress(OSError, ValueError):
            saved = json.loads(path.read_text(encoding="utf-8"))
    return saved


def begun_decoder(output: Path) -> int:
    """Returns the version of the decoder that `output` was begun with; today's for a new one."""
    saved = begun_settings(output)
    version = DECODER_VERSION if saved is None else saved.get("decoder", STORED_COLORS)
    if version == STORED_COLORS:
        tell(
            f"{output} was begun before images were converted to sRGB by their colour profiles; it "
            "goes on with colours as they are stored. Name another output to convert them"
        )
    return version


def tell(text: str) -> None:
    """Gives the user a note, on stderr."""
    print(f"note: {text}", file=sys.stderr, flush=True)
