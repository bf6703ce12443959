"""`python -m blackpoint.scripts.measurements.measure_shift`: the law behind the resolution shift,
measured on photographs.

Photographs at a large resolution are noised by the shifted schedule and averaged down to the base
resolution. There the noisy picture is regressed on the clean one,

    D[x_t] = slope D[x0] + residual,   slope^2 / var(residual) = SNR of the base schedule at t

if the shift is right (Hoogeboom et al. 2023, section 3.1); without it the ratio is (large / base)^2
times that. Writes docs/resolution_shift.md, .json and .png (as the paper's Figure 3: the pooled
large picture beside the small one at equal noise, before and after the shift).
"""

import math
import sys
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from blackpoint.sampling.report.page import Page
from blackpoint.sampling.runtime.picture_grid import caption_grid
from blackpoint.sampling.runtime.pictures import to_picture
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.sampling.statistics.table import Table
from blackpoint.scripts.config import load
from blackpoint.scripts.measurements.photographs import CAPTIONS, photograph
from blackpoint.scripts.stand_alone import describe_machine, run_script, write_page

SHOWN_TIMESTEPS = (49, 149, 299, 499, 799)


@dataclass
class ShiftStudyConfig:
    """What is noised, and where the figures go."""

    base_px: int = 64
    """Side that the schedule was made for."""
    resolution_px: int = 256
    """Side of the photographs that are noised; a multiple of base_px."""
    every_steps: int = 50
    """Distance of the timesteps that are measured."""
    seed: int = 0
    """Seed of the noise."""
    output: str = "docs/resolution_shift"
    """Writes this name with .md, .json and .png."""


@dataclass
class Ratio:
    """slope^2 / var(residual) at one timestep, with its standard error; `t` of T."""

    t: int
    base_snr: float
    shifted: float
    standard_error: float
    unshifted: float

    @property
    def z(self) -> float:
        """Distance from the base schedule's SNR, in standard errors."""
        return (self.shifted - self.base_snr) / self.standard_error


def photographs(size_px: int) -> Tensor:
    """Returns real photographs, center-cropped, (N, 3, size, size) in [-1, 1], float64."""
    pictures = []
    for name in CAPTIONS:
        picture = photograph(name).convert("RGB")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        box = (left, top, left + side, top + side)
        pixels = np.asarray(picture.resize((size_px, size_px), Image.Resampling.LANCZOS, box=box))
        pictures.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    return torch.stack(pictures).double() / 127.5 - 1


def signal_to_noise(clean: Tensor, noisy: Tensor) -> tuple[float, float]:
    """Regresses noisy on clean pixels; returns slope^2 / var(residual) and its standard error.

    The error is first-order, from those of slope and variance, which are independent for Gaussian
    noise: var(slope) = var(residual) / Sxx and var(var(residual)) = 2 var(residual)^2 / n.
    """
    x, y = clean.flatten(), noisy.flatten()
    x, y = x - x.mean(), y - y.mean()
    sxx = x.square().sum()
    slope = (x * y).sum() / sxx
    variance = (y - slope * x).square().sum() / (len(x) - 2)
    ratio = slope.square() / variance
    error = (4 * ratio / sxx + 2 * ratio.square() / len(x)).sqrt()
    return ratio.item(), error.item()


def measure(config: ShiftStudyConfig) -> list[Ratio]:
    """Returns the ratios at every `every_steps`-th timestep, T - 2 and T - 1 being the last."""
    base = NoiseSchedule.scaled_linear().zero_terminal_snr()
    shifted = base.shifted(config.base_px, config.resolution_px)
    factor = config.resolution_px // config.base_px
    x0 = photographs(config.resolution_px)
    clean = F.avg_pool2d(x0, factor)
    generator = torch.Generator().manual_seed(config.seed)
    last = base.num_steps - 2
    rows = []
    for t in [*range(0, last, config.every_steps), last]:
        eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        ratios = []
        for schedule in (shifted, base):
            x_t = schedule.alpha[t] * x0 + schedule.sigma[t] * eps
            ratios.append(signal_to_noise(clean, F.avg_pool2d(x_t, factor)))
        (ratio, error), (unshifted, _) = ratios
        rows.append(Ratio(t, base.snr[t].item(), ratio, error, unshifted))
    return rows


