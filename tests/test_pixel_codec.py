"""Laws of the pixel codecs: nothing is lost, positions become channels, both maps are linear."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from blackpoint.sampling.pixels.pixel_codec import KINDS, PixelCodec

# Of values up to 20: some dozen roundings of 1e-6 at most.
ROUNDING = 2e-5
EACH = pytest.mark.parametrize(
    ("kind", "patch"), [(kind, patch) for kind in KINDS for patch in (1, 2, 4, 8)]
)


def images(seed: int = 0, height: int = 32, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(2, 3, height, width, generator=generator) - 1


@EACH
def test_nothing_is_lost(kind: str, patch: int) -> None:
    codec = PixelCodec(kind, patch)
    channels = codec.to_channels(images())
    assert channels.shape == (2, codec.channels, 32 // patch, 64 // patch)
    assert_close(codec.to_pixels(channels), images(), rtol=0, atol=ROUNDING)


@EACH
def test_every_array_of_channels_is_an_image(kind: str, patch: int) -> None:
    codec = PixelCodec(kind, patch)
    channels = torch.randn(2, codec.channels, 4, 4, generator=torch.Generator().manual_seed(1))
    assert_close(codec.to_channels(codec.to_pixels(channels)), channels, rtol=0, atol=ROUNDING)


@EACH
def test_both_maps_are_linear(kind: str, patch: int) -> None:
    codec, a, b = PixelCodec(kind, patch), images(1), images(2)
    expected = 2 * codec.to_channels(a) - 3 * codec.to_channels(b)
    assert_close(codec.to_channels(2 * a - 3 * b), expected, rtol=0, atol=ROUNDING)


def test_space_to_depth_is_a_strided_convolution() -> None:
    """Each position holds its own patch and nothing else."""
    channels = PixelCodec("space_to_depth", 4).to_channels(images())
    patch = images()[:, :, 8:12, 20:24].flatten(1)
    assert_close(channels[:, :, 2, 5], patch, rtol=0, atol=0)


def test_the_wavelet_is_the_5_3_filter_bank_of_jpeg_2000() -> None:
    """Away from the edges: low (-1, 2, 6, 2, -1) / 8 and high (-1, 2, -1) / 2, by numpy."""
    pixels = images().double()
    channels = PixelCodec("wavelet", 2).to_channels(pixels).numpy()
    filters = {0: np.array([-1, 2, 6, 2, -1]) / 8, 1: np.array([-1, 2, -1]) / 2}
    for band in range(4):
        across, down = filters[band // 2], filters[band % 2]
        kernel = np.outer(down, across)
        row, column = 6, 9  # of the band
        top = 2 * row + (0 if band % 2 == 0 else 1) - len(down) // 2
        left = 2 * column + (0 if band // 2 == 0 else 1) - len(across) // 2
        window = pixels.numpy()[:, :, top : top + len(down), left : left + len(across)]
        expected = (window * kernel).sum(axis=(2, 3))
        found = channels[:, 3 * band : 3 * band + 3, row, column]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_a_constant_image_has_no_high_bands() -> None:
    channels = PixelCodec("wavelet", 4).to_channels(torch.full((1, 3, 16, 16), 0.25))
    assert_close(channels[:, :3], torch.full((1, 3, 4, 4), 0.25))
    assert not channels[:, 3:].any()


@pytest.mark.parametrize(("kind", "patch"), [("dct", 4), ("wavelet", 3), ("space_to_depth", 0)])
def test_what_is_no_codec_is_refused(kind: str, patch: int) -> None:
    with pytest.raises(ValueError, match="codec=dct|patch="):
        PixelCodec(kind, patch)
