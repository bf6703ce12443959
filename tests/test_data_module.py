"""Laws of the batches: complete, equal for any number of processes, and the same after a resume."""

import itertools
import pickle
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from blackpoint.data.batches import TrainingBatches, ValidationBatches
from blackpoint.data.files.errors import UserError
from blackpoint.data.index.index import Index
from blackpoint.data.index.shard_set import open_shards
from blackpoint.data.module import CaptionedImages, DataConfig
from blackpoint.data.pack.pack import PackConfig, pack
from blackpoint.data.reader import Reader
from blackpoint.data.shards.listing import find_shards
from tests.data_images import encoded, picture, write_folder

NUM_IMAGES = 30


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images in four shards."""
    folder = tmp_path_factory.mktemp("packed")
    write_folder(folder / "in", NUM_IMAGES)
    pack(PackConfig(str(folder / "in"), str(folder / "out"), samples_per_shard=8))
    return folder / "out"


def reader(shards: Path, **options: Any) -> Reader:
    return Reader(Index(shards), find_shards(str(shards)), seed=3, resolution=16, **options)


def module(shards: Path, batch_size: int = 6, start: int | None = None, **options: Any):
    config = DataConfig(str(shards), resolution=16, **{"num_workers": 0, **options})
    images = CaptionedImages(config, seed=3, batch_size=batch_size, start_sample=start)
    images.prepare_data()
    images.setup("fit")
    return images


def take(batches: Any, count: int) -> list[dict[str, Any]]:
    return list(itertools.islice(iter(batches), count))


def samples(batches: list[dict[str, Any]]) -> list[tuple[int, int, str, str, bytes]]:
    """Flattens batches to what identifies each sample and what became of it."""
    return [
        (int(epoch), int(index), key, caption, image.numpy().tobytes())
        for batch in batches
        for epoch, index, key, caption, image in zip(
            *(batch[name] for name in ("epoch", "index", "key", "caption", "image")), strict=True
        )
    ]


def test_a_batch_is_what_was_packed(shards: Path) -> None:
    batch = take(module(shards, caption_dropout=0.0, crop="center").train_dataloader(), 1)[0]
    assert batch["image"].shape == (6, 3, 16, 16) and batch["image"].dtype == torch.uint8
    assert batch["epoch"].dtype == batch["index"].dtype == torch.int64
    for row, key in enumerate(batch["key"]):
        number = int(key[-4:])
        assert batch["caption"][row] == f"picture {number}"
        expected = np.asarray(picture(number))[:, 4:20].transpose(2, 0, 1)
        np.testing.assert_array_equal(batch["image"][row].numpy(), expected)


def test_every_epoch_holds_each_sample_once(shards: Path) -> None:
    seen = samples(take(module(shards, batch_size=7).train_dataloader(), 13))  # 91 = 3 epochs + 1
    for epoch in range(3):
        indices = [index for number, index, *_ in seen if number == epoch]
        assert sorted(indices) == list(range(NUM_IMAGES))
    assert [number for number, *_ in seen] == sorted(number for number, *_ in seen)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_read_what_one_reads(shards: Path, world_size: int) -> None:
    whole = samples(take(TrainingBatches(reader(shards), 6, 12, 0, 1), 12))
    ranks = [
        take(TrainingBatches(reader(shards), 6, 12, rank, world_size), 12)
        for rank in range(world_size)
    ]
    together = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert samples(together) == whole


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_do_not_change_the_order(shards: Path, num_workers: int) -> None:
    alone = samples(take(module(shards).train_dataloader(), 8))
    assert samples(take(module(shards, num_workers=num_workers).train_dataloader(), 8)) == alone


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 2), (2, 0)])
def test_positions_count_through_all_epochs(
    shards: Path, world_size: int, num_workers: int
) -> None:
    found = []
    for rank in range(world_size):
        batches = TrainingBatches(reader(shards), 6, 24, rank, world_size)
        loader = CaptionedImages._loader(batches, num_workers)
        found += torch.cat([batch["position"] for batch in take(loader, 4)]).tolist()
    assert sorted(found) == list(range(24, 48))
    source = reader(shards)
    for position in (0, 29, 30, 10**12):
        place = source.place(position)
        assert place.position == position and place.epoch == position // NUM_IMAGES


def test_starting_late_equals_skipping(shards: Path) -> None:
    whole = samples(take(module(shards).train_dataloader(), 12))
    assert samples(take(module(shards, start=42).train_dataloader(), 5)) == whole[42:]
    far = module(shards, start=10**15).train_dataloader()
    assert samples(take(far, 1))[0][0] == 10**15 // NUM_IMAGES


def test_the_data_set_survives_a_spawned_worker(shards: Path) -> None:
    batches = TrainingBatches(reader(shards), 6, 0, 0, 1)
    first = samples(take(batches, 2))  # opens files and maps
    pickled = pickle.dumps(batches)
    assert len(pickled) < 10_000
    assert samples(take(pickle.loads(pickled), 2)) == first


def test_crop_flip_and_dropout_follow_seed_epoch_and_index(shards: Path) -> None:
    source = reader(shards, flip=True, caption_dropout=0.3)
    places = [source.place(position) for position in range(60)]
    forwards = [samples([source.collate([place], training=True)])[0] for place in places]
    order = list(range(60))
    random.Random(0).shuffle(order)
    for number in order:
        assert samples([source.collate([places[number]], True)])[0] == forwards[number]
    looks = Counter((index, image) for _, index, _, _, image in forwards)
    assert max(looks.values()) < 3 and len(looks) > 45  # epochs look different


def test_a_share_of_captions_is_dropped(shards: Path) -> None:
    source = reader(shards, caption_dropout=0.1)
    captions = source.batch(range(3000))["caption"]
    # Binomial: 300 expected, standard deviation 16.4.
    assert abs(captions.count("") - 300) < 5 * 16.4
    assert "" not in reader(shards).batch(range(300))["caption"]
    assert set(reader(shards, caption_dropout=1.0).batch(range(30))["caption"]) == {""}


def test_flips_are_half_and_change_nothing_else(shards: Path) -> None:
    plain = reader(shards).batch(range(300))["image"]
    flipped = reader(shards, flip=True).batch(range(300))["image"]
    same = (plain == flipped).flatten(1).all(1)
    mirrored = (plain == flipped.flip(-1)).flatten(1).all(1)
    assert bool((same | mirrored).all())
    assert 110 < int(mirrored.sum()) < 190


def test_a_pattern_chooses_shards(shards: Path) -> None:
    names = {path.name for path in find_shards(f"{shards}/shard-{{000001..000002}}.tar")}
    assert names == {"shard-000001.tar", "shard-000002.tar"}
    chosen = module(shards).config
    chosen.shards = f"{shards}/shard-00000[12].tar"
    images = CaptionedImages(chosen, seed=3, batch_size=16)
    images.setup("fit")
    first = take(images.train_dataloader(), 1)[0]
    assert sorted(first["index"].tolist()) == list(range(8, 24))


def test_shards_are_found_by_long_lists_and_in_folders_with_brackets(
    shards: Path, tmp_path: Path
) -> None:
    names = [f"shard-00000{number}" for number in (0, 2)]
    pattern = f"{shards}/{{{','.join(names * 20)}}}.tar"  # longer than a file's name may be
    assert [path.stem for path in find_shards(pattern)] == names
    assert len(open_shards(pattern, "data.shards", DataConfig()).paths) == 2
    folder = tmp_path / "a [2024]"
    shutil.copytree(shards, folder)
    assert len(find_shards(f"{folder}/shard-000000.tar")) == 1
    assert len(find_shards(f"{folder}/shard-{{000000..000003}}.tar")) == 4


def test_validation_is_fixed_and_shared_out(shards: Path) -> None:
    options: dict[str, Any] = {"validation_shards": str(shards), "validation_images": 10}
    one, two = (module(shards, **options).val_dataloader() for _ in range(2))
    first = samples(take(one, 99))
    assert first == samples(take(two, 99))
    assert [index for _, index, *_ in first] == list(range(10))
    positions = torch.cat([batch["position"] for batch in take(one, 99)])
    assert positions.tolist() == list(range(10))
    assert "" not in [caption for _, _, _, caption, _ in first]
    assert len(one) == 2
    assert module(shards).val_dataloader() == []
    parts = [ValidationBatches(reader(shards), 10, 6, rank, 3) for rank in range(3)]
    assert {len(part) for part in parts} == {2}
    indices = [index for part in parts for _, index, *_ in samples(take(part, 99))]
    assert sorted(indices) == list(range(9))


def test_fewer_validation_images_than_processes_are_named(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    images = module(shards, validation_shards=str(shards), validation_images=1)
    monkeypatch.setattr(CaptionedImages, "_world_size", 2)
    monkeypatch.setattr("blackpoint.data.module.rank_zero_info", notes.append)
    assert not len(images.val_dataloader()) and "fewer images than 2 processes" in notes[0]


def damage(folder: Path, indices: list[int]) -> None:
    """Overwrites the images of some samples in their shards."""
    index = Index(folder)
    for number in indices:
        record = index.records[number]
        path = folder / index.shard_names[record["shard"]]
        content = bytearray(path.read_bytes())
        start, size = int(record["image_offset"]), int(record["image_size"])
        content[start : start + size] = bytes(size)
        path.write_bytes(content)


def test_damage_after_packing_is_replaced_counted_and_named(tmp_path: Path) -> None:
    pack(PackConfig(str(write_folder(tmp_path / "in", NUM_IMAGES)), str(tmp_path / "out")))
    damage(tmp_path / "out", [4, 17])
    images = module(tmp_path / "out", max_bad_share=0.1)
    seen = []
    with pytest.warns(UserWarning, match="replaced: not an image"):
        for batch in take(images.train_dataloader(), 10):
            seen.append(images.on_before_batch_transfer(batch, 0))
    assert set(images.bad_samples) == {4, 17}
    assert all(len(batch["key"]) == 6 and "replaced" not in batch for batch in seen)
    assert not {4, 17} & {index for _, index, *_ in samples(seen)}
    again = take(module(tmp_path / "out", num_workers=2).train_dataloader(), 10)
    assert samples(again) == samples(seen)

    strict = module(tmp_path / "out", max_bad_share=0.05)
    with (
        pytest.warns(UserWarning),
        pytest.raises(UserError, match="2 of 30 .*data.max_bad_share=0.05") as error,
    ):
        for batch in take(strict.train_dataloader(), 10):
            strict.on_before_batch_transfer(batch, 0)
    assert "not an image" in str(error.value)


def test_a_data_set_of_nothing_usable_ends(tmp_path: Path) -> None:
    pack(PackConfig(str(write_folder(tmp_path / "in", 3)), str(tmp_path / "out")))
    damage(tmp_path / "out", [0, 1, 2])
    with pytest.raises(UserError, match="in a row"):
        reader(tmp_path / "out").batch([0])


class Recorder(LightningModule):
    """Remembers what it was fed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fed: list[dict[str, Any]] = []

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        self.fed.append(batch)
        return self.weight * batch["image"].float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(shards: Path, folder: Path, max_steps: int, resume: str | None) -> list[Any]:
    recorder = Recorder()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        enable_checkpointing=False,
    )
    config = DataConfig(str(shards), resolution=16, num_workers=0)
    trainer.fit(recorder, datamodule=CaptionedImages(config, 3, 6), ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{max_steps}.ckpt")
    return samples(recorder.fed)


def test_a_resumed_trainer_reads_on_where_it_stopped(shards: Path, tmp_path: Path) -> None:
    whole = fit(shards, tmp_path, 7, None)
    begun = fit(shards, tmp_path, 4, None)
    resumed = fit(shards, tmp_path, 7, str(tmp_path / "4.ckpt"))
    assert begun + resumed == whole and len(whole) == 7 * 2 * 6


def test_user_mistakes_say_what_to_do(shards: Path, tmp_path: Path) -> None:
    def message(pattern: object) -> str:
        with pytest.raises(UserError) as error:
            find_shards(str(pattern))
        return str(error.value)

    absent = message(tmp_path / "absent")
    assert f"data.shards={tmp_path / 'absent'}: does not exist" in absent
    assert "blackpoint data pack source=" in absent
    assert "holds no .tar shards" in message(tmp_path)
    assert "folder of images" in message(write_folder(tmp_path / "in", 3))
    assert "1 of 5 shards do not exist" in message(f"{shards}/shard-{{000000..000004}}.tar")
    assert "matches no file" in message(tmp_path / "*.tar")
    assert "braces" in message(f"{shards}/shard-{{000000..")
    assert "only local paths" in message("https://example.com/a.tar")
    assert "only local paths" in message("pipe:curl x")
    assert "no .tar file" in message(tmp_path / "in" / "image_0001.png")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.tar").write_bytes(b"")
    assert "2 folders" in message(f"{{{tmp_path}/other/a,{shards}/shard-000000}}.tar")

    with pytest.raises(UserError, match="batch_size=7.*multiple of their number, 2"):
        TrainingBatches(reader(shards), 7, 0, 0, 2)
    with pytest.raises(UserError, match="data.caption_dropout=1.5"):
        DataConfig("x", caption_dropout=1.5)
    with pytest.raises(UserError, match="data.resolution=-1"):
        DataConfig("x", resolution=-1)


def test_an_absent_index_is_built_and_a_stale_one_is_refused(tmp_path: Path) -> None:
    pack(PackConfig(str(write_folder(tmp_path / "in", 3)), str(tmp_path / "out")))
    with_index = samples(take(module(tmp_path / "out").train_dataloader(), 2))
    for path in (tmp_path / "out" / "index").iterdir():
        path.unlink()
    (tmp_path / "out" / "index").rmdir()
    assert samples(take(module(tmp_path / "out").train_dataloader(), 2)) == with_index

    shard = tmp_path / "out" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes() + bytes(512))
    with pytest.raises(UserError, match="has changed since the index .*remove that folder"):
        module(tmp_path / "out")
    (tmp_path / "out" / "new.tar").write_bytes(b"")
    with pytest.raises(UserError, match="is not in the index"):
        Index(tmp_path / "out").check_shards([tmp_path / "out" / "new.tar"])
    (tmp_path / "out" / "index" / "shards.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read .*remove"):
        module(tmp_path / "out")


def test_a_single_tall_image_is_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "tall.png").write_bytes(encoded(picture(0, (1, 20_000))))
    (tmp_path / "in" / "tall.txt").write_text("a line")
    pack(PackConfig(str(tmp_path / "in"), str(tmp_path / "out")))
    assert reader(tmp_path / "out").batch([0, 1])["image"].shape == (2, 3, 16, 16)