def picture(config: ShiftStudyConfig) -> Image.Image:
    """Lays out one photograph over t: small, large and pooled, large and pooled after the shift."""
    base = NoiseSchedule.scaled_linear().zero_terminal_snr()
    shifted = base.shifted(config.base_px, config.resolution_px)
    factor = config.resolution_px // config.base_px
    large = photographs(config.resolution_px)[1:2]
    small = F.avg_pool2d(large, factor)
    generator = torch.Generator().manual_seed(config.seed)
    eps_small, eps = (torch.randn(x.shape, generator=generator).double() for x in (small, large))
    rows: list[list[Image.Image]] = [[], [], []]
    for t in SHOWN_TIMESTEPS:
        noisy = (
            base.alpha[t] * small + base.sigma[t] * eps_small,
            F.avg_pool2d(base.alpha[t] * large + base.sigma[t] * eps, factor),
            F.avg_pool2d(shifted.alpha[t] * large + shifted.sigma[t] * eps, factor),
        )
        for row, x_t in zip(rows, noisy, strict=True):
            centered = x_t[0] / x_t.std() * small.std()  # equal contrast: the eye sees the SNR
            row.append(to_picture(centered / 2 + 0.5))
    captions = [
        f"{config.base_px} px",
        f"{config.resolution_px} px, averaged to {config.base_px}: the same schedule",
        f"{config.resolution_px} px, averaged to {config.base_px}: shifted",
    ]
    return caption_grid(captions, rows, [f"t = {t}" for t in SHOWN_TIMESTEPS])


def page(config: ShiftStudyConfig, rows: list[Ratio], machine: dict[str, str]) -> str:
    """Writes the page."""
    within = sum(abs(row.z) < 1.96 for row in rows)
    chi_square = sum(row.z**2 for row in rows)
    factor = (config.resolution_px / config.base_px) ** 2
    lines = [(r.t, r.base_snr, r.shifted, r.standard_error, r.z, r.unshifted) for r in rows]
    columns = {"t": "", "SNR wanted": ".4g", "measured": ".4g", "standard error": ".2g"}
    columns |= {"distance in errors": "+.1f", "without the shift": ".4g"}
    return Page(
        "The resolution shift, measured",
        [
            f"`python -m blackpoint.scripts.measurements.measure_shift` on "
            f"{machine['date']}: {len(CAPTIONS)} photographs "
            f"of scikit-image at {config.resolution_px} px, seed {config.seed}, noised by Stable "
            f"Diffusion's schedule (zero terminal SNR) shifted from {config.base_px} to "
            f"{config.resolution_px} px, then averaged to {config.base_px} px and regressed on the "
            "clean average. If the shift is right, slope^2 / residual variance is the SNR of the "
            "schedule before the shift.",
            f"{within} of {len(rows)} timesteps lie within 1.96 standard errors of it; the squared "
            f"distances add up to {chi_square:.1f} on {len(rows)} degrees of freedom (standard "
            f"deviation {math.sqrt(2 * len(rows)):.1f}). Without the shift the ratio is "
            f"{factor:.0f} times too large.",
            "![The same noise at two resolutions, before and after the shift]"
            "(resolution_shift.png)",
            "A photograph at equal t: small; large with the same schedule and averaged, which is "
            "far less noisy; large with the shifted schedule and averaged, which is like the small "
            "one. Every picture is scaled to the same contrast.",
            Table.of(columns, lines),
        ],
    ).markdown()


def write(config: ShiftStudyConfig) -> None:
    """Measures, writes the three files and prints the page."""
    rows, machine = measure(config), describe_machine()
    content = {**machine, "settings": asdict(config), "rows": [asdict(row) for row in rows]}
    picture(config).save(f"{config.output}.png")
    write_page(config.output, page(config, rows, machine), content)


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("measure_shift", lambda: write(load(ShiftStudyConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
