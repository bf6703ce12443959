"""Laws of buckets: least crop, one size a batch, every sample once a pass, the same on resume."""

import itertools
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import blackpoint.train.run
from blackpoint.data.batches import TrainingBatches, ValidationBatches, even_batches
from blackpoint.data.config import DataConfig
from blackpoint.data.files.errors import UserError
from blackpoint.data.index.index import Index
from blackpoint.data.module import CaptionedImages
from blackpoint.data.order.buckets import Buckets, BucketsConfig, bucket_of, bucket_table, square
from blackpoint.data.order.order import BucketOrder
from blackpoint.data.pack.pack import PackConfig, pack
from blackpoint.data.transform import resized
from tests.data_images import encoded, picture
from tests.test_data_module import damage, samples, take
from tests.tiny_run import tiny_config

SIZES = [(24, 16), (24, 16), (16, 24), (20, 20), (40, 10), (10, 40), (64, 64)]
NUM_IMAGES = 60
ON = {"buckets": BucketsConfig(True, step_px=8)}


def write_images(folder: Path, num_images: int) -> Path:
    """Packs captioned images of several shapes."""
    source = folder / "in"
    source.mkdir(parents=True)
    for number in range(num_images):
        image = picture(number, SIZES[number % len(SIZES) if number % 3 else 0])
        (source / f"{number:04d}.png").write_bytes(encoded(image))
        (source / f"{number:04d}.txt").write_text("a red one")
    config = PackConfig(str(source), str(folder / "out"), samples_per_shard=16, num_processes=1)
    pack(config)
    return folder / "out"


@pytest.fixture(scope="module")
def rectangles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of six shapes in four shards: three sizes at 16 px."""
    return write_images(tmp_path_factory.mktemp("rectangles"), NUM_IMAGES)


def module(shards: Path, batch_size: int = 6, start: int = 0, **options: Any) -> CaptionedImages:
    config = DataConfig(str(shards), resolution=16, **{"num_workers": 0, **ON, **options})
    images = CaptionedImages(config, seed=3, batch_size=batch_size, start_sample=start)
    images.prepare_data()
    images.setup("fit")
    return images


class Counts:
    """Stands in for sorted samples: bucket b holds the samples 1000 b, 1000 b + 1, ..."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts
        self.buckets = Buckets(tuple((8 + n, 8) for n in range(len(counts))))

    def index(self, bucket: int, place: int) -> int:
        assert 0 <= place < self.counts[bucket]
        return 1000 * bucket + place


def order(counts: list[int], batch_size: int, seed: int = 0) -> BucketOrder:
    return BucketOrder(Counts(counts), seed, batch_size)  # type: ignore[arg-type]


def test_the_table_is_that_of_kohya_at_512() -> None:
    sizes = set(bucket_table(BucketsConfig(), 512, None).sizes)
    half = {(256, 768 + 64 * n) for n in range(1, 5)} | {(320, 704), (320, 768), (384, 640)}
    half |= {(448, 576)}
    assert sizes == {(512, 512)} | half | {size[::-1] for size in half}


@given(
    st.integers(64, 1100),
    st.sampled_from([8, 16, 64]),
    st.one_of(st.none(), st.floats(1, 4)),
)
@settings(max_examples=50, deadline=None)
def test_sizes_are_multiples_within_the_limits(
    resolution: int, step: int, aspect: float | None
) -> None:
    try:
        table = bucket_table(BucketsConfig(True, step, max_aspect=aspect), resolution, None)
    except UserError as error:
        assert "data.buckets: no multiples of step_px" in str(error)
        return
    for width, height in table.sizes:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert resolution / 2 <= min(width, height) and max(width, height) <= 2 * resolution
        assert aspect is None or max(width, height) <= aspect * min(width, height)
        assert (height, width) in table.sizes
    assert len(set(table.sizes)) == len(table.sizes)


