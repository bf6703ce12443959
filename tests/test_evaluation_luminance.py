"""Luminance: the values of PIL's gray conversion, on exactly the outer two rows and columns."""

import numpy as np
import torch
from PIL import Image
from torch.testing import assert_close

from sampling.evaluation.luminance import border_luminance, image_luminance, luminance


def test_luminance_is_that_of_pil() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(9, 7, 3), dtype=np.uint8)
    gray = (
        torch.from_numpy(np.asarray(Image.fromarray(pixels).convert("L")).astype(np.float32)) / 255
    )
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    assert_close(luminance(images)[0], gray, atol=1 / 255, rtol=0)


def test_border_is_the_outer_two_rows_and_columns() -> None:
    images = torch.ones(1, 3, 8, 8)
    images[..., 2:-2, 2:-2] = 0
    assert border_luminance(images).item() == 1
    assert image_luminance(images).item() == 1 - 16 / 64
    assert border_luminance(1 - images).item() == 0


def test_the_inside_does_not_touch_the_border() -> None:
    images = torch.full((5, 3, 64, 64), 0.25)
    images[..., 4:-4, 4:-4] = torch.rand(5, 3, 56, 56)
    assert_close(border_luminance(images), torch.full((5,), 0.25), atol=1e-5, rtol=0)
