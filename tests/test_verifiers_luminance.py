"""The luminance verifier: exact distances, targets given or read from the prompt."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.verifiers.load import VerifierConfig, load_verifier

CPU = torch.device("cpu")
unit = st.floats(0, 1, width=32)


def loaded(**fields: Any) -> Any:
    return load_verifier(VerifierConfig(kind="luminance", **fields), CPU)


@given(unit, unit, st.sampled_from(["border", "image"]))
def test_gray_images_lie_at_their_distance(gray: float, target: float, where: str) -> None:
    images = torch.full((1, 3, 6, 8), gray)
    score = loaded(target=target, where=where).score(images, ["whatever"])
    assert_close(score, torch.tensor([-abs(gray - target)]), atol=1e-5, rtol=0)


def test_the_prompt_says_what_and_where() -> None:
    images = torch.zeros(4, 3, 8, 8)
    images[..., 2:-2, 2:-2] = 1  # a quarter of the pixels
    prompts = [
        "a red three on a black background",
        "a red three on a light gray background",
        "a solid black image",
        "pure white",
    ]
    scores = loaded(batch_size=3).score(images, prompts)
    assert_close(scores, -torch.tensor([0.0, 0.75, 0.25, 0.75]))


def test_gradients_point_to_the_target() -> None:
    images = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    loaded(target=0.2, where="border").score(images, [""]).sum().backward()
    assert images.grad is not None
    assert (images.grad[..., 0, :] < 0).all() and (images.grad[..., 2:-2, 2:-2] == 0).all()


def test_a_prompt_without_luminance_needs_a_target() -> None:
    verifier = load_verifier(VerifierConfig(kind="luminance"), CPU)
    with pytest.raises(UserError, match="'a photo' names no luminance.*target from 0 to 1"):
        verifier.score(torch.zeros(1, 3, 8, 8), ["a photo"])
    given_one = load_verifier(VerifierConfig(kind="luminance", target=0.25, where="border"), CPU)
    score = given_one.score(torch.zeros(1, 3, 8, 8), ["a photo"])
    assert score.tolist() == [-0.25] and given_one.differentiable
