"""What `blackpoint init` looks at: a folder of captioned images, a checkpoint, and the device."""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from blackpoint.data.bad_samples import BadSample
from blackpoint.data.files.errors import UserError
from blackpoint.data.images.decode import BadImage
from blackpoint.data.images.pictures import picture_size
from blackpoint.data.pack.captions import captioned_files
from blackpoint.data.pack.pack import PackConfig, source_contents
from blackpoint.sampling.lora.keys import WIDTHS
from blackpoint.sampling.model import DiffusionModel

MOST_LOOKED_AT = 2000
"""Images whose captions and sizes are read; all are counted."""
PRODUCT_SIDE = {"cpu": 1024, "cuda": 8192}
RATE_S = 0.5


@dataclass(frozen=True)
class Photos:
    """A folder of images as `data pack` will read it."""

    count: int
    captions: str
    """Where they are."""
    sides: list[int]
    """Shorter sides of the images that were looked at, in pixels."""
    bad: list[BadSample]
    """Of those that were looked at."""

    def num_below(self, side: int) -> int:
        """Returns about how many images are smaller than that, in pixels."""
        below = sum(one < side for one in self.sides)
        return round(below / max(len(self.sides), 1) * self.count)

    def lines(self, side: int) -> list[str]:
        """Returns what is to be known of them, for training at `side` pixels."""
        lines = [f"{self.count:,} images, captions from {self.captions}"]
        if self.sides:
            low, high = min(self.sides), max(self.sides)
            lines.append(f"shorter sides of {low} to {high} px, half above {median(self.sides):g}")
        if below := self.num_below(side):
            lines.append(f"WARNING: about {below:,} are below {side} px and would be enlarged")
        if self.bad:
            looked_at = len(self.bad) + len(self.sides)
            first = f"{self.bad[0].key}: {self.bad[0].reason}"
            lines.append(
                f"WARNING: {len(self.bad)} of the first {looked_at} can't be used ({first}); "
                "`data pack` leaves out at most max_bad_share=0.01 of all"
            )
        return lines


def look_at_photos(folder: Path) -> Photos:
    """Counts images and reads captions and sizes of the first; raises UserError without any."""
    count, captions = source_contents(PackConfig(source=str(folder), output=""))
    sides, bad = [], []
    for one in itertools.islice(captioned_files(captions), MOST_LOOKED_AT):
        if isinstance(one, BadSample):
            bad.append(one)
        elif one.row is None:
            try:
                sides.append(min(picture_size(one.path)))
            except BadImage as error:
                bad.append(BadSample(one.name, str(error)))
    num_images = captions.num_embedded() if captions.is_embedded else count.num_images
    if len(bad) == num_images:
        raise UserError(
            f"source={folder}: none of {num_images} images can be used ({bad[0].key}: "
            f"{bad[0].reason}); repair them, or name another folder"
        )
    return Photos(num_images, str(captions), sides, bad)


def describe_base(model: DiffusionModel, side: int) -> str:
    """Returns family, prediction type, terminal SNR and size of a checkpoint."""
    assert model.pipeline is not None
    width = model.unet.config.cross_attention_dim
    width = width[0] if isinstance(width, list | tuple) else width
    family = "pixel space" if model.pixels else WIDTHS.get(width, f"UNet of context width {width}")
    try:
        model.pipeline.scheduler()
        prediction = model.process.prediction_type
    except UserError:  # of a single file; training does not need it
        return f"{family}, {side} px; the file does not tell what it predicts"
    snr = "zero" if model.process.schedule.is_zero_terminal_snr else "non-zero"
    return f"{family}, {side} px, {prediction}, {snr} terminal SNR"


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the operations per second of matrix products on a device, for half a second.

    A multiplication and an addition are two operations.
    """
    side = PRODUCT_SIDE.get(device.type, 1024)
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    best, until_s = 0.0, time.perf_counter() + RATE_S
    while not best or time.perf_counter() < until_s:
        start_s = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for it
        best = max(best, 2 * side**3 / (time.perf_counter() - start_s))
    return best
