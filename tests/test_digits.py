"""The embedded digits: known luminance, held-out digits apart, captions that tell the truth."""

import numpy as np
import pytest

from blackpoint.scripts.miniature.digits import (
    BACKGROUNDS,
    DIGIT_NAMES,
    INKS,
    caption,
    digit_samples,
    mnist_digits,
)


def test_border_is_the_background_alone() -> None:
    images, captions, _ = digit_samples(200, seed=3)
    frame = np.ones((64, 64), bool)
    frame[2:-2, 2:-2] = False
    for image, text in zip(images, captions, strict=True):
        border = image[frame]
        assert (border == border[0]).all()
        if "background" in text:
            name = text.split(" on a ")[1].removesuffix(" background")
            assert border[0].tolist() == [round(255 * BACKGROUNDS[name])] * 3


def test_backgrounds_are_drawn_evenly_and_a_third_of_captions_leave_them_open() -> None:
    images, captions, _ = digit_samples(3000, seed=0)
    luminance = images[:, 0, 0, 0] / 255
    assert luminance.std() == pytest.approx(0.3536, abs=0.01)
    is_open = np.mean(["background" not in text for text in captions])
    assert is_open == pytest.approx(1 / 3, abs=0.03)


def test_ink_never_equals_the_background() -> None:
    for image in digit_samples(500, seed=1)[0]:
        assert np.ptp(image.reshape(-1, 3), axis=0).max() > 40


def test_held_out_digits_are_apart_and_balanced() -> None:
    train, train_labels = mnist_digits("train")
    held_out, labels = mnist_digits("held_out")
    assert np.bincount(labels).tolist() == [50] * 10
    assert np.bincount(train_labels).tolist() == [450] * 10
    seen = {mask.tobytes() for mask in train}
    assert not any(mask.tobytes() in seen for mask in held_out)


def test_samples_depend_on_the_seed_alone() -> None:
    first, again, other = (digit_samples(20, seed=seed) for seed in (5, 5, 6))
    assert (first[0] == again[0]).all() and first[1] == again[1]
    assert first[1] != other[1]


def test_captions_name_ink_digit_and_background() -> None:
    for ink in INKS:
        for digit, name in enumerate(DIGIT_NAMES):
            assert caption(ink, digit, None) == f"a {ink} {name}"
            assert caption(ink, digit, "gray") == f"a {ink} {name} on a gray background"
