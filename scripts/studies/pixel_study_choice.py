"""At which resolution the shift matters: python -m blackpoint.scripts.studies.pixel_study_choice.

The cosine schedule leaves an image's shape in x_t the longer, the more pixels repeat each other. Of
digits averaged to 8, 16, 32 and 64 px (each less its own mean brightness) this is the share of the
variance that the best linear estimate from x_t recovers,

    sum_i l_i (l_i SNR / (l_i SNR + 1)) / sum_i l_i,   l_i the eigenvalues of the covariance

(the Wiener filter). Timesteps at which nearly everything is recovered teach detail alone. Writes
docs/pixel_study/choice.csv and choice.md.
"""

import csv
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from blackpoint.scripts.miniature.digits import compose, mnist_digits

OUTPUT = Path("docs/pixel_study")
SIDES_PX, TIMES = (8, 16, 32, 64), (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95)


def spectrum(images: Tensor, side_px: int) -> Tensor:
    """Returns the eigenvalues of the covariance of images (N, 3, H, H) averaged to side_px."""
    small = F.avg_pool2d(images, images.shape[-1] // side_px)
    shape = (small - small.mean(dim=(1, 2, 3), keepdim=True)).flatten(1)
    wide = shape.shape[1] > len(shape)
    gram = shape @ shape.T if wide else shape.T @ shape
    return torch.linalg.eigvalsh(gram / len(shape)).clamp(min=0)


def recovered(eigenvalues: Tensor, snr: float) -> float:
    """Returns the share of the variance that the Wiener filter recovers at this SNR."""
    gain = eigenvalues * snr / (eigenvalues * snr + 1)
    return ((eigenvalues * gain).sum() / eigenvalues.sum()).item()


def half_time(eigenvalues: Tensor) -> float:
    """Returns t at which half of the variance is recovered, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if recovered(eigenvalues, cosine_snr(middle)) > 0.5:
            low = middle
        else:
            high = middle
    return low


def cosine_snr(t: float) -> float:
    """Returns SNR of the cosine schedule at t in (0, 1)."""
    return 1 / math.tan(math.pi * t / 2) ** 2


def main() -> int:
    """Computes the table and writes both files."""
    masks, _ = mnist_digits("train")
    arrays = np.stack([compose(mask, "white", "black") for mask in masks])
    images = torch.from_numpy(arrays).permute(0, 3, 1, 2).double() / 127.5 - 1
    header = ["side_px", *(f"t={t:g}" for t in TIMES), "half_at_t"]
    rows = []
    for side_px in SIDES_PX:
        eigenvalues = spectrum(images, side_px)
        shares = [recovered(eigenvalues, cosine_snr(t)) for t in TIMES]
        rows.append([side_px, *(round(v, 4) for v in (*shares, half_time(eigenvalues)))])
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / "choice.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([header, *rows])
    lines = ["| " + " | ".join(header) + " |", "|" + "--:|" * len(header)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    text = "\n".join(lines) + "\n"
    (OUTPUT / "choice.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