@given(
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.one_of(st.none(), st.sampled_from([0.5, 1.0, 1.5, 3.0])),
    st.sampled_from([64, 128, 512]),
)
@settings(max_examples=300, deadline=None)
def test_the_bucket_is_the_least_crop_that_is_not_enlarged_too_far(
    width: int, height: int, max_upscale: float | None, resolution: int
) -> None:
    table = bucket_table(BucketsConfig(step_px=resolution // 8), resolution, max_upscale)

    def scale(size: tuple[int, int]) -> Fraction:
        return max(Fraction(size[0], width), Fraction(size[1], height))

    def kept(size: tuple[int, int]) -> Fraction:
        return Fraction(size[0] * size[1]) / (width * height * scale(size) ** 2)

    fitting = [
        size for size in table.sizes if max_upscale is None or scale(size) <= Fraction(max_upscale)
    ]
    number = bucket_of(table, width, height)
    if not fitting:
        assert number == len(table.sizes)
        return
    best = max(fitting, key=lambda size: (kept(size), size[0] * size[1], -size[0]))
    assert table.sizes[number] == best
    assert resized(width, height, best)[0] >= best[0] and resized(width, height, best)[1] >= best[1]


counts_strategy = st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(any)


@given(counts_strategy, st.integers(1, 40), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_batch_is_one_bucket_and_every_pass_holds_each_sample_once(
    counts: list[int], batch_size: int, seed: int
) -> None:
    whole = order(counts, batch_size, seed)
    num_batches = whole.start_of(2 * batch_size)  # a whole number of passes of every bucket
    assert num_batches == 2 * sum(counts)
    seen: Counter[tuple[int, int]] = Counter()
    for batch in range(num_batches):
        places = [whole.place(batch * batch_size + row) for row in range(batch_size)]
        assert len({place.index // 1000 for place in places}) == 1
        seen.update((place.epoch, place.index) for place in places)
    expected = {
        (epoch, 1000 * bucket + place)
        for bucket, count in enumerate(counts)
        for place in range(count)
        for epoch in range(2 * batch_size)
    }
    assert set(seen) == expected and set(seen.values()) == {1}


@given(counts_strategy, st.integers(1, 300), st.integers(0, 10**12))
@settings(max_examples=100, deadline=None)
def test_an_epoch_has_the_share_of_each_bucket(
    counts: list[int], batch_size: int, number: int
) -> None:
    whole = order(counts, batch_size)
    epoch = whole.epoch_of(number)
    start, stop = whole.start_of(epoch), whole.start_of(epoch + 1)
    assert start <= number < stop
    found = Counter(whole.batch(batch)[0] for batch in range(start, stop))
    for bucket, count in enumerate(counts):
        assert found[bucket] == (epoch + 1) * count // batch_size - epoch * count // batch_size
        assert abs(found[bucket] - count / batch_size) < 1


def test_the_order_is_pinned_and_differs_by_seed_and_epoch() -> None:
    def batches(seed: int, epoch: int) -> list[int]:
        whole = order([64, 32, 32], 4, seed)
        start = whole.start_of(epoch)
        return [whole.batch(batch)[0] for batch in range(start, start + 32)]

    assert batches(0, 0) != batches(0, 1) != batches(1, 0) != batches(0, 0)
    # A run resumed after an update of this code must read on in the same order.
    assert [order([64, 32, 32], 4).place(n).index for n in range(0, 32, 4)] == PINNED


PINNED = [1010, 2031, 13, 1028, 8, 39, 1007, 58]


def test_the_start_at_a_million_costs_what_the_start_costs() -> None:
    counts = [10**6 // (n + 1) for n in range(33)]

    def seconds(position: int) -> float:
        best = float("inf")
        for _ in range(20):
            whole = order_of_many(counts)
            begun = time.thread_time()  # of this thread alone, however busy the machine is
            whole.place(position)
            best = min(best, time.thread_time() - begun)
        return best

    def order_of_many(counts: list[int]) -> BucketOrder:
        whole = order(counts, 256)
        whole.samples.index = lambda bucket, place: place  # type: ignore[method-assign]
        return whole

    first = seconds(0)
    assert seconds(10**6) < 5 * first + 1e-3
    assert seconds(10**15) < 5 * first + 1e-3


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_read_what_one_reads(rectangles: Path, world_size: int) -> None:
    reader = module(rectangles)._training
    assert reader is not None
    whole = samples(take(TrainingBatches(reader, 6, 12, 0, 1), 12))
    ranks = [
        take(TrainingBatches(reader, 6, 12, rank, world_size), 12) for rank in range(world_size)
    ]
    for step in zip(*ranks, strict=True):
        assert len({tuple(batch["image"].shape) for batch in step}) == 1
    assert samples([batch for step in zip(*ranks, strict=True) for batch in step]) == whole


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_do_not_change_the_order(rectangles: Path, num_workers: int) -> None:
    alone = samples(take(module(rectangles).train_dataloader(), 8))
    loader = module(rectangles, num_workers=num_workers).train_dataloader()
    assert samples(take(loader, 8)) == alone


def test_a_resume_on_other_processes_neither_repeats_nor_drops(rectangles: Path) -> None:
    whole = samples(take(module(rectangles).train_dataloader(), 20))
    reader = module(rectangles)._training
    assert reader is not None
    begun = samples(take(TrainingBatches(reader, 6, 0, 0, 1), 7))
    ranks = [take(TrainingBatches(reader, 6, 42, rank, 2), 13) for rank in range(2)]
    resumed = samples([batch for step in zip(*ranks, strict=True) for batch in step])
    assert begun + resumed == whole
    assert len({(epoch, index) for epoch, index, *_ in whole}) == len(whole) == 120
    with pytest.raises(UserError, match="start_sample=45.*multiples of batch_size=6"):
        module(rectangles, start=45).train_dataloader()


def test_images_are_cut_to_their_bucket_and_not_enlarged_past_the_limit(rectangles: Path) -> None:
    images = module(rectangles, max_upscale=1.0, crop="center", caption_dropout=0.0)
    index = Index(rectangles)
    seen = set()
    for batch in take(images.train_dataloader(), 40):
        height, width = batch["image"].shape[2:]
        for number in batch["index"].tolist():
            record = index.record(number)
            assert width <= record["width"] and height <= record["height"]
            seen.add(number)
    table = bucket_table(ON["buckets"], 16, 1.0)
    records = index.records
    numbers = table.assign(records["width"], records["height"])
    expected = np.flatnonzero(numbers < len(table.sizes)).tolist()
    assert sorted(seen) == expected and 0 < len(expected) < NUM_IMAGES + 1


def test_the_square_crop_leaves_out_what_is_too_small_and_says_so(rectangles: Path) -> None:
    images = module(rectangles, buckets=BucketsConfig(), max_upscale=1.0, caption_dropout=0.0)
    indices = Index(rectangles).records
    large = np.flatnonzero(np.minimum(indices["width"], indices["height"]) >= 16).tolist()
    assert len(large) < NUM_IMAGES
    found = samples(take(images.train_dataloader(), len(large)))
    for epoch in range(3):
        one_pass = found[epoch * len(large) : (epoch + 1) * len(large)]
        assert sorted(index for _, index, *_ in one_pass) == large
    shapes = {batch["image"].shape[1:] for batch in take(images.train_dataloader(), 5)}
    assert shapes == {(3, 16, 16)}
    text = "\n".join(images.summary())
    assert f"left out: {NUM_IMAGES - len(large)} that would be enlarged by more than" in text
    first = int(np.flatnonzero(np.minimum(indices["width"], indices["height"]) < 16)[0])
    assert f"data.max_upscale=1: {Index(rectangles).key(first)}, " in text
    with pytest.raises(UserError, match="all of 60 images .* data.max_upscale=0.01"):
        module(rectangles, max_upscale=0.01)


def test_validation_has_batches_of_one_size_and_equally_many(rectangles: Path) -> None:
    images = module(rectangles, validation_shards=str(rectangles), validation_images=20)
    reader = images._validation
    assert reader is not None
    parts = {
        world_size: [
            ValidationBatches(reader, 20, 6, rank, world_size) for rank in range(world_size)
        ]
        for world_size in (1, 2, 3)
    }
    for world_size, ranks in parts.items():
        assert len({len(part) for part in ranks}) == 1
        batches = [batch for part in ranks for batch in take(part, 99)]
        assert all(len(batch["key"]) <= 6 // world_size for batch in batches)
        assert sorted(torch.cat([batch["index"] for batch in batches]).tolist()) == list(range(20))
        assert len({tuple(batch["image"].shape[1:]) for batch in batches}) > 2
    assert samples(take(images.val_dataloader(), 99)) == samples(take(parts[1][0], 99))


@given(st.lists(st.integers(0, 20), max_size=6), st.integers(1, 8), st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_validation_batches_are_shared_evenly(
    counts: list[int], size: int, world_size: int
) -> None:
    groups = [list(range(100 * n, 100 * n + count)) for n, count in enumerate(counts)]
    shared = even_batches(groups, size, world_size)
    assert len(shared) == world_size and len({len(batches) for batches in shared}) == 1
    batches = [batch for own in shared for batch in own]
    assert all(0 < len(batch) <= size and len({n // 100 for n in batch}) == 1 for batch in batches)
    found = sorted(itertools.chain(*batches))
    assert len(found) == len(set(found))
    missing = sum(counts) - len(found)
    assert missing < world_size and (not missing or all(len(batch) == 1 for batch in batches))


def test_a_damaged_sample_is_replaced_by_one_of_its_bucket(tmp_path: Path) -> None:
    shards = write_images(tmp_path, NUM_IMAGES)
    plain = module(shards)
    reader = plain._training
    assert reader is not None
    by_size: dict[Any, list[int]] = {}
    for number in range(NUM_IMAGES):
        by_size.setdefault(plain.readers()[f"data.shards={shards}"].size(number), []).append(number)
    damaged = [numbers[0] for numbers in by_size.values()]
    rare = min(by_size.values(), key=len)
    damage(shards, damaged + rare)  # all of one bucket
    images = module(shards, max_bad_share=1.0)
    reader = images.readers()[f"data.shards={shards}"]
    for position in range(0, 20 * NUM_IMAGES, 6):
        wanted = [reader.place(position + row) for row in range(6)]
        batch = reader.batch(range(position, position + 6))
        size = reader.size(wanted[0].index)
        assert batch["image"].shape[2:] == size[::-1]  # type: ignore[index]
        assert not set(batch["index"].tolist()) & {*damaged, *rare}
        if wanted[0].index not in rare:
            assert {reader.size(number) for number in batch["index"].tolist()} == {size}


def test_mistakes_say_what_to_do(rectangles: Path) -> None:
    with pytest.raises(UserError, match="data.buckets.step_px=0 is out of range; it must be >= 1"):
        BucketsConfig(step_px=0)
    with pytest.raises(UserError, match="data.buckets.max_aspect=0.5"):
        BucketsConfig(max_aspect=0.5)
    with pytest.raises(UserError, match="no multiples of step_px=64 .*lower step_px"):
        DataConfig("x", resolution=32, buckets=BucketsConfig(True))
    with pytest.raises(UserError, match="data.max_upscale=0"):
        DataConfig("x", max_upscale=0)
    assert square(16, 2.0).sizes == ((16, 16),)


def test_a_bucket_that_the_autoencoder_cannot_halve_is_refused(
    rectangles: Path, pipeline: Path, tmp_path: Path
) -> None:
    config = tiny_config(
        tmp_path / "run",
        pipeline,
        rectangles,
        **{"data.buckets.enabled": True, "data.buckets.step_px": 5},
    )
    with pytest.raises(UserError, match="data.buckets.step_px=5 makes .* multiple of 2 px"):
        blackpoint.train.run.fit(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_training_with_buckets_resumes_to_the_bit(
    rectangles: Path, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from tests.test_train_run import Killed, assert_same_run, kill, stop_in_step

    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )
    overrides = {"data.buckets.enabled": True, "data.buckets.step_px": 8}
    overrides |= {"data.validation_shards": str(rectangles), "trainer.accumulate_grad_batches": 2}
    assert (
        blackpoint.train.run.fit(tiny_config(tmp_path / "a", pipeline, rectangles, **overrides))
        == 0
    )
    assert "   width  height      images   share" in capsys.readouterr().err
    rows = (tmp_path / "a" / "buckets.csv").read_text().splitlines()
    assert rows[0] == "data_set,width,height,num_images,num_enlarged"
    assert sum(int(row.split(",")[3]) for row in rows[1:]) == 2 * NUM_IMAGES
    config = tiny_config(tmp_path / "b", pipeline, rectangles, **overrides)
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, 4, kill)
        with pytest.raises(Killed):
            blackpoint.train.run.fit(config)
    assert blackpoint.train.run.fit(config) == 0
    assert_same_run(tmp_path / "b", tmp_path / "a")
