"""Laws of decoding and of the transform."""

from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from blackpoint.data.images.decode import BadImage, decode
from blackpoint.data.images.luminance import luminance
from blackpoint.data.transform import CENTER, crop_box, draw, transform
from tests.data_images import encoded, picture, png_of_size


def pixel(image: Image.Image) -> tuple[int, ...]:
    return tuple(np.asarray(image)[0, 0].tolist())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_shows_the_same_picture(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encoded(picture(0), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(BytesIO(stored)))
    np.testing.assert_array_equal(np.asarray(decode(stored)), np.asarray(expected))


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert pixel(decode(encoded(clear))) == (255, 255, 255)
    assert pixel(decode(encoded(half))) == (127, 127, 127)
    assert pixel(decode(encoded(palette, transparency=0))) == (255, 255, 255)
    assert pixel(decode(encoded(palette))) == (0, 0, 0)
    assert pixel(decode(encoded(Image.new("RGB", (4, 4)), transparency=(0, 0, 0)))) == (255,) * 3


@pytest.mark.parametrize("value", [0, 1, 40_000, 65_535])
def test_16_bit_gray_keeps_its_brightness(value: int) -> None:
    image = Image.fromarray(np.full((4, 4), value, np.uint16))
    for form in ("PNG", "TIFF"):
        assert pixel(decode(encoded(image, form))) == (value // 256,) * 3


def test_cmyk_gray_and_one_bit_become_rgb() -> None:
    assert pixel(decode(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))) == (255,) * 3
    assert pixel(decode(encoded(Image.new("L", (4, 4), 77)))) == (77,) * 3
    assert pixel(decode(encoded(Image.new("1", (4, 4), 1)))) == (255,) * 3
    assert decode(encoded(picture(0))).mode == "RGB"


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    stored = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixel(decode(stored)) == (255, 0, 0)


@pytest.mark.parametrize("length", [0, 1, 8, 40, 100, 400])
def test_truncated_bytes_have_a_reason(length: int) -> None:
    for form in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"):
        with pytest.raises(BadImage):
            decode(encoded(picture(0, (40, 40)), form)[:length])


def test_the_pixel_limit_is_the_configured_one() -> None:
    with pytest.raises(BadImage, match="bomb"):
        decode(png_of_size(30_000, 30_000))
    with pytest.raises(BadImage, match="bomb"):
        decode(encoded(picture(0)), max_image_pixels=24 * 16 - 1)
    assert decode(encoded(picture(0)), max_image_pixels=24 * 16).size == (24, 16)


@given(st.binary(max_size=300))
@settings(max_examples=50, deadline=None)
def test_any_bytes_are_an_image_or_a_bad_one(content: bytes) -> None:
    for start in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF"):
        try:
            assert decode(start + content).mode == "RGB"
        except BadImage as reason:
            assert str(reason)


def test_luminance_of_known_grays() -> None:
    for gray in (0, 64, 255):
        image = Image.new("RGB", (5, 3), (gray, gray, gray))
        assert luminance(image) == pytest.approx(gray / 255, abs=1e-9)


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(1, 600),
    st.floats(0, 0.999999),
    st.floats(0, 0.999999),
)
def test_the_crop_is_a_square_inside_the_image(
    width: int, height: int, resolution: int, crop_x: float, crop_y: float
) -> None:
    left, top, right, bottom = crop_box(width, height, (resolution, resolution), crop_x, crop_y)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    # Square up to the rounding of the longer side to whole pixels.
    shorter = min(width, height)
    assert right - left == pytest.approx(shorter, rel=0.5 / resolution + 1e-9)
    assert bottom - top == pytest.approx(shorter, rel=0.5 / resolution + 1e-9)


def test_resizing_the_crop_equals_cropping_the_resized() -> None:
    image = picture(3, (120, 80))
    whole = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC))
    for crop_x in (0.0, 0.5, 0.99):
        left = int(crop_x * 17)
        ours = transform(image, (32, 32), crop_x, 0.0, False).astype(int)
        assert np.abs(ours - whole[:, left : left + 32]).max() <= 1


def test_an_image_of_the_right_size_is_untouched() -> None:
    image = picture(0, (16, 16))
    np.testing.assert_array_equal(transform(image, (16, 16), 0.7, 0.7, False), np.asarray(image))
    np.testing.assert_array_equal(
        transform(image, (16, 16), 0, 0, True), np.asarray(image)[:, ::-1]
    )
    wide = picture(0, (24, 16))
    np.testing.assert_array_equal(
        transform(wide, (16, 16), CENTER.crop_x, CENTER.crop_y, False), np.asarray(wide)[:, 4:20]
    )


def test_draws_depend_on_seed_epoch_and_index_only() -> None:
    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(*parts) for parts in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]}) == 4
