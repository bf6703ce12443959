"""Latents of SDXL and of buckets: training on them is training on the images; what differs is
refused."""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.data.files.errors import UserError
from blackpoint.data.images.picture_size import PictureSize
from blackpoint.data.latents import Encoding
from blackpoint.data.module import CaptionedImages
from blackpoint.data.pack.pack import PackConfig, pack
from blackpoint.sampling.model import DiffusionModel
from blackpoint.train.encode.config import EncodeBucketsConfig
from blackpoint.train.module import FineTuner
from blackpoint.train.records.metrics_file import read_metrics
from tests.data_images import encoded as encoded_image
from tests.data_images import picture
from tests.test_train_lora import without_exports
from tests.tiny_encode import encoded
from tests.tiny_pipeline import NUM_TOKENS
from tests.tiny_run import tiny_config, tiny_tuner
from tests.tiny_sdxl import PROJECTION, WIDTHS, make_tiny_sdxl

SHAPES = [(24, 10), (10, 24), (20, 20), (40, 10), (36, 10), (64, 60)]
ON: dict[str, Any] = {"data.buckets.enabled": True, "data.buckets.step_px": 8}
BUCKETS = EncodeBucketsConfig(True, step_px=8)
LONG = 2 * (NUM_TOKENS - 2)
"""Tokens of captions in two chunks."""
WHOLE: dict[str, Any] = {"buckets": BUCKETS, "dtype": "float32", "max_tokens": LONG}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 pictures of six shapes, a third with two captions; some are longer than one chunk."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "in").mkdir()
    for number in range(18):
        path = folder / "in" / f"{number:02d}.png"
        path.write_bytes(encoded_image(picture(number, SHAPES[number % len(SHAPES)])))
        texts = ["a red one " * (number + 1), "a blue two"][: 2 if number % 3 == 0 else 1]
        path.with_suffix(".json").write_text(json.dumps({"caption": texts}))
    pack(PackConfig(str(folder / "in"), str(folder / "out"), num_processes=1))
    return folder / "out"


