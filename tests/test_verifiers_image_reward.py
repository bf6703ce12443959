"""ImageReward: the published file's names and formula, on a small random BLIP of transformers."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.verifiers.load import VerifierConfig, load_verifier
from blackpoint.sampling.verifiers.models.image_reward import MAX_TOKENS, MEAN, STD
from blackpoint.sampling.verifiers.models.preprocessing import CLIP_MEAN, CLIP_STD
from tests.tiny_vision import eight_bit_images, spread_out

CPU = torch.device("cpu")
WIDTH, TEXT_WIDTH, IMAGE_PX = 128, 32, 32
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "three", "snow", "night"]
PROMPTS = ["a red three", "snow", "a night"]
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": TEXT_WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "model_type": "bert",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": len(WORDS),
    "encoder_width": 768,
    "add_cross_attention": True,
}


def towers() -> tuple[Any, Any, nn.Sequential]:
    """A small BLIP and the head, with random weights."""
    torch.manual_seed(0)
    vision: Any = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_PX,
            patch_size=8,
            layer_norm_eps=1e-6,
        )
    )
    text: Any = BlipTextModel(
        BlipTextConfig(
            hidden_size=TEXT_WIDTH,
            encoder_hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=40,
            vocab_size=len(WORDS),
            is_decoder=True,
        ),
        add_pooling_layer=False,
    )
    head = nn.Sequential(nn.Linear(TEXT_WIDTH, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    for part in (vision, text, head):
        spread_out(part)
        part.eval()
    return vision, text, head


def published(vision: Any, text: Any, head: nn.Sequential) -> dict[str, Tensor]:
    """The weights under the names that ImageReward.pt has."""
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "encoder.layers": "blocks",
        "self_attn.projection": "attn.proj",
        "self_attn": "attn",
        "layer_norm": "norm",
        "post_layernorm": "norm",
    }
    state = {}
    for name, weight in vision.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[f"blip.visual_encoder.{name}"] = weight
    state |= {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    state |= {f"mlp.layers.{name}": value for name, value in head.state_dict().items()}
    beside = {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    return state | beside | {"blip.vision_proj.weight": torch.zeros(3, WIDTH)}


def make_small_image_reward(folder: Path) -> Path:
    """Writes the files of ImageReward, of a small random BLIP."""
    torch.save(published(*towers()), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_image_reward(tmp_path_factory.mktemp("image_reward"))


def loaded(folder: Path, **fields: Any) -> Any:
    config = VerifierConfig(kind="image_reward", checkpoint=str(folder), **fields)
    return load_verifier(config, CPU)


def directly(folder: Path, images: Tensor, prompts: list[str]) -> Tensor:
    """The published formula with transformers' classes, one image at a time."""
    vision, text, head = towers()
    tokenizer: Any = BertTokenizer.from_pretrained(folder)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    rewards = []
    for image, prompt in zip(images, prompts, strict=True):
        tokens = tokenizer(
            prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        )
        with torch.no_grad():
            seen = vision(pixel_values=((image - mean) / std)[None]).last_hidden_state
            read = text(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(1, seen.shape[1], dtype=torch.long),
            )
            rewards.append((head(read.last_hidden_state[:, 0])[0, 0] - MEAN) / STD)
    return torch.stack(rewards)


def test_score_is_the_reward_of_the_published_formula(folder: Path) -> None:
    images = eight_bit_images(3, IMAGE_PX, IMAGE_PX)
    expected = directly(folder, images, PROMPTS)
    assert expected.std() > 1e-3
    assert_close(loaded(folder).score(images, PROMPTS), expected, atol=1e-4, rtol=0)
    apart = loaded(folder, batch_size=1, base=str(folder)).score(images, PROMPTS)
    assert_close(apart, expected, atol=1e-4, rtol=0)


def test_the_prompt_is_read(folder: Path) -> None:
    images = eight_bit_images(1, IMAGE_PX, IMAGE_PX).expand(3, -1, -1, -1)
    scores = loaded(folder).score(images, PROMPTS)
    assert len({round(score, 4) for score in scores.tolist()}) == 3


def test_gradients_flow_to_the_images(folder: Path) -> None:
    images = eight_bit_images(2, 40, 40).requires_grad_()
    verifier = loaded(folder)
    verifier.score(images, PROMPTS[:2]).sum().backward()
    assert verifier.differentiable and images.grad is not None
    assert (images.grad.abs().sum(dim=1) > 0).all()
    assert not verifier.score(images.detach(), PROMPTS[:2]).requires_grad


def test_an_over_long_prompt_is_cut_and_said_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, prompt = eight_bit_images(2, IMAGE_PX, IMAGE_PX), "snow " * 50
    verifier = loaded(folder)
    with caplog.at_level(logging.WARNING):
        scores = [verifier.score(images, [prompt] * 2) for _ in range(2)]
    assert caplog.text.count(f"reads {MAX_TOKENS} of 52 tokens") == 1
    expected = directly(folder, images, [prompt] * 2)
    assert_close(scores[0], expected, atol=1e-4, rtol=0)


def test_what_is_missing_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="med_config.json does not exist; download THUDM"):
        loaded(tmp_path)
    (tmp_path / "med_config.json").write_text(json.dumps(MED_CONFIG))
    with pytest.raises(UserError, match="ImageReward.pt does not exist; download THUDM"):
        loaded(tmp_path)
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    torch.save(state, tmp_path / "ImageReward.pt")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="base=google-bert/bert-base-uncased is not a local folder"):
        loaded(tmp_path)
    with pytest.raises(UserError, match="its tokenizer is missing; tokenizer.json or vocab.txt"):
        loaded(tmp_path, base=str(tmp_path))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    state.pop("blip.visual_encoder.norm.weight")
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match="does not hold an ImageReward model.*post_layernorm"):
        loaded(tmp_path)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match="does not hold an ImageReward model"):
        loaded(tmp_path)
