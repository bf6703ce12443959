"""HPSv2: open_clip's cosine on small random weights, and what a user is told who lacks a part."""

import json
import logging
import sys
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torchvision.transforms.functional as tv
from torch import Tensor
from torch.testing import assert_close
from torchvision.transforms import InterpolationMode

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.verifiers.load import VerifierConfig, load_verifier
from blackpoint.sampling.verifiers.models import hpsv2
from blackpoint.sampling.verifiers.verifier import ImageVerifier
from tests.tiny_vision import eight_bit_images, spread_out

CPU = torch.device("cpu")
SMALL = "ViT-tiny-for-tests"
PROMPTS = ["a red three", "snow at night", "a photo of a cat"]


def make_small_hpsv2(folder: Path) -> Path:
    """Random weights of a small model that open_clip is told of, as HPSv2's file holds them."""
    tower = {"width": 64, "layers": 2}
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "head_width": 32, **tower},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "heads": 2, **tower},
    }
    (folder / f"{SMALL}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{SMALL}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(SMALL)
    spread_out(model)
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, folder / "HPS.pt")
    return folder / "HPS.pt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_hpsv2(tmp_path_factory.mktemp("hpsv2"))


@pytest.fixture(scope="module")
def verifier(checkpoint: Path) -> ImageVerifier:
    return loaded(checkpoint)


@cache
def tokenizer() -> Any:
    return open_clip.get_tokenizer(SMALL)


def loaded(checkpoint: Path, **fields: Any) -> ImageVerifier:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hpsv2, "ARCHITECTURE", SMALL)
        config = VerifierConfig(kind="hpsv2", checkpoint=str(checkpoint), **fields)
        return load_verifier(config, CPU)  # type: ignore[return-value]


def directly(checkpoint: Path, images: Tensor, prompts: list[str]) -> Tensor:
    """Scores as HPSv2's own code does, image by image."""
    model = open_clip.create_model(SMALL).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    tokens, scores = tokenizer()(prompts), []
    for image, words in zip(images, tokens, strict=True):
        scale = 32 / max(image.shape[1:])
        size = [round(edge * scale) for edge in image.shape[1:]]
        pixels = tv.resize(image, size, InterpolationMode.BICUBIC, antialias=True)
        high, wide = 32 - size[0], 32 - size[1]
        pixels = tv.pad(pixels, [wide // 2, high // 2, wide - wide // 2, high - high // 2])
        mean, std = list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD)
        pixels = tv.normalize(pixels, mean, std)
        with torch.no_grad():
            answer = model(pixels[None], words[None])
        scores.append((answer[0] * answer[1]).sum())
    return torch.stack(scores)


@pytest.mark.parametrize("size", [(32, 32), (40, 56), (57, 40)])
def test_score_is_open_clips_cosine(
    checkpoint: Path, verifier: ImageVerifier, size: tuple[int, int]
) -> None:
    images = eight_bit_images(3, *size)
    expected = directly(checkpoint, images, PROMPTS)
    assert_close(verifier.score(images, PROMPTS), expected, atol=1e-5, rtol=0)
    alone = verifier.score(images[1:2], PROMPTS[1:2])
    assert_close(alone, expected[1:2], atol=1e-5, rtol=0)


def test_gradients_flow_and_weights_have_none(verifier: ImageVerifier) -> None:
    images = eight_bit_images(2, 40, 40).requires_grad_()
    verifier.score(images, PROMPTS[:2]).sum().backward()
    assert verifier.differentiable and images.grad is not None
    assert (images.grad.abs().sum(dim=1) > 0).all()
    assert not verifier.score(images.detach(), PROMPTS[:2]).requires_grad


def test_an_over_long_prompt_is_cut_and_said_once(
    checkpoint: Path, verifier: ImageVerifier, caplog: pytest.LogCaptureFixture
) -> None:
    images = eight_bit_images(2, 32, 32)
    prompt = " ".join(["snow"] * 30)
    with caplog.at_level(logging.WARNING):
        scores = verifier.score(images, [prompt, prompt])
    assert caplog.text.count("reads 16 of 32 tokens") == 1
    assert_close(scores, directly(checkpoint, images, [prompt, prompt]), atol=1e-5, rtol=0)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"kind=hpsv2 needs the package open_clip.*\[hpsv2\]"):
        load_verifier(VerifierConfig(kind="hpsv2", checkpoint="HPS.pt"), CPU)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="HPS.pt does not exist; download HPS_v2.1_compressed.pt"):
        loaded(tmp_path / "HPS.pt")


def test_weights_of_another_model_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    torch.save({"visual.proj": torch.zeros(1)}, tmp_path / "HPS.pt")
    with pytest.raises(UserError, match=f"does not hold an open_clip {SMALL}"):
        loaded(tmp_path / "HPS.pt")
