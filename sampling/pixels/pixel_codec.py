"""Early down-sampling without an autoencoder: an image as fewer positions with more channels.

A pixel-space network works on (B, 3 p^2, H/p, W/p) instead of (B, 3, H, W), and its output is taken
back (Hoogeboom et al. 2023, section 3.3). Both forms are linear and lose nothing:

    space_to_depth   each p x p patch becomes channels: what a p x p convolution of stride p sees
    wavelet          log2(p) levels of JPEG 2000's 5/3 wavelet, in both directions, on every band:
                     d[n] = x[2n+1] - (x[2n] + x[2n+2]) / 2,   s[n] = x[2n] + (d[n-1] + d[n]) / 4

Diffusion itself, and the loss, stay in pixels: noise is white there, whatever the network sees.
This file needs nothing but torch: exports of pixel-space models carry a copy of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

IMAGE_CHANNELS = 3
KINDS = ("space_to_depth", "wavelet")


@dataclass(frozen=True)
class PixelCodec:
    """Which form, and p: the side of the patch that becomes one position."""

    kind: str = "space_to_depth"
    patch: int = 4

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"codec={self.kind} is none of {', '.join(KINDS)}")
        if self.patch < 1 or self.patch & (self.patch - 1):
            raise ValueError(f"patch={self.patch} must be a power of two (1: no down-sampling)")

    @property
    def channels(self) -> int:
        """Channels that the network takes and gives: 3 p^2."""
        return IMAGE_CHANNELS * self.patch**2

    def to_channels(self, images: Tensor) -> Tensor:
        """Takes images (B, 3, H, W) to (B, 3 p^2, H/p, W/p); p must divide H and W."""
        if self.kind == "space_to_depth":
            return F.pixel_unshuffle(images, self.patch)
        for _ in range(self.patch.bit_length() - 1):
            low, high = _analyse(images)
            bands = (*_analyse(low.mT), *_analyse(high.mT))
            images = torch.cat([band.mT for band in bands], dim=1)
        return images

    def to_pixels(self, channels: Tensor) -> Tensor:
        """Takes (B, 3 p^2, H/p, W/p) back to images (B, 3, H, W)."""
        if self.kind == "space_to_depth":
            return F.pixel_shuffle(channels, self.patch)
        for _ in range(self.patch.bit_length() - 1):
            ll, lh, hl, hh = (band.mT for band in channels.chunk(4, dim=1))
            channels = _synthesise(_synthesise(ll, lh).mT, _synthesise(hl, hh).mT)
        return channels


def _analyse(x: Tensor) -> tuple[Tensor, Tensor]:
    """Splits rows (..., 2 n) into low and high bands (..., n), mirrored at the ends."""
    even, odd = x[..., 0::2], x[..., 1::2]
    high = odd - (even + _next(even)) / 2
    return even + (_previous(high) + high) / 4, high


def _synthesise(low: Tensor, high: Tensor) -> Tensor:
    """Undoes `_analyse`."""
    even = low - (_previous(high) + high) / 4
    odd = high + (even + _next(even)) / 2
    return torch.stack([even, odd], dim=-1).flatten(-2)


def _next(x: Tensor) -> Tensor:
    return torch.cat([x[..., 1:], x[..., -1:]], dim=-1)


def _previous(x: Tensor) -> Tensor:
    return torch.cat([x[..., :1], x[..., :-1]], dim=-1)
