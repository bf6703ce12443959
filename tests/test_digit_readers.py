"""The digit reader: blind to ink and background, strict about its file, able to learn."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.scripts.miniature.digit_readers import (
    DigitReader,
    contrast_map,
    save_weights,
    train_reader,
)


def bars(num_images: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Paints a bar at one of four places in random colors; returns uint8 images and the place."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(4, (num_images,), generator=generator)
    ink, background = torch.rand(2, num_images, 3, 1, 1, generator=generator)
    ink = torch.where((ink - background).abs() < 0.3, (background + 0.5) % 1, ink)
    mask = torch.zeros(num_images, 1, 32, 32)
    for image, place in enumerate(places.tolist()):
        mask[image, :, 6 + 5 * place : 9 + 5 * place, 8:24] = 1
    return ((1 - mask) * background + mask * ink).mul(255).round().byte(), places


def test_contrast_map_is_the_mask_whatever_the_colors() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 6:-6, 6:-6] = torch.rand(20, 20, generator=generator)
    mask /= mask.max()
    ink, background = torch.rand(2, 8, 3, 1, 1, generator=generator)
    images = (1 - mask) * background + mask * ink
    assert_close(contrast_map(images), mask.expand(8, 1, 32, 32), atol=1e-4, rtol=0)


def test_a_blank_image_is_not_amplified_into_noise() -> None:
    noise = 1e-3 * torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert contrast_map(0.5 + noise).max() < 0.4


def test_reader_learns_and_survives_its_file(tmp_path: Path) -> None:
    images, places = bars(256)
    reader = train_reader(DigitReader, images, places, seed=0, num_steps=60, batch_size=32)
    assert sum(parameter.numel() for parameter in reader.parameters()) < 200_000
    unseen, expected = bars(64, seed=1)
    read = reader.read(unseen.float() / 255)
    assert read.dtype == torch.int64
    assert (read == expected).float().mean() > 0.8
    save_weights(reader, tmp_path)
    assert torch.equal(DigitReader.load(tmp_path).read(unseen.float() / 255), read)


def test_reader_refuses_a_wrong_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        DigitReader.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="does not hold a digit reader"):
        DigitReader.load(tmp_path)
    with pytest.raises(UserError, match=r"uint8 .* can't be read"):
        DigitReader().read(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_gradients_are_finite_where_pixels_equal_the_background() -> None:
    images = torch.zeros(1, 3, 32, 32)
    images[..., 8:24, 14:18] = 1
    images.requires_grad_()
    logits = DigitReader.load(Path(__file__).parents[1] / "assets" / "digit_reader")(images)
    [gradient] = torch.autograd.grad(logits[0, 1], images)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
