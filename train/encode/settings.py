"""What `data encode` settles before it begins: what its output holds already decides, then the
checkpoint and the device."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from blackpoint.data.images.decode import STORED_COLORS
from blackpoint.data.images.picture_size import READER_VERSION
from blackpoint.data.latents import DEFAULT_FORMATS
from blackpoint.data.reader import Reader
from blackpoint.data.shards.listing import ENCODING_FILE
from blackpoint.data.summary import enlarged_lines
from blackpoint.data.work.partial import folder_beside
from blackpoint.sampling.choices import recorded_formats
from blackpoint.sampling.runtime.precision import settle
from blackpoint.train.encode.config import EncodeConfig
from blackpoint.train.records.checkpoint_size import checkpoint_size


def sized(config: EncodeConfig) -> EncodeConfig:
    """Returns the config with the resolution: its own, what `output` holds or was begun with, or
    the size that the checkpoint was made for, which is said."""
    if config.resolution:
        return config
    side = _recorded(Path(config.output)).get("resolution", 0)
    if side:
        tell(f"resolution={side}, that of the latents in output={config.output}")
    else:
        side = checkpoint_size(config.checkpoint, "resolution", config.single_file)
        tell(f"resolution={side}, the size that checkpoint={config.checkpoint} was made for")
    return dataclasses.replace(config, resolution=side)


def settled(config: EncodeConfig, device: torch.device) -> tuple[EncodeConfig, bool]:
    """Returns the config with the number formats that `device` encodes in, and whether they are
    recorded with what `output` holds already.

    Raises UserError where that was begun in others; what has no record of them goes on as it was.
    """
    kept: dict[str, Any] | None = None
    is_recorded = True
    if saved := _recorded(Path(config.output)):
        kept, is_recorded = recorded_formats(saved, DEFAULT_FORMATS)
    asked = {name: getattr(config, name) for name in DEFAULT_FORMATS}
    taken = settle(f"output={config.output}", asked, device, tell, kept, is_recorded)
    return dataclasses.replace(config, **taken), is_recorded


def begun_decoder(output: Path) -> int:
    """Returns the version of the decoder that `output` was begun with; today's for a new one."""
    saved = _recorded(output)
    version = saved.get("decoder", STORED_COLORS) if saved else READER_VERSION
    if version == STORED_COLORS:
        tell(
            f"{output} was begun before images were converted to sRGB by their colour profiles; it "
            "goes on with colours as they are stored; name another output to convert them"
        )
    return version


def _recorded(output: Path) -> dict[str, Any]:
    """Returns the settings of what `output` holds, or is begun beside it; {} without either."""
    for path in (output / ENCODING_FILE, folder_beside(output) / "settings.json"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
            saved = json.loads(path.read_text(encoding="utf-8"))
            return saved if isinstance(saved, dict) else {}
    return {}


def warn_of_enlarged(config: EncodeConfig, reader: Reader) -> None:
    """Says how many images of the source are enlarged, if any."""
    remedy = "with a smaller one the latents take less room and time, and show as much"
    name, field = f"source={config.source}", f"resolution={config.resolution}"
    for line in enlarged_lines(name, reader, f"{field}; {remedy}"):
        print(line, file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """Prints notes on stderr."""
    print(f"note: {text}", file=sys.stderr, flush=True)
