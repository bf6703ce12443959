"""Laws of cached latents: training on them is training on the images; what differs is refused."""

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.data.index.contents import DIGESTS_FILE, STAMPS_FILE
from blackpoint.data.index.index import Index
from blackpoint.data.latents import Encoding
from blackpoint.data.module import CaptionedImages
from blackpoint.data.pack.pack import PackConfig, pack
from blackpoint.sampling.checkpoints.encoders import Encoders
from blackpoint.sampling.checkpoints.fingerprint import text_encoder_digest, vae_digest
from blackpoint.sampling.checkpoints.pipeline_folder import PipelineFolder
from blackpoint.sampling.model import DiffusionModel
from blackpoint.scripts.cli import main
from blackpoint.train.encode.encode import EncodeConfig, encode
from blackpoint.train.module import FineTuner
from blackpoint.train.records.metrics_file import read_metrics
from tests.data_images import picture, write_folder
from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_run import make_tiny_shards, tiny_config


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "sd")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_shards(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def cache(pipeline: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples in float32, in three shards."""
    output = tmp_path_factory.mktemp("caches") / "float32"
    result = encode(config_for(shards, pipeline, output, dtype="float32", samples_per_shard=5))
    assert result.num_samples == 12 and result.num_shards == 3 and not result.bad
    return output


def config_for(shards: Path, pipeline: Path, output: Path, **options: Any) -> EncodeConfig:
    defaults = {"resolution": 16, "batch_size": 4, "num_workers": 0, "device": "cpu"}
    defaults["num_processes"] = 1  # others would import torch anew
    return EncodeConfig(str(shards), str(pipeline), str(output), **{**defaults, **options})


def batches(config: Any, count: int = 5) -> list[dict[str, Any]]:
    images = CaptionedImages(config.data, config.seed, config.batch_size)
    images.prepare_data()
    images.setup("fit")
    loader = iter(images.train_dataloader())
    return [next(loader) for _ in range(count)]


def test_cache_holds_what_the_encoders_make(cache: Path, pipeline: Path, shards: Path) -> None:
    model = DiffusionModel.load(pipeline)
    pair = [
        batches(tiny_config(cache.parent, pipeline, folder, **{"data.crop": "center"}))
        for folder in (cache, shards)
    ]
    for cached, images in zip(*pair, strict=True):
        assert set(cached) - {"moments", "prompt_embeds"} == set(images) - {"image", "sizes"}
        for name in ("caption", "key"):
            assert cached[name] == images[name]
        for name in ("epoch", "index", "position"):
            assert_close(cached[name], images[name], rtol=0, atol=0)
        assert cached["moments"].shape == (4, 8, 8, 8)
        assert cached["moments"].dtype == cached["prompt_embeds"].dtype == torch.float32
        moments = model.encode_moments(images["image"].float() / 255)
        assert_close(cached["moments"], moments, rtol=0, atol=1e-5)
        embeds = model.encode_prompts(images["caption"]).prompt_embeds
        assert_close(cached["prompt_embeds"], embeds, rtol=0, atol=1e-5)
    assert any("" in cached["caption"] for cached in pair[0])  # dropped: the empty embedding


def test_index_describes_the_encoded_square(tmp_path: Path, pipeline: Path) -> None:
    pack(PackConfig(str(write_folder(tmp_path / "in", 3)), str(tmp_path / "shards")))
    encode(config_for(tmp_path / "shards", pipeline, tmp_path / "out"))
    source, index = Index(tmp_path / "shards"), Index(tmp_path / "out")
    assert [index.key(row) for row in range(3)] == [source.key(row) for row in range(3)]
    for row in range(3):
        record = index.record(row)
        assert (record["width"], record["height"]) == (16, 16)
        square = np.asarray(picture(int(index.key(row)[-4:])))[:, 4:20]
        expected = square.mean(axis=(0, 1)) @ [0.299, 0.587, 0.114] / 255
        assert record["luminance"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-4), ("bfloat16", 1e-3)]
)
def test_training_from_the_cache_is_training_on_the_images(
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    tolerance: float,
) -> None:
    """Same seeds, center crop, no flip: the losses agree to the tolerance, relative.

    Seen: 2e-8 in float32 (weights of size 1: 1.2e-7), 3e-6 in float16, 3e-5 in bfloat16.
    """
    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )
    encode(config_for(shards, pipeline, tmp_path / "cache", dtype=dtype))
    folders = {"images": shards, "latents": tmp_path / "cache"}
    losses, weights = [], []
    for name, folder in folders.items():
        # A large epsilon: Adam's g / |g| would turn rounding of gradients near 0 into whole steps.
        overrides = {"optimizer.epsilon": 1e-3, "data.validation_shards": str(folder)}
        overrides |= {"trainer.max_steps": 3}
        overrides |= {"data.crop": "center"} if name == "images" else {}
        assert (
            blackpoint.train.run.fit(tiny_config(tmp_path / name, pipeline, folder, **overrides))
            == 0
        )
        metrics = read_metrics(tmp_path / name / "metrics.csv")
        losses.append(
            [value for key in ("train/loss", "validation/loss") for _, value in metrics[key]]
        )
        last = tmp_path / name / "checkpoints" / "step_00000003.ckpt"
        weights.append(torch.load(last, weights_only=True)["current_model_state"])
    assert len(losses[0]) == 3 + 1
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert_close(weights[1], weights[0], rtol=0, atol=tolerance)


def test_cached_training_loads_no_encoder(
    pipeline: Path,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )
    loaded: list[str] = []
    get = Encoders.get
    monkeypatch.setattr(
        Encoders, "get", lambda model, name, on: (loaded.append(name), get(model, name, on))[1]
    )
    config = tiny_config(tmp_path / "off", pipeline, cache, **{"trainer.max_steps": 1})
    blackpoint.train.run.fit(config)
    assert not loaded
    assert "the VAE and the text encoder are not loaded" in capsys.readouterr().err
    overrides = {"trainer.max_steps": 1, "preview.every_steps": 1, "preview.num_steps": 1}
    blackpoint.train.run.fit(tiny_config(tmp_path / "on", pipeline, cache, **overrides))
    assert {"vae", "text_encoder"} == set(loaded)
    assert "preview.every_steps=0" in capsys.readouterr().err


def test_previews_show_a_broken_encoder_before_anything_is_written(
    pipeline: Path, cache: Path, tmp_path: Path
) -> None:
    """Digests are of weights and settings; a config.json that fits no weights shows on loading."""
    broken = shutil.copytree(pipeline, tmp_path / "broken")
    path = broken / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_per_block": 2}))
    config = tiny_config(tmp_path / "run", broken, cache, **{"preview.every_steps": 1})
    with pytest.raises(UserError, match="vae: .* missing weights"):
        blackpoint.train.run.fit(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("part", "name"),
    [("vae", "VAE"), ("text_encoder", "text encoder"), ("tokenizer", "text encoder")],
)
def test_cache_of_other_encoders_is_refused(
    pipeline: Path, cache: Path, tmp_path: Path, part: str, name: str
) -> None:
    other = shutil.copytree(pipeline, tmp_path / "other")
    if part == "tokenizer":
        path = other / part / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 12}))
    else:
        shutil.rmtree(other / part)
        shutil.copytree(make_tiny_pipeline(tmp_path / "seed1", seed=1) / part, other / part)
    with pytest.raises(UserError) as caught:
        blackpoint.train.run.fit(tiny_config(tmp_path / "run", other, cache))
    message = str(caught.value)
    assert f"data.shards={cache}: was encoded with the {name} " in message
    assert f"checkpoint={pipeline}, but checkpoint={other}" in message
    assert "blackpoint data encode source=" in message and "resolution=16" in message
    assert not (tmp_path / "run").exists()


def test_digests_are_of_values_and_not_of_files(pipeline: Path, tmp_path: Path) -> None:
    model = DiffusionModel.load(pipeline)
    model.save(tmp_path / "saved")
    half = make_tiny_pipeline(tmp_path / "half", variant="fp16")
    DiffusionModel.load(half).save(tmp_path / "widened")
    for digest in (vae_digest, text_encoder_digest):
        plain, widened = digest(PipelineFolder(pipeline)), digest(PipelineFolder(half))
        assert digest(PipelineFolder(tmp_path / "saved")) == plain
        assert digest(PipelineFolder(tmp_path / "widened")) == widened != plain


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.flip": True}, "data.flip=true: .*one view of each image.*data.flip=false"),
        ({"data.crop": "random"}, "data.crop=random: .*center crop.*data.crop=auto"),
        (
            {"data.resolution": 32},
            "data.resolution=32: .* latents of 16 px; set data.resolution=16",
        ),
    ],
)
def test_what_a_cache_excludes_is_refused(
    pipeline: Path, cache: Path, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        blackpoint.train.run.fit(tiny_config(tmp_path / "run", pipeline, cache, **overrides))
    assert not (tmp_path / "run").exists()


def test_validation_may_be_images(
    pipeline: Path, cache: Path, shards: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, pipeline, cache, **{"data.validation_shards": str(shards)})
    images = CaptionedImages(config.data, 0, 4)
    images.setup("fit")
    assert "moments" in next(iter(images.train_dataloader()))
    (_, encoding), (where, none) = images.encodings()
    assert isinstance(encoding, Encoding) and none is None and "validation_shards" in where
    batch = next(iter(images.val_dataloader()))
    assert FineTuner(DiffusionModel.load(pipeline), config).latent_shape(batch) == (4, 8, 8)
    assert batch["position"].tolist() == [0, 1, 2, 3]


def test_bad_samples_are_left_out_and_named(pipeline: Path, tmp_path: Path) -> None:
    pack(PackConfig(str(write_folder(tmp_path / "in", 9)), str(tmp_path / "shards")))
    index = Index(tmp_path / "shards")
    path = tmp_path / "shards" / index.shard_names[0]
    content = bytearray(path.read_bytes())
    for row in (0, 4, 5, 6, 7):
        record = index.record(row)
        start, size = int(record["image_offset"]), int(record["image_size"])
        content[start : start + size] = bytes(size)
    path.write_bytes(content)
    with pytest.raises(UserError, match="has changed since the index"):
        encode(config_for(tmp_path / "shards", pipeline, tmp_path / "out"))
    (tmp_path / "shards" / "index" / DIGESTS_FILE).unlink()  # from before there were any
    options = {"samples_per_shard": 4, "max_bad_share": 0.6}
    result = encode(config_for(tmp_path / "shards", pipeline, tmp_path / "out", **options))
    assert [sample.key for sample in result.bad] == [index.key(row) for row in (0, 4, 5, 6, 7)]
    assert result.num_samples == 4 and result.num_shards == 3
    # Shard k is what is usable of samples [4 k, 4 k + 4).
    assert [len(rows) for rows in Index(tmp_path / "out").shard_samples.values()] == [3, 0, 1]
    listed = (tmp_path / "out" / "index" / "bad_samples.jsonl").read_text()
    assert listed.count("not an image") == 5
    options["max_bad_share"] = 0.01
    with pytest.raises(UserError, match="5 of 9 samples .*max_bad_share=0.01"):
        encode(config_for(tmp_path / "shards", pipeline, tmp_path / "strict", **options))
    assert not (tmp_path / "strict").exists()  # its shards wait for a larger share
    options["max_bad_share"] = 0.6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionModel, "encode_moments", None)
        strict = tmp_path / "strict"
        assert encode(config_for(tmp_path / "shards", pipeline, strict, **options)).num_samples == 4


def test_workers_and_batches_do_not_change_the_cache(
    pipeline: Path, shards: Path, cache: Path, tmp_path: Path
) -> None:
    options = {"num_workers": 2, "dtype": "float32", "samples_per_shard": 5}
    encode(config_for(shards, pipeline, tmp_path / "out", **options))
    files = {path.relative_to(cache) for path in cache.rglob("*.*")} - {Path("index", STAMPS_FILE)}
    assert len(files) == 3 + 5 + 2
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (cache / name).read_bytes(), name


def test_values_that_a_format_cannot_hold_are_refused(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DiffusionModel.encode_moments
    monkeypatch.setattr(DiffusionModel, "encode_moments", lambda *a: original(*a) * 1e6)
    with pytest.raises(UserError, match="dtype=float16: can't hold.*dtype=bfloat16 or float32"):
        encode(config_for(shards, pipeline, tmp_path / "out"))
    assert not list(tmp_path.iterdir())
    encode(config_for(shards, pipeline, tmp_path / "out", dtype="bfloat16"))


def test_latents_that_are_not_finite_are_bad_samples(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(model: DiffusionModel, images: torch.Tensor) -> torch.Tensor:
        moments = original(model, images)
        moments[0, 0, 0, 0] = torch.nan
        return moments

    original = DiffusionModel.encode_moments
    monkeypatch.setattr(DiffusionModel, "encode_moments", poisoned)
    result = encode(config_for(shards, pipeline, tmp_path / "out", max_bad_share=0.3))
    assert {sample.reason for sample in result.bad} == {"the autoencoder gives no finite latent"}
    assert (len(result.bad), result.num_samples) == (3, 9)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError(errno.ENOSPC, "full")])
def test_failure_leaves_nothing(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    def fail(*arguments: object) -> bytes:
        raise error

    monkeypatch.setattr("blackpoint.train.encode.sample_encoder.to_bytes", fail)
    expected = RunFailed if isinstance(error, OSError) else error
    with pytest.raises(expected):
        encode(config_for(shards, pipeline, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_damaged_cache_says_so(pipeline: Path, cache: Path, tmp_path: Path) -> None:
    def folder_without(name: str, content: str | None) -> Path:
        folder = shutil.copytree(cache, tmp_path / f"{len(list(tmp_path.iterdir()))}")
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
        if content is not None:
            (folder / name).write_text(content)
        return folder

    for name, content, message in (
        ("encoding.json", "{", "cannot be read"),
        ("encoding.json", json.dumps({"version": 1}), "is of version 1"),
        ("encoding.json", json.dumps({"version": 2}), "cannot be read"),
        ("empty.safetensors", None, "empty.safetensors: cannot be read"),
        ("index", None, "index is missing"),
    ):
        with pytest.raises(UserError, match=f"{message}.*blackpoint data encode"):
            batches(tiny_config(tmp_path, pipeline, folder_without(name, content)))


def test_damaged_latents_are_replaced_and_named(
    pipeline: Path, cache: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(cache, tmp_path / "cache")
    record, path = Index(folder).record(0), folder / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    start = int(record["image_offset"]) + 8
    content[start : start + 4] = b"junk"
    path.write_bytes(content)
    replaced = [
        sample
        for batch in batches(tiny_config(tmp_path, pipeline, folder), 3)
        for _, sample in batch["replaced"]
    ]
    assert len(replaced) == 1 and "damaged .safetensors" in replaced[0].reason


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("crop", "random", "crop=random: latents are made once.*crop=center"),
        ("resolution", -1, "resolution=-1"),
        ("resolution", 17, "height=17 must be a positive multiple"),
        ("num_workers", -1, "num_workers=-1"),
        ("max_bad_share", 2, "max_bad_share=2"),
        ("dtype", "int8", "dtype"),
        ("source", "nowhere", "source=nowhere: does not exist"),
        ("checkpoint", "nowhere", "checkpoint=nowhere"),
    ],
)
def test_wrong_input_is_refused(
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    key: str,
    value: Any,
    message: str,
) -> None:
    values = {"source": shards, "checkpoint": pipeline, "output": tmp_path / "out"}
    values |= {"resolution": 16, "num_workers": 0, "device": "cpu", key: value}
    assert main(["data", "encode", *(f"{name}={given}" for name, given in values.items())]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_verb_encodes_and_refuses_a_cache_as_its_source(
    pipeline: Path, cache: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"checkpoint={pipeline}", f"output={tmp_path / 'out'}", "resolution=16"]
    assert main(["data", "encode", f"source={shards}", "num_workers=0", *arguments]) == 0
    assert "encoded 12 samples in 1 shards" in capsys.readouterr().out
    assert main(["data", "encode", f"source={shards}", *arguments]) == 0
    assert "in 1 shards, 1 of them before" in capsys.readouterr().out
    assert main(["data", "encode", f"source={shards}", *arguments, "dtype=float32"]) == 2
    assert "is not empty" in capsys.readouterr().err
    arguments[1] = f"output={tmp_path / 'again'}"
    assert main(["data", "encode", f"source={cache}", *arguments]) == 2
    assert "holds latents already" in capsys.readouterr().err
