"""Features from packages alone: pooled, deterministic, and different for different pictures."""

import pytest
import torch
from torch.testing import assert_close

from blackpoint.sampling.verifiers.models.imagenet_features import ImageNetFeatures

pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `demo` is not installed")


def test_features_are_of_each_picture_by_itself() -> None:
    network = ImageNetFeatures()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 64, 64, generator=generator)
    with torch.inference_mode():
        together, alone = network(images), network(images[1:2])
        larger = network(torch.nn.functional.interpolate(images, (128, 128), mode="nearest"))
    assert together.shape == (3, 1280)
    assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)
    assert larger.shape == together.shape and larger.isfinite().all()
    assert (together[0] - together[1]).abs().max() > 0.1
