"""What is no text-to-image model is refused at load, named, before its weights are read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.model import DiffusionModel
from tests.pixel_models import pixel_model
from tests.tiny_pipeline import make_tiny_pipeline

THREE_LEVELS: dict[str, Any] = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}

BY_EIGHT: dict[str, Any] = {
    "block_out_channels": (8,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_pipeline(tmp_path_factory.mktemp("model") / "sd")


def edited(base: Path, folder: Path, file: str, entries: dict[str, Any]) -> Path:
    """Copies a pipeline with entries of a config changed, and its UNet's weights unreadable."""
    shutil.copytree(base, folder)
    path = folder / file
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | entries))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not read")
    return folder


UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"


@pytest.mark.parametrize("with_unet", [True, False])
@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        (UNET, {"in_channels": 9}, "an inpainting model.*in_channels=9.*text-to-image model"),
        (UNET, {"in_channels": 8}, "an instruct-pix2pix model"),
        (UNET, {"in_channels": 5}, "a depth-to-image model"),
        (UNET, {"in_channels": 7, "num_class_embeds": 1000}, "an upscaler"),
        (UNET, {"in_channels": 12}, "in_channels=12.*latents have 4 channels"),
        (UNET, {"in_channels": "4"}, "in_channels='4'.*positive number"),
        (UNET, {"out_channels": 8}, "a model of learned variance .out_channels=8"),
        (UNET, {"out_channels": 3}, "out_channels=3"),
        (UNET, {"num_class_embeds": 10}, "class-conditional .num_class_embeds=10"),
        (UNET, {"class_embed_type": "projection"}, "an unCLIP model"),
        (UNET, {"class_embed_type": "timestep"}, "class-conditional"),
        (UNET, {"addition_embed_type": "text_time"}, "a Stable Diffusion XL"),
        (UNET, {"addition_embed_type": "text", "in_channels": 3}, "a DeepFloyd IF"),
        (UNET, {"addition_embed_type": ["x"]}, "a UNet with another condition"),
        (UNET, {"encoder_hid_dim": 1024, "encoder_hid_dim_type": "image_proj"}, "image_proj"),
        (UNET, {"encoder_hid_dim": 4096}, "encoder_hid_dim=4096"),
        (UNET, {"time_cond_proj_dim": 256}, "a latent consistency model"),
        (UNET, {"cross_attention_dim": 768}, "width 768.*text encoder makes 32"),
        (UNET, {"cross_attention_dim": [32, 64]}, "of width"),
        (UNET, {"sample_size": None}, "sample_size=None.*write 64"),
        (UNET, {"sample_size": "64"}, "sample_size='64'"),
        (UNET, {"sample_size": [64]}, r"sample_size=\[64\]"),
        (UNET, {"_class_name": "UNetMotionModel"}, "unet is of class UNetMotionModel"),
        (VAE, {"_class_name": "AutoencoderTiny"}, "vae is of class AutoencoderTiny"),
        (VAE, {"latent_channels": 16}, "in_channels=4.*latents have 16 channels"),
        (VAE, {"scaling_factor": "0.18"}, "scaling_factor='0.18'"),
        (VAE, {"block_out_channels": 128}, "block_out_channels=128"),
        (VAE, {"scaling_factor": 10**400}, "scaling_factor=1000"),
        (UNET, {"cross_attention_dim": [[32]]}, r"cross_attention_dim=\[\[32\]\].*unet/config"),
        (UNET, {"cross_attention_dim": {}}, "cross_attention_dim={}.*unet/config"),
        (UNET, {"cross_attention_dim": []}, r"cross_attention_dim=\[\]"),
        (UNET, {"cross_attention_dim": None}, "cross_attention_dim=None"),
        (TEXT, {"hidden_size": [32]}, r"hidden_size=\[32\].*text_encoder/config"),
        (TEXT, {"model_type": "clip", "text_config": None}, "text_config=None.*text_encoder/conf"),
        (TEXT, {"max_position_embeddings": None}, "max_position_embeddings=None.*text_encoder/c"),
        (TEXT, {"num_hidden_layers": "2"}, "num_hidden_layers='2'.*text_encoder/config.*whole"),
        (TEXT, {"hidden_size": 1024}, "width 32.*text encoder makes 1024"),
        (TEXT, {"model_type": "t5"}, "text_encoder is of model_type t5"),
        (TEXT, {"num_hidden_layers": 10**7}, "num_hidden_layers=10000000.*at most 1000"),
        (UNET, {"layers_per_block": [2, 10**7]}, "layers_per_block=.*at most 1000"),
        (VAE, {"layers_per_block": 10**7}, "layers_per_block=.*vae/config.json must be at most"),
    ],
)
def test_what_is_no_text_to_image_model_is_named(
    base: Path, tmp_path: Path, file: str, entries: dict[str, Any], message: str, with_unet: bool
) -> None:
    folder = edited(base, tmp_path / "sd", file, entries)
    with pytest.raises(UserError, match=f"(?s){message}"):
        DiffusionModel.load(folder, with_unet=with_unet)


