"""Luminance: PIL's gray conversion everywhere, the outer two rows and columns, named in indexes."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from blackpoint.data.check.check import CheckConfig, check
from blackpoint.data.images.luminance import REC_601, REC_709
from blackpoint.data.images.luminance import luminance as picture_luminance
from blackpoint.data.index.contents import INDEX_FOLDER
from blackpoint.data.index.index import Index, IndexWriter
from blackpoint.data.record import ShardRecords, Span
from blackpoint.data.work.part import Part, part_path, read_part, write_part
from blackpoint.sampling.pixels.luminance import border_luminance, image_luminance, luminance
from tests.tiny_run import make_tiny_shards


def test_luminance_is_that_of_pil() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(9, 7, 3), dtype=np.uint8)
    gray = (
        torch.from_numpy(np.asarray(Image.fromarray(pixels).convert("L")).astype(np.float32)) / 255
    )
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    assert_close(luminance(images)[0], gray, atol=1 / 255, rtol=0)


def test_training_data_and_evaluations_measure_the_same() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(9, 7, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].double() / 255
    measured = picture_luminance(Image.fromarray(pixels))
    assert measured == pytest.approx(image_luminance(images).item(), abs=1e-12)


def test_border_is_the_outer_two_rows_and_columns() -> None:
    images = torch.ones(1, 3, 8, 8)
    images[..., 2:-2, 2:-2] = 0
    assert border_luminance(images).item() == 1
    assert image_luminance(images).item() == 1 - 16 / 64
    assert border_luminance(1 - images).item() == 0


def test_the_inside_does_not_touch_the_border() -> None:
    images = torch.full((5, 3, 64, 64), 0.25)
    images[..., 4:-4, 4:-4] = torch.rand(5, 3, 56, 56)
    assert_close(border_luminance(images), torch.full((5,), 0.25), atol=1e-5, rtol=0)


def test_an_index_names_its_weights_and_one_without_a_name_has_the_earlier_ones(
    tmp_path: Path,
) -> None:
    shards = make_tiny_shards(tmp_path, 3)
    assert Index(shards).luminance_weights == REC_601
    path = shards / INDEX_FOLDER / "shards.json"
    description = json.loads(path.read_text())
    del description["luminance"]
    path.write_text(json.dumps(description))
    earlier = Index(shards)
    assert earlier.luminance_weights == REC_709
    report = check(CheckConfig(shards=str(shards), num_processes=1))
    assert report.index is not None and report.index.state == "valid"  # all else is the same
    assert report.luminance is not None and report.luminance.weights == REC_601  # measured anew


def some_records() -> ShardRecords:
    records = ShardRecords()
    records.add("key", Span(512, 3), Span(1536, 2), 8, 8, 0.5)
    return records


def test_shards_of_an_earlier_version_are_mixed_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("parts", "working", "shards"):
        (tmp_path / name).mkdir()
    shards = [tmp_path / "shards" / f"{number}.tar" for number in range(2)]
    for number, shard in enumerate(shards):
        shard.write_bytes(bytes(10240))
        part = Part(number, "digest", 10240, 1, 1, [])
        write_part(part, some_records(), tmp_path / "parts", tmp_path / "working")
    path = part_path(tmp_path / "parts", 0)
    header, rest = path.read_bytes().split(b"\n", 1)
    values = json.loads(header)
    del values["luminance_weights"]  # as before they were named
    path.write_bytes(json.dumps(values).encode() + b"\n" + rest)
    with caplog.at_level(logging.WARNING), IndexWriter(tmp_path / "shards") as writer:
        for number, shard in enumerate(shards):
            part, records = read_part(part_path(tmp_path / "parts", number))
            writer.append(shard.name, records, part.content)
        writer.close()
    assert Index(tmp_path / "shards").luminance_weights == f"{REC_601} and {REC_709}"
    assert "luminances of rec_601 and rec_709" in caplog.text
