"""What became of each picture's size on its way into a batch, against numbers worked out by hand.

Podell et al. 2023, section 2.2: the size as stored, and the crop's corner in the resized picture;
of a flipped picture in the flipped one: left becomes resized width - width - left.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageOps

from blackpoint.data.config import DataConfig
from blackpoint.data.images.picture_size import PictureSize
from blackpoint.data.module import CaptionedImages
from blackpoint.data.order.buckets import BucketsConfig
from blackpoint.data.pack.pack import PackConfig, pack
from blackpoint.data.transform import crop_box, picture_size, resized, transform
from tests.data_images import encoded, picture

# width, height; size; crop_x, crop_y, flip: original height and width, top, left, target height
# and width
BY_HAND: list[tuple[Any, ...]] = [
    # Resized to 32 x 16: left is .5 of 17 places.
    (40, 20, (16, 16), 0.5, 0.5, False, (20, 40, 0, 8, 16, 16)),
    (40, 20, (16, 16), 0.9, 0.5, False, (20, 40, 0, 15, 16, 16)),
    (40, 20, (16, 16), 0.9, 0.5, True, (20, 40, 0, 1, 16, 16)),
    # Upright: 16 x 32.
    (20, 40, (16, 16), 0.5, 0.25, True, (40, 20, 4, 0, 16, 16)),
    # Into a bucket of 32 x 8: resized to 32 x 9, two places along the height.
    (36, 10, (32, 8), 0.5, 0.5, False, (10, 36, 1, 0, 8, 32)),
    # SDXL's: 1500 x 1000 in 1216 x 832 becomes 1248 x 832, 33 places; flipped, 8 from the left.
    (1500, 1000, (1216, 832), 0.75, 0.5, False, (1000, 1500, 0, 24, 832, 1216)),
    (1500, 1000, (1216, 832), 0.75, 0.5, True, (1000, 1500, 0, 8, 832, 1216)),
    # Enlarged, and of the right size already.
    (8, 8, (16, 16), 0.9, 0.9, True, (8, 8, 0, 0, 16, 16)),
    (16, 16, (16, 16), 0.9, 0.9, True, (16, 16, 0, 0, 16, 16)),
]


@pytest.mark.parametrize("row", BY_HAND, ids=str)
def test_sizes_are_those_worked_out_by_hand(row: tuple[Any, ...]) -> None:
    *arguments, expected = row
    assert picture_size(*arguments) == PictureSize(*expected)


@given(
    st.integers(16, 60),
    st.integers(16, 60),
    st.floats(0, 0.999999),
    st.floats(0, 0.999999),
    st.booleans(),
)
def test_the_view_is_where_its_size_says(
    longer: int, shorter: int, crop_x: float, crop_y: float, flip: bool
) -> None:
    """Of a picture that need not be resized, to the pixel, mirrored whole where it is flipped."""
    image = picture(longer, (max(longer, 16), 16) if shorter % 2 else (16, longer))
    cut = (16, 16), crop_x, crop_y, flip
    size = picture_size(*image.size, *cut)
    whole = np.asarray(ImageOps.mirror(image) if flip else image)
    there = whole[size.crop_top : size.crop_top + 16, size.crop_left : size.crop_left + 16]
    np.testing.assert_array_equal(transform(image, *cut), there)


@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0, 0.999999), st.floats(0, 0.999999))
def test_the_corner_is_that_of_the_crop_in_stored_pixels(
    width: int, height: int, crop_x: float, crop_y: float
) -> None:
    size = picture_size(width, height, (64, 32), crop_x, crop_y, False)
    left, top, _, _ = crop_box(width, height, (64, 32), crop_x, crop_y)
    resized_width, resized_height = resized(width, height, (64, 32))
    assert size.crop_left == pytest.approx(left * resized_width / width)
    assert size.crop_top == pytest.approx(top * resized_height / height)


SHAPES = [(40, 20), (36, 10), (10, 36), (16, 16)]  # width, height
CENTERED = {(40, 20): (20, 40, 0, 8, 16, 16), (36, 10): (10, 36, 0, 21, 16, 16)}
CENTERED |= {(10, 36): (36, 10, 21, 0, 16, 16), (16, 16): (16, 16, 0, 0, 16, 16)}
BUCKETED = {(40, 20): (20, 40, 2, 0, 8, 24), (36, 10): (10, 36, 1, 0, 8, 32)}
BUCKETED |= {(10, 36): (36, 10, 0, 1, 32, 8), (16, 16): (16, 16, 0, 0, 16, 16)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of four shapes, packed in four shards."""
    folder = tmp_path_factory.mktemp("sizes")
    (folder / "in").mkdir()
    for number in range(12):
        shape = SHAPES[number % 4]
        path = folder / "in" / f"{number:02d}_{shape[0]}x{shape[1]}.png"
        path.write_bytes(encoded(picture(number, shape)))
        path.with_suffix(".txt").write_text("a red one")
    pack(PackConfig(str(folder / "in"), str(folder / "out"), samples_per_shard=3, num_processes=1))
    return folder / "out"


def sizes_of(shards: Path, num_batches: int, **options: Any) -> list[tuple[str, PictureSize]]:
    """Returns the shape in the key, and the size, of the samples of some training batches."""
    config = DataConfig(str(shards), resolution=16, **{"num_workers": 0, **options})
    images = CaptionedImages(config, seed=3, batch_size=2, start_sample=0)
    images.prepare_data()
    loader = iter(images.train_dataloader())
    rows = []
    for batch in (next(loader) for _ in range(num_batches)):
        for key, image, size in zip(batch["key"], batch["image"], batch["sizes"], strict=True):
            view = PictureSize(*size.tolist())
            assert (view.target_height, view.target_width) == image.shape[1:]
            rows.append((key[3:], view))
    return rows


def shape_of(name: str) -> tuple[int, int]:
    width, height = map(int, name.split("x"))
    return width, height


def test_batches_of_packed_pictures_hold_their_sizes(shards: Path) -> None:
    """36 x 10 is resized to 58 x 16: 43 places, of which 21 is the center."""
    for name, size in sizes_of(shards, 6, crop="center"):
        assert size == CENTERED[shape_of(name)]


def test_batches_of_one_bucket_hold_their_sizes(shards: Path) -> None:
    """In steps of 8 px: 40 x 20 keeps most in 24 x 8, resized to 24 x 12; 36 x 10 in 32 x 8."""
    seen = set()
    buckets = BucketsConfig(True, step_px=8)
    for name, size in sizes_of(shards, 12, crop="center", buckets=buckets):
        assert size == BUCKETED[shape_of(name)]
        seen.add(name)
    assert len(seen) == len(SHAPES)


def test_flipped_rows_mirror_those_that_are_not(shards: Path) -> None:
    """The draw of the crop is the same with and without."""
    plain, flipped = (sizes_of(shards, 12, flip=flip) for flip in (False, True))
    mirrored = 0
    for (name, size), (other, there) in zip(plain, flipped, strict=True):
        assert name == other
        width = resized(*shape_of(name), (16, 16))[0]
        opposite = size._replace(crop_left=width - 16 - size.crop_left)
        assert there in (size, opposite)
        mirrored += there != size
    assert mirrored
