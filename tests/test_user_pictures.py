"""References, of an evaluation or an oracle, mean what the same files mean in training."""

import ast
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blackpoint.data.files.errors import UserError
from blackpoint.data.images.decode import decode
from blackpoint.sampling.evaluation.metrics import reference_set
from blackpoint.sampling.evaluation.metrics.reference_set import Reference
from blackpoint.sampling.evaluation.metrics.set_models import read_reference
from blackpoint.sampling.runtime.pictures import read_picture, to_picture
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.folder import SETTINGS, check_folder, decoder_note
from blackpoint.sampling.verifiers.load import VerifierConfig
from blackpoint.sampling.verifiers.reference import picture_features, reference_pictures
from tests.data_images import encoded, picture
from tests.icc_profiles import ADOBE_RGB, gamma, rgb_profile
from tests.test_imports import MODULES, relative

SIDE = 16
OPEN_WHAT_WE_WROTE = {
    "data/images/decode.py",
    "sampling/evaluation/image_rows.py",
    "sampling/report/page.py",
    "scripts/miniature/demo_steps.py",
    "scripts/show/search.py",
    "scripts/studies/black_point_study.py",
    "scripts/studies/pixel_study.py",
    "scripts/studies/training_curves.py",
    # the header alone, of the formats that the decoder takes
    "data/images/pictures.py",
    # what other trainers do, to be timed
    "scripts/bench/accelerate.py",
    "scripts/bench/reader.py",
}


def unusual() -> dict[str, bytes]:
    """Pictures that `Image.open(...).convert("RGB")` shows otherwise than a viewer does."""
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    palette = Image.new("P", (SIDE, SIDE), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    adobe = rgb_profile(ADOBE_RGB, gamma(2.2))
    return {
        "deep.png": encoded(Image.fromarray(np.full((SIDE, SIDE), 32_896, np.uint16))),
        "deep.tif": encoded(Image.fromarray(np.full((SIDE, SIDE), 9_000, np.uint16)), "TIFF"),
        "clear.png": encoded(clear),
        "clear.webp": encoded(clear, "WEBP", lossless=True),
        "palette.png": encoded(palette, transparency=0),
        "turned.jpg": encoded(picture(1, (SIDE, SIDE)), "JPEG", exif=exif),
        "adobe.png": encoded(picture(2, (SIDE, SIDE)), icc_profile=adobe),
        "inks.jpg": encoded(Image.new("CMYK", (SIDE, SIDE), (0, 255, 0, 0)), "JPEG"),
        "small.avif": encoded(picture(3, (SIDE, SIDE)), "AVIF"),
    }


@pytest.mark.parametrize("name", unusual())
def test_a_reference_is_decoded_as_in_training(name: str, tmp_path: Path) -> None:
    content = unusual()[name]
    (tmp_path / name).write_bytes(content)
    expected = torch.from_numpy(np.asarray(decode(content)).copy()).permute(2, 0, 1)
    pixels, is_other = read_reference(tmp_path / name, SIDE, SIDE)
    assert not is_other and torch.equal(pixels[0], expected)
    torch.testing.assert_close(read_picture(tmp_path / name), expected / 255)


def test_brightness_of_unusual_references(tmp_path: Path) -> None:
    for name, content in unusual().items():
        (tmp_path / name).write_bytes(content)
    means = {name: float(read_picture(tmp_path / name).mean()) for name in unusual()}
    assert means["deep.png"] == pytest.approx(128 / 255) and means["clear.png"] == 1
    assert means["palette.png"] == 1


def test_hidden_files_and_other_formats_of_a_reference(tmp_path: Path) -> None:
    for name, content in unusual().items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"._{name}").write_bytes(b"\0\5\26\7 Mac OS X")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._deep.png").write_bytes(b"\0\5\26\7 Mac OS X")
    files = reference_pictures(str(tmp_path))
    assert [file.name for file in files] == sorted(unusual())
    rows = picture_features(files, lambda images: images.mean(dim=(2, 3)))
    assert rows.shape == (len(files), 3)


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder / "private"))

    monkeypatch.setattr("blackpoint.sampling.verifiers.reference.picture_files", refuse)
    with pytest.raises(UserError, match="reference=.*private can't be read .Permission denied."):
        reference_pictures(str(tmp_path))


def test_our_own_pictures_come_back_as_they_were_written(tmp_path: Path) -> None:
    image = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0))
    to_picture(image).save(tmp_path / "one.png")
    levels = (255 * image).round() / 255
    torch.testing.assert_close(read_picture(tmp_path / "one.png"), levels)


def opens_pictures(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "Image.open":
            return True
        names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        if {"read_image", "decode_image", "imread"} & set(names):
            return True
    return False


def test_pictures_of_a_user_are_opened_by_one_decoder() -> None:
    assert {relative(path) for path in MODULES if opens_pictures(path)} == OPEN_WHAT_WE_WROTE


def measured(folder: Path, kept: Path) -> Reference:
    """Measures the luminance of references, as an evaluation without features does."""
    return reference_set.measure_reference(str(folder), kept, None, None, (SIDE, SIDE), 16)


@pytest.mark.parametrize("is_unusual", [True, False])
def test_references_of_an_earlier_decoder_are_measured_anew_and_named_once(
    is_unusual: bool, tmp_path: Path
) -> None:
    folder, kept = tmp_path / "real", tmp_path / "kept"
    folder.mkdir()
    kept.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(encoded(picture(number, (SIDE, SIDE))))
    if is_unusual:
        (folder / "clear.png").write_bytes(unusual()["clear.png"])
    files = reference_pictures(str(folder))
    true = measured(folder, tmp_path / "elsewhere")
    before = true.luminance.copy()
    before[[file.name == "clear.png" for file in files]] = 0  # transparent was black
    digest = reference_set._digest(files, (SIDE, SIDE), None, None)
    earlier = dataclasses.replace(true, luminance=before)
    (kept / f"{digest}.npz").write_bytes(reference_set._packed(earlier))
    first, second = measured(folder, kept), measured(folder, kept)
    for found in (first, second):
        np.testing.assert_array_equal(found.luminance, true.luminance)
    told = [bool(found.notes(SIDE, SIDE, len(files))) for found in (first, second)]
    assert told == [is_unusual, False]


def oracle_config(output: Path, reference: Path) -> SearchConfig:
    oracle = VerifierConfig(kind="oracle", module="a:b", reference=str(reference))
    return SearchConfig(
        checkpoint="none",
        prompts=["x"],
        output=str(output),
        budget_nfe=8,
        verifiers={"set": oracle},
    )


def test_a_search_from_before_the_decoder_is_told_once(tmp_path: Path) -> None:
    config = oracle_config(tmp_path / "out", tmp_path / "real")
    (tmp_path / "out").mkdir()
    settings = check_folder(config, tmp_path / "out", [])
    assert not decoder_note(config, tmp_path / "out")  # new
    path = tmp_path / "out" / SETTINGS
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "decoder"}))
    assert check_folder(config, tmp_path / "out", []) == settings
    assert "decoded as training images" in decoder_note(config, tmp_path / "out")
    path.write_text(json.dumps(settings))
    assert check_folder(config, tmp_path / "out", []) == settings
    assert not decoder_note(config, tmp_path / "out")
    statistics = oracle_config(tmp_path / "other", tmp_path / "real.safetensors")
    assert "decoder" not in check_folder(statistics, tmp_path / "other", [])