@pytest.fixture(scope="module")
def cache(sdxl: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("latents") / "sdxl"
    result = encoded(images, sdxl, output, **WHOLE, batch_size=4, samples_per_shard=7)
    assert result.num_samples == 18 and result.num_shards == 3
    return output


@pytest.fixture(scope="module")
def sd_cache(pipeline: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("latents") / "sd"
    encoded(images, pipeline, output, **WHOLE)
    return output


def batches_of(tuner: FineTuner, count: int = 8) -> list[dict[str, Any]]:
    config = tuner.config
    module = CaptionedImages(config.data, config.seed, config.batch_size, start_sample=0)
    module.prepare_data()
    loader = iter(module.train_dataloader())
    return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_cached_step_is_an_uncached_one(
    kind: str, images: Path, request: pytest.FixtureRequest
) -> None:
    """In every bucket, of every caption and of dropped ones: float32, about 100 roundings."""
    model = request.getfixturevalue({"sd": "pipeline", "sdxl": "sdxl"}[kind])
    latents = request.getfixturevalue({"sd": "sd_cache", "sdxl": "cache"}[kind])
    options = {**ON, "data.caption_dropout": 0.3, "data.max_tokens": LONG, "batch_size": 3}
    plain = tiny_tuner(model, **options, **{"data.shards": str(images), "data.crop": "center"})
    cached = tiny_tuner(model, **options, **{"data.shards": str(latents)})
    cached.model.encode_prompts = None  # type: ignore[assignment,method-assign]
    captions, shapes = set(), set()
    for one, two in zip(batches_of(plain), batches_of(cached), strict=True):
        assert one["key"] == two["key"] and one["caption"] == two["caption"]
        for name in ("epoch", "index", "position", *["sizes"][: kind == "sdxl"]):
            assert torch.equal(one[name], two[name]), name
        draws = plain.draws(one)
        assert torch.equal(draws.eps, cached.draws(two).eps)
        with torch.no_grad():
            expected, found = plain.losses(one, draws), cached.losses(two, draws)
        assert_close(found, expected, rtol=1e-5, atol=1e-5)
        captions |= set(one["caption"])
        shapes.add(one["image"].shape[2:])
    assert "" in captions and len(captions) > 5 and len(shapes) > 2


def test_a_sample_holds_both_embeddings_and_the_size_of_its_crop(
    images: Path, sdxl: Path, tmp_path: Path
) -> None:
    """Number 4 is 36 x 10: it is resized to 32 x 9 for 32 x 8, and cut 1 px below its top."""
    encoded(images, sdxl, tmp_path / "out", buckets=BUCKETS, dtype="float16")
    width, samples = sum(WIDTHS.values()), {}
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                key, _, suffix = member.name.partition(".")
                if suffix == "safetensors":
                    file = tar.extractfile(member)
                    assert file is not None
                    samples[key] = load(file.read())
    assert list(samples) == sorted(samples) and len(samples) == 18  # in the order of the source
    sample = samples["04"]
    assert PictureSize(*sample["sizes"].tolist()) == (10, 36, 1, 0, 8, 32)
    assert sample["sizes"].dtype == torch.int32
    assert sample["moments"].shape == (8, 4, 16)
    assert sample["prompt_embeds"].shape == (NUM_TOKENS, width)
    assert sample["pooled"].shape == (PROJECTION,)
    assert samples["03"]["prompt_embeds"].shape == (2, NUM_TOKENS, width)
    assert samples["03"]["pooled"].shape == (2, PROJECTION)
    empty = load_file(tmp_path / "out" / "empty.safetensors")
    assert {t.dtype for t in (*empty.values(), sample["pooled"])} == {torch.float16}
    expected = DiffusionModel.load(sdxl).encode_prompts([""])
    assert expected.pooled is not None  # half precision: 2^-11 of numbers of size 1
    assert_close(empty["pooled"].float(), expected.pooled[0], rtol=1e-3, atol=1e-3)
    assert_close(empty["prompt_embeds"].float(), expected.prompt_embeds[0], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_runs_on_latents_have_the_losses_of_those_on_images(
    kind: str,
    sdxl: Path,
    images: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_exports(monkeypatch)
    losses = []
    for name, folder in (("images", images), ("latents", cache)):
        # A large epsilon: Adam's g / |g| would turn rounding of gradients near 0 into whole steps.
        values = {**ON, "data.max_tokens": LONG, "optimizer.epsilon": 1e-3, "trainer.max_steps": 3}
        values |= {"data.validation_shards": str(folder), "data.validation_images": 8}
        values |= {"lora.rank": 4} if kind == "LoRA" else {}
        values |= {"data.crop": "center"} if name == "images" else {}
        assert blackpoint.train.run.fit(tiny_config(tmp_path / name, sdxl, folder, **values)) == 0
        metrics = read_metrics(tmp_path / name / "metrics.csv")
        kept = [v for key in ("train/loss", "validation/loss") for _, v in metrics[key]]
        losses.append(kept)
    assert len(losses[0]) == 3 + 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"data.buckets.enabled": False},
        "data.buckets: data.shards=.* other sizes; set data.buckets.enabled=true "
        "data.buckets.step_px=8 data.buckets.min_side_px=null",
    ),
    ({"data.buckets.step_px": 16}, "data.buckets.step_px=8 .*, as they were encoded"),
    ({"data.max_upscale": 1.0}, "data.max_upscale=1: .* set data.max_upscale=null"),
    (
        {"data.max_tokens": None},
        f"data.max_tokens=null: .* max_tokens={LONG}; set data.max_tokens={LONG}",
    ),
    ({"data.max_tokens": 15}, f"data.max_tokens=15 must be a multiple of {NUM_TOKENS - 2}"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=lambda row: str(row)[:40])
def test_other_options_than_those_of_the_encoding_are_refused(
    overrides: dict[str, Any], message: str, sdxl: Path, cache: Path, tmp_path: Path
) -> None:
    values = {**ON, "data.max_tokens": LONG, **overrides}
    with pytest.raises(UserError, match=message):
        blackpoint.train.run.fit(tiny_config(tmp_path / "run", sdxl, cache, **values))
    assert not (tmp_path / "run").exists()


def test_squares_are_refused_where_training_wants_buckets(
    pipeline: Path, images: Path, tmp_path: Path
) -> None:
    encoded(images, pipeline, tmp_path / "squares")
    config = tiny_config(tmp_path / "run", pipeline, tmp_path / "squares", **ON)
    with pytest.raises(UserError, match="cut to squares, .* data encode .* buckets.enabled=true"):
        blackpoint.train.run.fit(config)


def test_latents_of_another_model_or_without_sizes_are_refused(
    sdxl: Path, cache: Path, sd_cache: Path, tmp_path: Path
) -> None:
    values = {**ON, "data.max_tokens": LONG}
    with pytest.raises(UserError, match="was encoded with the VAE|without the pooled embeddings"):
        blackpoint.train.run.fit(tiny_config(tmp_path / "run", sdxl, sd_cache, **values))
    bare = shutil.copytree(cache, tmp_path / "bare")
    embeddings = load_file(bare / "empty.safetensors")
    save_file({"prompt_embeds": embeddings["prompt_embeds"]}, bare / "empty.safetensors")
    with pytest.raises(UserError, match=r"empty.safetensors: holds .*pooled.*encode the images"):
        blackpoint.train.run.fit(tiny_config(tmp_path / "run", sdxl, bare, **values))
    fields = json.loads((bare / "encoding.json").read_text())
    del fields["pooled_shape"]
    (bare / "encoding.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="without the pooled embeddings and sizes of pictures"):
        blackpoint.train.run.fit(tiny_config(tmp_path / "run", sdxl, bare, **values))
    assert not (tmp_path / "run").exists()


def test_encoding_in_other_buckets_or_lengths_is_another_output(
    sdxl: Path, images: Path, cache: Path
) -> None:
    assert encoded(images, sdxl, cache, **WHOLE, batch_size=4, samples_per_shard=7).num_samples
    for other in ({"buckets": EncodeBucketsConfig()}, {"max_tokens": None}):
        with pytest.raises(UserError, match=f"made with {next(iter(other))}="):
            options = {**WHOLE, **other, "batch_size": 4, "samples_per_shard": 7}
            encoded(images, sdxl, cache, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": EncodeBucketsConfig(True, 4)}, "^buckets.step_px=4 makes .* set step_px"),
        ({"max_tokens": 20}, f"^max_tokens=20 must be a multiple of {NUM_TOKENS - 2}"),
    ],
    ids=["sides", "tokens"],
)
def test_wrong_options_are_refused_before_anything_is_written(
    options: dict[str, Any], message: str, sdxl: Path, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        encoded(images, sdxl, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_squares_and_one_chunk_of_sd_are_recorded_as_before(
    pipeline: Path, images: Path, tmp_path: Path
) -> None:
    """Caches that are there keep their key, and are read by their fields alone."""
    encoded(images, pipeline, tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "encoding.json").read_text())
    assert not {"buckets", "max_tokens", "pooled_shape"} & fields.keys()
    encoding = Encoding.read(tmp_path / "out")
    assert encoding.key == fields["key"] and encoding.bucket_table() is None
    assert encoding.embedding_shapes() == {"prompt_embeds": (NUM_TOKENS, 32)}
