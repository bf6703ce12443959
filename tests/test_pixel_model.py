"""Pixel-space models: what they are built of, what they are told, and that diffusers runs them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.export.export import export
from blackpoint.sampling.export.verify import check_against_diffusers
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.noise import initial_noise
from tests.pixel_models import CLASSES, UVIT, pixel_model

CONDITIONS = ("none", "class", "text")
PROMPTS = {"none": "", "class": CLASSES[1], "text": "a white background"}


def nonzero(model: DiffusionModel) -> DiffusionModel:
    """Replaces the zeros that a model starts from: they would hide what it is told."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.unet.parameters():
        weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("changes", [{}, UVIT, {"codec": "wavelet"}], ids=["unet", "uvit", "dwt"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_saved_model_is_the_same_here_and_in_diffusers(
    condition: str, changes: dict[str, Any], pipeline: Path, tmp_path: Path
) -> None:
    model = nonzero(pixel_model(condition, pipeline, **changes))
    prompt = PROMPTS[condition]
    settings: dict[str, Any] = {"num_steps": 4, "guidance_scale": 2.0, "guidance_rescale": 0.5}
    images = model.sample([prompt, ""], seeds=[3, 4], **settings)
    assert images.shape == (2, 3, 16, 16) and images.std() > 0.01
    model.save(tmp_path / "saved")
    again = DiffusionModel.load(tmp_path / "saved")
    assert again.pixels == model.pixels
    assert_close(again.sample([prompt, ""], seeds=[3, 4], **settings), images, rtol=0, atol=1e-5)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    theirs = pipe(
        [prompt, ""],
        num_inference_steps=4,
        guidance_scale=2.0,
        guidance_rescale=0.5,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in (3, 4)],
        output_type="np",
    ).images
    assert_close(torch.from_numpy(theirs).permute(0, 3, 1, 2), images, rtol=0, atol=1e-4)
    check_against_diffusers(again, tmp_path / "saved")


def test_export_writes_the_pipeline_beside_the_weights(tmp_path: Path) -> None:
    nonzero(pixel_model("class")).save(tmp_path / "saved")
    folder = export(tmp_path / "saved", tmp_path / "out")
    assert {"pixel_pipeline.py", "pixel_codec.py"} <= {path.name for path in folder.iterdir()}
    index = json.loads((folder / "model_index.json").read_text())
    assert index["classes"] == CLASSES and index["_class_name"][1] == "PixelPipeline"
    card = (folder / "README.md").read_text()
    assert "trust_remote_code=True" in card and "StableDiffusionPipeline" not in card


def test_the_condition_changes_the_picture_and_the_empty_one_does_not_know_it() -> None:
    model = nonzero(pixel_model("class"))
    noise = initial_noise([0] * 4, model.latent_shape())
    condition = model.encode_prompts([*CLASSES, ""])
    assert condition.class_labels is not None
    assert condition.class_labels.tolist() == [0, 1, 2, 3]
    outputs = model.network(noise, torch.full((4,), 500), condition)
    distances = torch.pdist(outputs.flatten(1))
    assert (distances > 1e-3).all()


def test_guidance_costs_an_unconditional_model_nothing() -> None:
    model = pixel_model("none")
    rows: list[int] = []
    model.unet.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    model.sample("", seeds=[0, 1], num_steps=3, guidance_scale=7.5)
    assert rows == [2, 2, 2]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [("class", "is not one of the 3 classes of this model: a black"), ("none", "unconditional")],
)
def test_prompts_that_mean_nothing_to_the_model_are_refused(condition: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        pixel_model(condition).sample("a dog", seeds=[0], num_steps=2)


def test_depth_is_added_at_the_lowest_level_alone() -> None:
    """Blocks of the higher levels stay as they are when the last number of `blocks` grows."""

    def resnets(blocks: list[int]) -> list[int]:
        unet = pixel_model("none", blocks=blocks).unet
        levels = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
        return [sum(isinstance(m, ResnetBlock2D) for m in level.modules()) for level in levels]

    # The down path has n blocks a level, the middle 2 around its attention, the up path n + 1.
    assert resnets([1, 2]) == [1, 2, 2, 3, 2]
    assert resnets([1, 8]) == [1, 8, 2, 9, 2]


def test_a_u_vit_has_its_transformer_at_the_low_level() -> None:
    unet = pixel_model("none", **UVIT).unet
    levels = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    depths = [
        sum(isinstance(m, BasicTransformerBlock) for m in level.modules()) for level in levels
    ]
    assert depths == [0, 3, 3, 6, 0]


def test_a_new_model_predicts_nothing() -> None:
    """Its branches, and its last convolution, start at zero."""
    model = pixel_model("none")
    noise = initial_noise([0], model.latent_shape())
    output = model.network(noise, torch.tensor([3]), model.encode_prompts([""]))
    assert not output.any()


def test_the_same_seed_builds_the_same_model_whatever_was_drawn_before() -> None:
    first = pixel_model("none").unet.state_dict()
    torch.randn(17)
    assert_close(dict(pixel_model("none").unet.state_dict()), dict(first), rtol=0, atol=0)
    other = pixel_model("none", seed=1).unet.state_dict()
    assert not torch.equal(other["conv_in.weight"], first["conv_in.weight"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"channels": [8, 32]}, "narrower than the 12 channels of 2 x 2 pixels"),
        ({"patch": 3}, "model.patch=3: must be a power of two"),
        ({"blocks": [1]}, "model.blocks=.1.: must have one number for each of the 2 levels"),
        ({"blocks": [0, 1]}, "must be at least 1 at every level"),
        ({"transformer_blocks": [0, 1, 1]}, "model.transformer_blocks=.* 2 levels"),
        ({"head_channels": 24}, "does not divide the width 32"),
        ({"classes": ["cat"]}, "classes belong to condition=class"),
        ({"condition": "class"}, "classes belong to condition=class, which needs them"),
        ({"condition": "class", "classes": ["a", "a"]}, "names must differ"),
        ({"condition": "text"}, "a text encoder belongs to condition=text, which needs one"),
    ],
)
def test_models_that_cannot_be_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        pixel_model("none", **changes)


def test_sizes_that_the_model_cannot_take_are_refused(pipeline: Path) -> None:
    from blackpoint.train.pixel_model import build_pixel_model

    model = pixel_model("none")
    with pytest.raises(UserError, match="height=18 must be a positive multiple of 4 px"):
        model.sample("", seeds=[0], height=18)
    with pytest.raises(UserError, match="data.resolution=18: must be a multiple of 4 px"):
        from tests.pixel_models import model_config

        build_pixel_model(model_config("none"), 18, model.process)


def test_a_codec_that_is_not_known_is_refused(tmp_path: Path) -> None:
    pixel_model("none").save(tmp_path / "saved")
    path = tmp_path / "saved" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"codec": "dct"}))
    with pytest.raises(UserError, match="names no codec that is known here .codec=dct"):
        DiffusionModel.load(tmp_path / "saved")
