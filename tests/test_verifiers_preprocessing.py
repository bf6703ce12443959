"""Preprocessing in torch: the numbers of the library's processors, with gradients."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.transforms.functional as tv
from torch.testing import assert_close
from torchvision.transforms import InterpolationMode
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
)

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.verifiers.models.preprocessing import (
    Preprocessing,
    from_processor,
    load_preprocessing,
    processed,
)
from tests.tiny_vision import eight_bit_images

PROCESSORS = {
    "clip": CLIPImageProcessor(),
    "clip small": CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ),
    "dinov2": BitImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}, resample=3
    ),
    "vit": ViTImageProcessor(),
    "siglip": SiglipImageProcessor(size={"height": 64, "width": 64}),
    "convnext": ConvNextImageProcessor(size={"shortest_edge": 56}),
    "convnext large": ConvNextImageProcessor(size={"shortest_edge": 384}),
    "no resize": ViTImageProcessor(do_resize=False),
    "pads": CLIPImageProcessor(do_resize=False, crop_size={"height": 65, "width": 48}),
    "no normalize": ViTImageProcessor(do_normalize=False, resample=0),
}


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("size", [(40, 57), (75, 40), (300, 300)])
def test_processors_numbers_to_a_gray_level_and_a_half(processor: Any, size: tuple) -> None:
    images = eight_bit_images(2, *size)
    ours = from_processor(processor)
    assert ours is not None
    level = 1 / 255 / min(ours.std)
    assert_close(ours(images), processed(processor, images), atol=1.5 * level, rtol=0)


def test_nothing_is_lost_where_nothing_is_resized() -> None:
    images, processor = eight_bit_images(2, 32, 32), PROCESSORS["clip small"]
    ours = from_processor(processor)
    assert ours is not None
    assert_close(ours(images), processed(processor, images), atol=1e-5, rtol=0)


def test_gradients_reach_every_pixel_of_the_crop() -> None:
    images = eight_bit_images(1, 48, 64).requires_grad_()
    ours = from_processor(PROCESSORS["clip small"])
    assert ours is not None
    ours(images).square().sum().backward()
    assert images.grad is not None
    inside = images.grad[..., 10:-10]  # 64 px shrink to 43, of which 32 are kept
    assert (inside.abs().sum(dim=1) > 0).all()
    assert (images.grad[..., :5] == 0).all()


def test_longest_edge_and_black_border_are_those_of_hpsv2() -> None:
    ours = Preprocessing(longest_edge=28, crop=(28, 28), clamp=False)
    for image in (*eight_bit_images(1, 40, 57), *eight_bit_images(1, 57, 33)):
        height, width = (round(edge * 28 / max(image.shape[1:])) for edge in image.shape[1:])
        resized = tv.resize(image, [height, width], InterpolationMode.BICUBIC, antialias=True)
        top, left = (28 - height) // 2, (28 - width) // 2
        expected = tv.pad(resized, [left, top, 28 - width - left, 28 - height - top])
        assert_close(ours(image[None])[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(32, 43), (32, 45), (47, 32)])
def test_rounded_corner_is_that_of_torchvision(size: tuple[int, int]) -> None:
    images = eight_bit_images(1, *size)
    ours = Preprocessing(shortest_edge=32, crop=(32, 32), crop_rounds=True)
    assert torch.equal(ours(images), tv.center_crop(images, [32, 32]))


@pytest.mark.parametrize(
    "processor",
    [
        EfficientNetImageProcessor(size={"height": 40, "width": 40}, rescale_offset=True),
        ViTImageProcessor(resample=1),
        ViTImageProcessor(size={"longest_edge": 40, "shortest_edge": 20}),
    ],
    ids=["rescale offset", "lanczos", "two edges"],
)
def test_a_processor_that_does_more_is_used_as_it_is(
    processor: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processor.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        found = load_preprocessing(tmp_path)
    assert not found.differentiable and "without gradients" in caplog.text
    images = eight_bit_images(2, 64, 48)
    assert torch.equal(found(images), processed(processor, images))


def test_a_known_processor_is_read_from_its_folder(tmp_path: Path) -> None:
    PROCESSORS["clip small"].save_pretrained(tmp_path)
    found = load_preprocessing(tmp_path)
    assert found == from_processor(PROCESSORS["clip small"]) and found.differentiable


def test_a_folder_without_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="preprocessor_config.json belongs beside config.json"):
        load_preprocessing(tmp_path)
