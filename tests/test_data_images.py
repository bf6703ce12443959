"""Colours, transparency and formats: whatever a picture stores, the decoder gives upright sRGB."""

import logging
import shutil
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

import blackpoint.data.images.decode as decoder
from blackpoint.data.files.notes import forget
from blackpoint.data.images.decode import STORED_COLORS, BadImage, decode
from blackpoint.data.images.pictures import open_picture, picture_files
from blackpoint.data.index.index import Index, build_index
from blackpoint.data.pack.pack import PackConfig, pack
from tests.data_images import encoded, picture, png_of_size
from tests.icc_profiles import (
    ADOBE_RGB,
    DISPLAY_P3,
    SRGB,
    cmyk_profile,
    gamma,
    gray_profile,
    rgb_profile,
    srgb_curve,
)

ADOBE = rgb_profile(ADOBE_RGB, gamma(2.19921875))
P3 = rgb_profile(DISPLAY_P3, srgb_curve)
SRGB_PROFILES = {
    "by hand": rgb_profile(SRGB, srgb_curve),
    "of lcms": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    "gray": gray_profile(srgb_curve),
}


def pixel(image: Image.Image) -> tuple[int, ...]:
    return tuple(np.asarray(image)[0, 0].tolist())


def one_color(color: object, mode: str = "RGB", form: str = "PNG", **options: object) -> object:
    return pixel(decode(encoded(Image.new(mode, (8, 8), color), form, **options)))  # type: ignore[arg-type]


def srgb_of(color: tuple[int, ...], primaries: object, curve: object) -> np.ndarray:
    """Returns what a matrix profile means, clipped to sRGB, in levels, computed in float64."""
    linear = np.array([curve(level / 255) for level in color])  # type: ignore[operator]
    linear = (linear @ np.array(primaries) @ np.linalg.inv(np.array(SRGB))).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return 255 * encoded


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_a_profile_is_converted_in_every_format_that_carries_one(form: str) -> None:
    stored = one_color((200, 100, 50), form=form, quality=95)
    found = one_color((200, 100, 50), form=form, quality=95, icc_profile=ADOBE)
    expected = srgb_of(stored, ADOBE_RGB, gamma(2.19921875))  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, atol=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("color", [(9, 200, 90), (128, 128, 128), (250, 120, 110), (30, 30, 60)])
def test_colors_are_those_that_the_profile_means(color: tuple[int, ...]) -> None:
    for profile, primaries, curve in (
        (ADOBE, ADOBE_RGB, gamma(2.19921875)),
        (P3, DISPLAY_P3, srgb_curve),
    ):
        expected = srgb_of(color, primaries, curve)
        np.testing.assert_allclose(one_color(color, icc_profile=profile), expected, atol=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("profile", [ADOBE, P3, cmyk_profile(9), gray_profile(gamma(1.8))])
def test_black_stays_black_and_white_white(profile: bytes) -> None:
    kind = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}[profile[16:20]]
    low, high = Image.new(kind, (8, 8)), Image.new(kind, (8, 8))
    high.paste(255 if kind == "L" else (255,) * len(kind), (0, 0, 8, 8))
    ends = [pixel(decode(encoded(each, "TIFF", icc_profile=profile))) for each in (low, high)]
    expected = [(0,) * 3, (255,) * 3]
    assert ends == (expected[::-1] if kind == "CMYK" else expected)


@pytest.mark.parametrize("profile", SRGB_PROFILES.values(), ids=SRGB_PROFILES)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_srgb_is_decoded_bit_for_bit_as_without_its_profile(profile: bytes, form: str) -> None:
    image = picture(3, (48, 40))
    image = image.convert("L") if profile[16:20] == b"GRAY" else image
    with_profile = decode(encoded(image, form, icc_profile=profile))
    np.testing.assert_array_equal(with_profile, decode(encoded(image, form)))


def test_gray_is_converted_by_its_own_profile_and_by_one_of_rgb() -> None:
    for profile in (gray_profile(gamma(1.8)), rgb_profile(SRGB, gamma(1.8))):
        expected = srgb_of((64,) * 3, SRGB, gamma(1.8))
        np.testing.assert_allclose(one_color(64, "L", icc_profile=profile), expected, atol=1.5)  # type: ignore[arg-type]
        deep = Image.fromarray(np.full((4, 4), 64 << 8, np.uint16))
        found = pixel(decode(encoded(deep, "TIFF", icc_profile=profile)))
        np.testing.assert_allclose(found, expected, atol=1.5)


def test_inks_are_converted_by_their_profile() -> None:
    assert one_color((0, 0, 0, 255), "CMYK", "TIFF", icc_profile=cmyk_profile()) == (94, 94, 94)
    assert one_color((0, 0, 0, 255), "CMYK", "TIFF") == (0, 0, 0)


def test_lab_pixels_need_no_profile() -> None:
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    lab = to_lab.apply(Image.new("RGB", (8, 8), (180, 90, 60)))
    np.testing.assert_allclose(pixel(decode(encoded(lab, "TIFF"))), (180, 90, 60), atol=4)


def test_colors_are_converted_before_they_are_laid_on_white() -> None:
    opaque = np.array(one_color((200, 100, 50), icc_profile=ADOBE))
    found = one_color((200, 100, 50, 51), "RGBA", icc_profile=ADOBE)
    np.testing.assert_allclose(found, 0.2 * opaque + 0.8 * 255, atol=1)  # type: ignore[arg-type]
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([200, 100, 50, 255, 0, 0])
    assert pixel(decode(encoded(palette, icc_profile=ADOBE))) == tuple(opaque)
    assert pixel(decode(encoded(palette, icc_profile=ADOBE, transparency=0))) == (255,) * 3


