"""Real images inverted and painted again, on a tiny pipeline."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from data.files.errors import UserError
from sampling.inversion import Inverter
from sampling.model import DiffusionModel
from sampling.reconstruction import reconstruct


@pytest.fixture(scope="module")
def model(pipeline: Path) -> DiffusionModel:
    loaded = DiffusionModel.load(pipeline)
    loaded.process = replace(loaded.process, set_alpha_to_one=True)  # ends at clean data
    return loaded


@pytest.fixture(scope="module")
def images(model: DiffusionModel) -> torch.Tensor:
    """Smooth pictures of the model's size."""
    generator = torch.Generator().manual_seed(0)
    side = model.image_size
    small = torch.rand(3, 3, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(small, (side, side), mode="bilinear")


PROMPTS = ["a red photo", "a blue night", "snow"]


def test_bdia_paints_a_real_image_again(model: DiffusionModel, images: torch.Tensor) -> None:
    found = reconstruct(model, images, PROMPTS, num_steps=6)
    assert found.error.max() < 1e-3
    straight = model.decode(model.encode(images))
    assert_close(found.images, straight, rtol=0, atol=1e-3)


def test_more_iterations_reconstruct_better(model: DiffusionModel, images: torch.Tensor) -> None:
    errors = [
        reconstruct(model, images, PROMPTS, 6, Inverter("fixed_point", count)).error.max()
        for count in (1, 4, 12)
    ]
    assert errors[0] > errors[1] > errors[2]
    naive = reconstruct(model, images, PROMPTS, 6, Inverter("ddim")).error.max()
    assert_close(naive, errors[0])


def test_an_image_is_reconstructed_alone_as_in_a_batch(
    model: DiffusionModel, images: torch.Tensor
) -> None:
    inverter = Inverter("anderson", 4)
    together = reconstruct(model, images, PROMPTS, 4, inverter, 2.0, 1.0)
    alone = reconstruct(model, images, PROMPTS, 4, inverter, 2.0, 1.0, batch_size=1)
    assert_close(together.noise, alone.noise, rtol=0, atol=1e-3)
    assert_close(together.images, alone.images, rtol=0, atol=1e-3)


def test_what_cannot_be_reconstructed_is_refused(
    model: DiffusionModel, images: torch.Tensor
) -> None:
    with pytest.raises(UserError, match="width=15 must be a positive multiple"):
        reconstruct(model, images[..., :15], PROMPTS)
    with pytest.raises(UserError, match="3 images and 1 prompts"):
        reconstruct(model, images, ["a"])
    with pytest.raises(UserError, match="BDIA is exact for one denoiser"):
        reconstruct(model, images, PROMPTS, guidance_scale=3.0)
    with pytest.raises(UserError, match="num_steps=1: BDIA walks pairs"):
        reconstruct(model, images, PROMPTS, num_steps=1)
