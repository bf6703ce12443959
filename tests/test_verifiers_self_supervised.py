"""The self-supervised verifier: the cosine of features of a preview and of the image it became."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    BitImageProcessor,
    CLIPModel,
    ConvNextConfig,
    ConvNextImageProcessor,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ViTForImageClassification,
)

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.verifiers.load import VerifierConfig, load_verifier
from blackpoint.sampling.verifiers.models.preprocessing import load_preprocessing
from tests.tiny_vision import (
    IMAGE_PX,
    eight_bit_images,
    make_tiny_clip,
    make_tiny_vit,
    spread_out,
)

CPU = torch.device("cpu")
SIZE = {"height": IMAGE_PX, "width": IMAGE_PX}


def dinov2(folder: Path) -> Path:
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=8
    )
    model: Any = Dinov2Model(config)
    spread_out(model)
    model.save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": IMAGE_PX}, crop_size=SIZE).save_pretrained(folder)
    return folder


def convnext(folder: Path) -> Path:
    model: Any = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2))
    spread_out(model)
    model.save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": IMAGE_PX}).save_pretrained(folder)
    return folder


def directly(name: str, folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    """Returns the features that the library's own class computes."""
    kinds: dict[str, Any] = {
        "dinov2": Dinov2Model,
        "convnext": ConvNextModel,
        "clip": CLIPModel,
        "vit": ViTForImageClassification,
    }
    model = kinds[name].from_pretrained(folder).eval()
    with torch.no_grad():
        if name == "clip":
            return model.get_image_features(pixel_values=pixels).pooler_output
        if name == "vit":  # a classifier's folder has no pooler: its class token
            return model.vit(pixel_values=pixels).last_hidden_state[:, 0]
        return model(pixel_values=pixels).pooler_output


@pytest.mark.parametrize("name", ["dinov2", "convnext", "clip", "vit"])
def test_score_is_the_cosine_of_the_librarys_features(
    name: str, pipeline: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    folder = {
        "dinov2": dinov2,
        "convnext": convnext,
        "clip": lambda path: make_tiny_clip(path, pipeline / "tokenizer"),
        "vit": make_tiny_vit,
    }[name](tmp_path)
    config = VerifierConfig(kind="self_supervised", checkpoint=str(folder), batch_size=2)
    verifier = load_verifier(config, CPU)
    images, previews = eight_bit_images(3, 40, 36), eight_bit_images(3, 40, 36, seed=1)
    scores = verifier.score(images, [""] * 3, previews)
    preprocess = load_preprocessing(folder)
    rows = [directly(name, folder, preprocess(part)) for part in (images, previews)]
    expected = torch.nn.functional.cosine_similarity(*rows)
    assert_close(scores, expected, atol=1e-4, rtol=0)
    assert (scores < 0.9999).all()
    assert_close(verifier.score(images, [""] * 3, images), torch.ones(3), atol=1e-5, rtol=0)


def test_it_says_which_preview_it_wants() -> None:
    fields: Any = {"kind": "self_supervised", "module": "torch.nn:Flatten"}
    verifier = load_verifier(VerifierConfig(**fields), CPU)
    assert verifier.preview_log_snr == pytest.approx(2 * math.log(0.89 / 0.11), abs=0.005)
    assert load_verifier(VerifierConfig(**fields, preview_log_snr=1.0), CPU).preview_log_snr == 1
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    scores = verifier.score(images, ["", ""], images.detach() ** 2)
    scores.sum().backward()
    assert verifier.differentiable and images.grad is not None and images.grad.abs().sum() > 0
    for previews in (None, images[:1]):
        with pytest.raises(RunFailed, match="needs one preview per image"):
            verifier.score(images, ["", ""], previews)
    assert verifier.score(images[:0], [], images[:0]).shape == (0,)


def test_a_config_that_is_not_of_transformers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "horoscope"}')
    config = VerifierConfig(kind="self_supervised", checkpoint=str(tmp_path))
    with pytest.raises(UserError, match="config.json is not one of transformers"):
        load_verifier(config, CPU)
