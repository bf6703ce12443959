"""How the embedded base is made: one token a word, and a training that continues exactly."""

from pathlib import Path

import pytest
import torch

from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.scripts.miniature.digits import BACKGROUNDS, DIGIT_NAMES, INKS, digit_samples
from blackpoint.scripts.miniature.embedded_base import (
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    encode_captions,
    encode_moments,
    train_unet,
    train_vae,
)

WORDS = " ".join(["a on background", *DIGIT_NAMES, *BACKGROUNDS, *INKS]).split()


def test_every_word_is_one_token_and_others_fall_apart(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path, WORDS)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in WORDS)
    assert len(tokenizer.tokenize("zebra")) > 1
    assert len(tokenizer("a red three on a light gray background").input_ids) <= 16


def test_autoencoder_training_lowers_its_loss_and_sets_the_scale() -> None:
    torch.manual_seed(0)
    vae = build_vae()
    losses = [loss for _, loss in train_vae(vae, digit_samples(64, 0)[0], num_steps=8, seed=0)]
    assert losses[-1] < losses[0]
    assert vae.config.scaling_factor != 0.18215


@pytest.mark.slow
def test_killed_unet_training_equals_an_unbroken_one(tmp_path: Path) -> None:
    images, captions, _ = digit_samples(16, 0)
    torch.manual_seed(0)
    moments = encode_moments(build_vae(), images)
    tokenizer = build_tokenizer(tmp_path / "tokenizer", WORDS)
    embeddings = encode_captions(build_text_encoder(tokenizer), tokenizer, ["", *captions])

    def train(name: str, stop: int | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        unet = build_unet()
        report = train_unet(
            unet,
            NoiseSchedule.scaled_linear(),
            moments,
            1.0,
            captions,
            embeddings,
            num_steps=4,
            seed=0,
            state_file=tmp_path / name,
            batch_size=2,
            save_every_steps=2,
        )
        for step, _ in report:
            if step == stop:
                break
        return unet.state_dict()

    unbroken = train("unbroken.pt", None)
    train("killed.pt", 2)
    continued = train("killed.pt", None)
    assert all(torch.equal(unbroken[key], continued[key]) for key in unbroken)