BROKEN = {
    "no profile": b"no profile at all",
    "cut short": ADOBE[:200],
    "without curves": ADOBE.replace(b"TRC", b"XXX"),
    "all black": rgb_profile(((0, 0, 0),) * 3, gamma(2.2)),
    "of inks": cmyk_profile(),
    "of gray": gray_profile(gamma(1.8)),
}


@pytest.mark.parametrize("profile", BROKEN.values(), ids=BROKEN)
def test_a_broken_profile_is_ignored_with_one_note(
    profile: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    forget()
    image = picture(4)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found = decode(encoded(image, icc_profile=profile))
            np.testing.assert_array_equal(found, image)
    assert len(caplog.messages) == 1 and "colour profile is ignored" in caplog.messages[0]
    forget()


@given(st.sampled_from([ADOBE, P3, cmyk_profile(), gray_profile(gamma(1.8))]), st.data())
@settings(max_examples=60, deadline=None)
def test_any_damage_to_a_profile_leaves_an_image(profile: bytes, draws: st.DataObject) -> None:
    changed = bytearray(profile)
    for _ in range(draws.draw(st.integers(1, 8))):
        changed[draws.draw(st.integers(0, 400))] = draws.draw(st.integers(0, 255))
    del changed[draws.draw(st.integers(100, len(changed))) :]
    mode = {b"CMYK": "CMYK", b"GRAY": "L"}.get(profile[16:20], "RGB")
    content = encoded(Image.new(mode, (8, 8)), "TIFF", icc_profile=bytes(changed))
    assert decode(content).mode == "RGB"


def test_avif_is_packed_and_indexed_like_any_image(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.avif").write_bytes(encoded(picture(0), "AVIF"))
    (tmp_path / "source" / "a.txt").write_text("noise")
    shards = tmp_path / "shards"
    assert pack(PackConfig(str(tmp_path / "source"), str(shards))).num_samples == 1
    shutil.rmtree(shards / "index")
    assert build_index(shards) == []
    (record,) = Index(shards).records
    assert (record["width"], record["height"]) == picture(0).size


def test_the_first_decoder_takes_pixels_as_they_are_stored() -> None:
    image = picture(5)
    for profile in (ADOBE, P3):
        stored = encoded(image, icc_profile=profile)
        np.testing.assert_array_equal(decode(stored, version=STORED_COLORS), image)
        assert (np.asarray(decode(stored)) != np.asarray(image)).any()


def with_transparent_level(png: bytes, level: int) -> bytes:
    """Adds a tRNS chunk to a gray PNG."""
    content = b"tRNS" + struct.pack(">H", level)
    chunk = struct.pack(">I", 2) + content + struct.pack(">I", zlib.crc32(content))
    place = png.index(b"IDAT") - 4
    return png[:place] + chunk + png[place:]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_gray_level_may_be_transparent(kind: type) -> None:
    values = np.array([[7, 20_000 % np.iinfo(kind).max]], kind)
    png = with_transparent_level(encoded(Image.fromarray(values)), 7)
    clear, opaque = np.asarray(decode(png))[0]
    assert clear.tolist() == [255] * 3 and opaque[0] < 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_is_decoded_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture(6, (6, 4)).resize((48, 32), Image.Resampling.BICUBIC)
    found = decode(encoded(image, "AVIF", exif=exif, quality=100, subsampling="4:4:4"))
    image.getexif()[0x0112] = orientation
    expected = ImageOps.exif_transpose(image)
    assert found.size == expected.size
    np.testing.assert_allclose(np.asarray(found, int), np.asarray(expected, int), atol=12)


def test_avif_that_pillow_lacks_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(picture(0), "AVIF")
    monkeypatch.setattr(decoder, "known_formats", lambda: ("JPEG", "PNG"))
    with pytest.raises(BadImage, match=r"AVIF.*install pillow>=11\.3"):
        decode(content)


def test_pictures_of_a_folder_are_found_as_training_finds_them(tmp_path: Path) -> None:
    names = ["b.PNG", "a.tif", "deep/er/c.avif", "._b.png", ".hidden/d.png", "notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "deep" / "round").symlink_to(tmp_path)
    found = [str(path.relative_to(tmp_path)) for path in picture_files(tmp_path)]
    assert found == ["a.tif", "b.PNG", "deep/er/c.avif"]


def test_a_picture_file_is_decoded_like_a_training_image(tmp_path: Path) -> None:
    deep = encoded(Image.fromarray(np.full((4, 4), 32_896, np.uint16)))
    clear = encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))
    for content in (deep, clear):
        (tmp_path / "one.png").write_bytes(content)
        np.testing.assert_array_equal(open_picture(tmp_path / "one.png"), decode(content))
    for content in (b"", b"\0\5\26\7", png_of_size(30_000, 30_000)):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(BadImage) as caught:
            open_picture(tmp_path / "bad.png")
        assert "max_image_pixels" not in str(caught.value)  # no key where pictures are opened


def test_profiles_made_by_hand_are_whole() -> None:
    for profile in (ADOBE, P3, cmyk_profile(), *SRGB_PROFILES.values()):
        assert struct.unpack(">I", profile[:4])[0] == len(profile)
        space = ImageCms.ImageCmsProfile(BytesIO(profile)).profile.xcolor_space
        assert space.encode() == profile[16:20]