@pytest.mark.parametrize(
    "entries", [{"norm_num_groups": 7}, {"down_block_types": ["X"]}, {"layers_per_block": "two"}]
)
def test_a_config_that_builds_no_unet_is_refused(
    base: Path, tmp_path: Path, entries: dict[str, Any]
) -> None:
    folder = edited(base, tmp_path / "sd", UNET, entries)
    for with_unet in (True, False):
        with pytest.raises(UserError, match="unet cannot be"):
            DiffusionModel.load(folder, with_unet=with_unet)


def test_a_setting_of_the_wrong_kind_is_refused_when_the_text_encoder_is_read(
    base: Path, tmp_path: Path
) -> None:
    folder = edited(base, tmp_path / "sd", TEXT, {"hidden_act": 3})
    with pytest.raises(UserError, match="text_encoder cannot be loaded.*hidden_act"):
        DiffusionModel.load(folder, with_unet=False).load_encoders()


@pytest.mark.parametrize("content", ["[]", '"text"', "{", "\xff"])
def test_a_config_that_is_no_object_is_refused(base: Path, tmp_path: Path, content: str) -> None:
    folder = edited(base, tmp_path / "sd", UNET, {})
    (folder / UNET).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"unet/config\.json"):
        DiffusionModel.load(folder)


def test_pixel_models_keep_their_classes_and_their_channels(base: Path, tmp_path: Path) -> None:
    for condition in ("class", "text", "none"):
        folder = tmp_path / condition
        pixel_model(condition, base).save(folder)
        assert DiffusionModel.load(folder).pixels is not None
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 4}))
    with pytest.raises(UserError, match="in_channels=4.*its codec makes"):
        DiffusionModel.load(folder)


def pictures(folder: Path, **sides: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One image by StableDiffusionPipeline and by us."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a one",
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **sides,
    ).images
    settings = {"num_steps": 3, "guidance_scale": 3.0, "guidance_rescale": 0.0}
    return theirs, DiffusionModel.load(folder).sample("a one", [3], **settings, **sides)


@pytest.fixture(scope="module")
def three_levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Halves latents twice, so that sides of 9, 10 and 11 are halved unevenly."""
    scheduler = {"_class_name": "DDIMScheduler", "timestep_spacing": "leading"}
    folder = tmp_path_factory.mktemp("model") / "three"
    return make_tiny_pipeline(folder, unet=THREE_LEVELS, vae=BY_EIGHT, scheduler=scheduler)


@pytest.mark.parametrize(
    "sides", [{"height": 72, "width": 64}, {"height": 88, "width": 80}, {"height": 8, "width": 24}]
)
def test_sides_that_the_unet_cannot_halve_are_as_in_diffusers(
    three_levels: Path, sides: dict[str, int]
) -> None:
    theirs, ours = pictures(three_levels, **sides)
    assert ours.shape == (1, 3, sides["height"], sides["width"])
    assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_rectangular_model_makes_rectangles_as_in_diffusers(
    three_levels: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sd"
    shutil.copytree(three_levels, folder)
    config = folder / UNET
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": [6, 10]}))
    theirs, ours = pictures(folder)
    assert ours.shape == (1, 3, 48, 80)
    assert_close(ours, theirs, rtol=0, atol=1e-4)
    model = DiffusionModel.load(folder)
    assert model.image_sides == (48, 80) and model.image_size == 48
    model.save(tmp_path / "saved")
    assert DiffusionModel.load(tmp_path / "saved").image_sides == (48, 80)
