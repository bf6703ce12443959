"""Laws of the choice among several captions: a function of (seed, epoch, index), on any path."""

import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.data.identity import identity
from blackpoint.data.images.decode import BadImage
from blackpoint.data.index.index import INDEX_FOLDER, Index, build_index
from blackpoint.data.latents import LatentReader
from blackpoint.data.shards.listing import find_shards
from blackpoint.data.transform import caption_number, draw
from blackpoint.sampling.model import DiffusionModel
from tests.packed_captions import captions_of, packed, reader_of, write_images
from tests.tiny_encode import encoded
from tests.tiny_pipeline import make_tiny_pipeline

NUM_IMAGES = 6


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "sd")


def write_shards(folder: Path, captions: dict[int, list[str]], name: str = "shards") -> Path:
    """Packs images, those in `captions` with several captions and the others with one."""
    write_images(folder / f"{name}_in", [f"{n}.png" for n in range(NUM_IMAGES)])
    for number in range(NUM_IMAGES):
        text = "\n".join(captions.get(number, [f"image {number}"]))
        (folder / f"{name}_in" / f"{number}.txt").write_text(text)
    packed(folder / f"{name}_in", folder / name, caption_lines=True)
    return folder / name


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    captions = {1: ["one cat", "two cats", "three cats"], 4: ["a dog", "a large dog"]}
    return write_shards(tmp_path_factory.mktemp("images"), captions)


def test_the_choice_is_uniform_and_leaves_other_draws_alone() -> None:
    chosen = [caption_number(3, epoch, index, 3) for epoch in range(100) for index in range(30)]
    counts = Counter(chosen)
    expected = len(chosen) / 3
    # 13.8 is the .999 quantile of chi-squared with 2 degrees of freedom.
    assert sum((counts[n] - expected) ** 2 / expected for n in range(3)) < 13.8
    assert {caption_number(3, epoch, 5, 1) for epoch in range(50)} == {0}
    dropouts = np.array([draw(3, e, i).caption_dropout for e in range(100) for i in range(30)])
    assert abs(np.corrcoef(dropouts, chosen)[0, 1]) < 4 / len(chosen) ** 0.5
    assert chosen != [caption_number(4, epoch, i, 3) for epoch in range(100) for i in range(30)]


def test_draws_of_one_caption_are_as_they_were(shards: Path, tmp_path: Path) -> None:
    """Other samples get what they would get if none had several captions."""
    single = write_shards(tmp_path, {})
    several, plain = (
        reader_of(folder, flip=True, caption_dropout=0.5) for folder in (shards, single)
    )
    for position in range(5 * NUM_IMAGES):
        place = plain.place(position)
        assert several.place(position) == place
        (view, caption), (expected, text) = (
            reader.read(place.epoch, place.index, training=True) for reader in (several, plain)
        )
        assert (view.pixels == expected.pixels).all() and view.size == expected.size
        assert bool(caption) == bool(text)
        if place.index not in (1, 4):
            assert caption == text


def test_each_epoch_draws_one_caption_and_validation_the_first(shards: Path) -> None:
    reader = reader_of(shards)
    drawn = [reader.read(epoch, 1, training=True)[1] for epoch in range(30)]
    assert set(drawn) == {"one cat", "two cats", "three cats"}
    assert drawn == [reader.read(epoch, 1, training=True)[1] for epoch in range(30)]
    assert {reader.read(epoch, 1, training=False)[1] for epoch in range(9)} == {"one cat"}
    batches = [reader.batch(range(n * 4, n * 4 + 4))["caption"] for n in range(6)]
    assert sum(batches, []) == reader.batch(range(24))["caption"]


def latents_of(folder: Path, **options: Any) -> LatentReader:
    options = {"seed": 0, "resolution": 16} | options
    return LatentReader(Index(folder), find_shards(str(folder)), **options)


def test_the_cache_holds_all_captions_and_training_draws_the_same(
    shards: Path, pipeline: Path, tmp_path: Path
) -> None:
    encoded(shards, pipeline, tmp_path / "out", dtype="float32")
    assert captions_of(tmp_path / "out") == captions_of(shards)
    options = {"resolution": 16, "caption_dropout": 0.3, "crop": "center"}
    cached, images = latents_of(tmp_path / "out", **options), reader_of(shards, **options)
    model = DiffusionModel.load(pipeline)
    for first in range(0, 48, 6):
        ours, theirs = cached.batch(range(first, first + 6)), images.batch(range(first, first + 6))
        assert (ours["caption"], ours["key"]) == (theirs["caption"], theirs["key"])
        expected = model.encode_prompts(theirs["caption"]).prompt_embeds
        assert_close(ours["prompt_embeds"], expected, rtol=1e-4, atol=1e-5)
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        assert [name for name in tar.getnames() if name.startswith("1.")] == [
            "1.safetensors",
            "1.json",
        ]


def test_a_cache_of_single_captions_is_as_it_was(pipeline: Path, tmp_path: Path) -> None:
    """Samples with one caption are stored alike, whatever their neighbours have."""
    single = write_shards(tmp_path, {}, "single")
    several = write_shards(tmp_path, {3: ["x", "y"]}, "several")
    for folder in (single, several):
        # Alone in a batch, no sample's last bits depend on its neighbours.
        encoded(folder, pipeline, tmp_path / f"{folder.name}_out", batch_size=1)
    ours, plain = latents_of(tmp_path / "several_out"), latents_of(tmp_path / "single_out")
    for number in range(NUM_IMAGES):
        same = ours.members(number) == plain.members(number)
        assert same == (number != 3)


def test_any_of_several_captions_that_changes_is_another_content(
    shards: Path, pipeline: Path, tmp_path: Path
) -> None:
    """Of the same length: by sizes and places alone nothing has changed."""
    captions = {1: ["one cat", "two cats", "three cats"], 4: ["a dog", "a large dog"]}
    index, paths = Index(shards), find_shards(str(shards))
    encoded(shards, pipeline, tmp_path / "out")
    for number, place in ((1, 0), (1, 2), (4, 1)):
        other = {n: list(texts) for n, texts in captions.items()}
        other[number][place] = other[number][place][:-1] + "?"
        folder = write_shards(tmp_path, other, f"changed_{number}_{place}")
        assert Index(folder).places_digest(paths) == index.places_digest(paths)
        assert Index(folder).content_digest(paths) != index.content_digest(paths)
        assert identity(reader_of(folder)) != identity(reader_of(shards))
        with pytest.raises(UserError, match="source_digest"):
            encoded(folder, pipeline, tmp_path / "out")


def test_latents_of_another_number_of_captions_are_bad(
    shards: Path, pipeline: Path, tmp_path: Path
) -> None:
    encoded(shards, pipeline, tmp_path / "out", samples_per_shard=50)
    reader = latents_of(tmp_path / "out")
    content, captions = reader.members(1)
    reader.members = lambda index: (content, captions[:2])  # type: ignore[method-assign]
    with pytest.raises(BadImage, match="prompt_embeds"):
        reader.read(0, 1, training=True)


def test_an_index_of_before_is_still_read(shards: Path, tmp_path: Path) -> None:
    """Shards whose captions are the "caption" of a .json, as img2dataset writes them."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        source = shards.parent / "shards_in"
        (tmp_path / "0.json").write_text('{"caption": "said"}')
        tar.add(source / "0.png", "0.png")
        tar.add(tmp_path / "0.json", "0.json")
    assert build_index(tmp_path) == []
    description = (tmp_path / INDEX_FOLDER / "shards.json").read_text()
    assert "key" not in description
    assert reader_of(tmp_path).members(0)[1] == ("said",)
