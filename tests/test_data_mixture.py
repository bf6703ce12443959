"""Laws of mixtures: exact shares over any prefix, passes of each data set, the same on resume."""

import dataclasses
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blackpoint.train.run
from blackpoint.data.batches import TrainingBatches
from blackpoint.data.config import DataConfig
from blackpoint.data.files.errors import UserError
from blackpoint.data.latents import Encoding
from blackpoint.data.mixed_reader import MixedReader
from blackpoint.data.mixture import MAX_CYCLE, MixtureEntry, Schedule, whole_weights
from blackpoint.data.module import CaptionedImages
from blackpoint.data.order.buckets import BucketsConfig
from blackpoint.data.pack.pack import PackConfig, pack
from blackpoint.scripts.config import load
from blackpoint.train.config.config import TrainConfig
from tests.data_images import write_folder
from tests.test_data_buckets import write_images
from tests.test_data_module import damage, samples, take
from tests.tiny_run import tiny_config

SIZES = {"art": 5, "photos": 30}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two packed data sets, of 5 and of 30 images."""
    found = {}
    for name, count in SIZES.items():
        folder = tmp_path_factory.mktemp(name)
        write_folder(folder / "in", count)
        pack(PackConfig(str(folder / "in"), str(folder / "out"), num_processes=1))
        found[name] = folder / "out"
    return found


def mixture(folders: dict[str, Path], weights: dict[str, float]) -> dict[str, MixtureEntry]:
    return {name: MixtureEntry(str(folders[name]), weight) for name, weight in weights.items()}


def module(
    folders: dict[str, Path],
    weights: dict[str, float] | None = None,
    batch_size: int = 6,
    start: int = 0,
    **options: Any,
) -> CaptionedImages:
    entries = mixture(folders, weights or {"photos": 2.0, "art": 1.0})
    options = {"num_workers": 0, "resolution": 16, **options}
    config = DataConfig(shards=None, mixture=entries, **options)
    images = CaptionedImages(config, seed=3, batch_size=batch_size, start_sample=start)
    images.prepare_data()
    images.setup("fit")
    return images


def mixed(images: CaptionedImages) -> MixedReader:
    assert isinstance(images._training, MixedReader)
    return images._training


weights_strategy = st.lists(
    st.one_of(st.integers(1, 40).map(float), st.sampled_from([0.1, 0.25, 0.4, 1.5])),
    min_size=1,
    max_size=6,
)


@given(weights_strategy)
@settings(max_examples=60, deadline=None)
def test_every_prefix_has_the_shares_to_within_one_sample(weights: list[float]) -> None:
    schedule = Schedule(weights)
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(schedule.parts)
    assert [Fraction(part, total) for part in schedule.parts] == [w / sum(exact) for w in exact]
    length = min(2 * total, 1000)
    which = np.array([schedule.at(position)[0] for position in range(length)])
    counts = np.cumsum(which[:, None] == np.arange(len(weights)), axis=0)
    expected = np.arange(1, length + 1)[:, None] * np.array(schedule.parts)
    assert np.abs(total * counts - expected).max() < total


@given(weights_strategy, st.integers(0, 10**15))
@settings(max_examples=60, deadline=None)
def test_each_data_set_walks_its_own_positions_in_order(weights: list[float], start: int) -> None:
    schedule = Schedule(weights)
    following: dict[int, int] = {}
    for position in range(start, start + 300):
        number, own = schedule.at(position)
        assert own == following.get(number, own)
        following[number] = own + 1
    assert schedule.at(0)[1] == 0
    share = Fraction(schedule.parts[0], sum(schedule.parts))
    for number, own in following.items():
        share = Fraction(schedule.parts[number], sum(schedule.parts))
        assert abs(own - share * (start + 300)) < 1


def test_weights_that_need_a_long_cycle_are_rounded() -> None:
    assert whole_weights([0.1, 0.2]) == [1, 2]
    assert whole_weights([3e-1, 7e-1]) == [3, 7]
    weights = [1234567.0, 7654321.0, 1e-6]
    parts = whole_weights(weights)
    assert MAX_CYCLE <= sum(parts) <= MAX_CYCLE + len(parts) and min(parts) >= 1
    assert parts[0] / sum(parts) == pytest.approx(weights[0] / sum(weights), abs=1e-4)


def test_passes_and_shares_of_the_data_sets(folders: dict[str, Path]) -> None:
    images = module(folders)
    seen = samples(take(images.train_dataloader(), 30))  # 180: 120 of photos, 60 of art
    names = Counter(key.split(":")[0] for _, _, key, _, _ in seen)
    assert names == {"photos": 120, "art": 60}
    for batch in take(images.train_dataloader(), 10):
        assert sum(key.startswith("art:") for key in batch["key"]) == 2
    pairs = Counter((epoch, index) for epoch, index, *_ in seen)
    assert set(pairs.values()) == {1}
    # art holds indices 0 to 4 and photos 5 to 34.
    assert set(pairs) == {(e, i) for e in range(12) for i in range(5)} | {
        (e, i) for e in range(4) for i in range(5, 35)
    }
    text = "\n".join(images.summary())
    assert "art: 33.33% of the samples, from 5 (6.67e+04 passes" in text


def test_draws_and_orders_of_the_data_sets_differ(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", 12)
    pack(PackConfig(str(tmp_path / "in"), str(tmp_path / "out"), num_processes=1))
    twins = {"a": tmp_path / "out", "b": tmp_path / "out"}
    reader = mixed(module(twins, {"a": 1, "b": 1}))
    places = [reader.place(position) for position in range(24)]
    orders = [
        [place.index - offset for place in places if place.index // 12 == offset // 12]
        for offset in (0, 12)
    ]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(12))
    looks = samples([reader.batch(range(240))])
    by_index: dict[tuple[int, int], bytes] = {(e, i): image for e, i, _, _, image in looks}
    same = sum(by_index[e, i] == by_index[e, i + 12] for e in range(10) for i in range(12))
    assert same < 40  # 9 places of the crop: a ninth by chance


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("buckets", [False, True])
def test_ranks_together_read_what_one_reads(
    folders: dict[str, Path], world_size: int, buckets: bool
) -> None:
    reader = mixed(module(folders, buckets=BucketsConfig(buckets, step_px=8)))
    whole = samples(take(TrainingBatches(reader, 6, 12, 0, 1), 12))
    ranks = [
        take(TrainingBatches(reader, 6, 12, rank, world_size), 12) for rank in range(world_size)
    ]
    assert samples([batch for step in zip(*ranks, strict=True) for batch in step]) == whole


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_do_not_change_the_order(folders: dict[str, Path], num_workers: int) -> None:
    alone = samples(take(module(folders).train_dataloader(), 8))
    loader = module(folders, num_workers=num_workers).train_dataloader()
    assert samples(take(loader, 8)) == alone


def test_starting_late_on_other_processes_equals_skipping(folders: dict[str, Path]) -> None:
    whole = samples(take(module(folders).train_dataloader(), 20))
    assert samples(take(module(folders, start=42).train_dataloader(), 13)) == whole[42:]
    reader = mixed(module(folders))
    ranks = [take(TrainingBatches(reader, 6, 42, rank, 2), 13) for rank in range(2)]
    resumed = samples([batch for step in zip(*ranks, strict=True) for batch in step])
    assert resumed == whole[42:]
    assert reader.place(10**15).position == 10**15


def test_the_order_of_the_names_in_the_config_does_not_matter(folders: dict[str, Path]) -> None:
    one = samples(take(module(folders, {"photos": 2, "art": 1}).train_dataloader(), 5))
    two = samples(take(module(folders, {"art": 1, "photos": 2}).train_dataloader(), 5))
    assert one == two
    alone = samples(take(module(folders, {"art": 0, "photos": 2}).train_dataloader(), 5))
    assert {key.split(":")[0] for _, _, key, _, _ in alone} == {"photos"}


def test_with_buckets_each_batch_is_of_one_data_set_and_one_size(tmp_path: Path) -> None:
    folders = {name: write_images(tmp_path / name, 40) for name in ("a", "b")}
    images = module(folders, {"a": 3, "b": 1}, buckets=BucketsConfig(True, step_px=8))
    batches = take(images.train_dataloader(), 80)
    owners = []
    for batch in batches:
        (name,) = {key.split(":")[0] for key in batch["key"]}
        owners.append(name)
        assert len({image.shape for image in batch["image"]}) == 1
    for length in range(1, 81):
        assert abs(owners[:length].count("a") - 0.75 * length) < 1
    assert len({tuple(batch["image"].shape) for batch in batches}) > 2
    pairs = Counter((epoch, index) for epoch, index, *_ in samples(batches))
    assert set(pairs.values()) == {1}


def test_bad_samples_are_named_with_their_data_set(tmp_path: Path) -> None:
    folders = {}
    for name in ("a", "b"):
        write_folder(tmp_path / name, 10)
        folders[name] = tmp_path / f"{name}_out"
        pack(PackConfig(str(tmp_path / name), str(folders[name]), num_processes=1))
    damage(folders["b"], [3])
    images = module(folders, {"a": 1, "b": 1}, max_bad_share=0.01)
    with (
        pytest.warns(UserWarning, match="sample b:.* replaced: not an image"),
        pytest.raises(UserError, match="data.mixture: 1 of 20 .*data.max_bad_share=0.01"),
    ):
        for batch in take(images.train_dataloader(), 10):
            images.on_before_batch_transfer(batch, 0)
    assert set(images.bad_samples) == {13}


def complaint(*arguments: str) -> str:
    with pytest.raises(ValueError) as error:
        load(TrainConfig, ["run_dir=a", "checkpoint=b", *arguments])
    return str(error.value)


def test_the_command_line_and_yaml_name_data_sets(tmp_path: Path) -> None:
    first, second = "data.mixture.photos.shards=x", "data.mixture.art.shards=y"
    loaded = load(
        TrainConfig,
        ["run_dir=a", "checkpoint=b", "data.mixture.photos.weight=2", first, second],
    )
    assert loaded.data.shards is None
    assert loaded.data.mixture == {"photos": MixtureEntry("x", 2.0), "art": MixtureEntry("y", 1.0)}
    assert loaded.data.weights == {"art": 1.0, "photos": 2.0}
    yaml = tmp_path / "c.yaml"
    yaml.write_text("data: {mixture: {photos: {shards: x, weight: 2.0}, art: {shards: y}}}\n")
    from_yaml = load(TrainConfig, [str(yaml), "run_dir=a", "checkpoint=b"])
    assert from_yaml.data.mixture == loaded.data.mixture

    assert "data.shards=..." in complaint()
    assert "data.shards=null: name the training shards" in complaint("data.shards=null")
    assert "training reads one or the other" in complaint("data.shards=z", first)
    assert "data.mixture.photos.shards=..." in complaint("data.mixture.photos.weight=2")
    wrong = complaint(first, "data.mixture.photos.weight=-1")
    assert "data.mixture.photos.weight=-1.0: must be 0 or more" in wrong
    assert "every weight is 0" in complaint(first, "data.mixture.photos.weight=0")
    assert "Did you mean: 'weight'" in complaint(first, "data.mixture.photos.wieght=1")
    yaml.write_text("data: {mixture: {photos: {shards: x, wieght: 2.0}}}\n")
    with pytest.raises(ValueError, match="`wieght` .*data.mixture.photos.*did you mean `weight`"):
        load(TrainConfig, [str(yaml), "run_dir=a", "checkpoint=b"])


@pytest.mark.slow
def test_latents_mix_where_they_were_encoded_alike(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blackpoint.train.encode.encode import encode
    from tests.test_data_encode import config_for
    from tests.test_train_run import Killed, assert_same_run, kill, stop_in_step

    encode(config_for(shards, pipeline, tmp_path / "one"))
    encode(config_for(shards, pipeline, tmp_path / "two"))
    encode(config_for(shards, pipeline, tmp_path / "large", resolution=32))
    latents = {"one": tmp_path / "one", "two": tmp_path / "two"}
    images = module(latents, {"one": 1, "two": 3})
    (batch,) = take(images.train_dataloader(), 1)
    assert batch["moments"].shape[0] == 6 and "image" not in batch
    with pytest.raises(UserError, match="one holds latents and the other images"):
        module({"one": tmp_path / "one", "raw": shards}, {"one": 1, "raw": 1})
    with pytest.raises(UserError, match="data.resolution=16: .*latents of 32 px"):
        module(latents | {"large": tmp_path / "large"}, {"one": 1, "large": 1})
    with pytest.raises(UserError, match="data.buckets.enabled=true: .*holds latents .*squares"):
        module(latents, {"one": 1, "two": 1}, buckets=BucketsConfig(True, step_px=8))
    text = (tmp_path / "two" / "encoding.json").read_text()
    found = Encoding.read(tmp_path / "two")
    other = dataclasses.replace(found, vae="0" * len(found.vae))
    other.write(tmp_path / "two", working=tmp_path / "two")
    with pytest.raises(UserError, match="were encoded differently, vae="):
        module(latents, {"one": 1, "two": 1})
    (tmp_path / "two" / "encoding.json").write_text(text)

    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )
    overrides: dict[str, Any] = {"data.shards": None, "preview.every_steps": 0}
    overrides |= {
        "data.mixture": {n: {"shards": str(p), "weight": 1.0} for n, p in latents.items()}
    }
    assert blackpoint.train.run.fit(tiny_config(tmp_path / "a", pipeline, shards, **overrides)) == 0
    config = tiny_config(tmp_path / "b", pipeline, shards, **overrides)
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, 4, kill)
        with pytest.raises(Killed):
            blackpoint.train.run.fit(config)
    assert blackpoint.train.run.fit(config) == 0
    assert_same_run(tmp_path / "b", tmp_path / "a")
