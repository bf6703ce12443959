"""One graph a program: nothing that a run can ask of the UNet cuts what torch.compile traces.

A cut graph trains to the same losses, only slower, so it shows nowhere else. Dynamo counts its
graph breaks, with their reasons, in `counters`; the graphs run as they are (backend eager).
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.noise import derive_seed
from blackpoint.sampling.runtime.speed import prepare_unet
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.draws import draw, dropout_seeds
from blackpoint.train.dropout import SampleDropout, SampleSeeds, keep_mask
from blackpoint.train.module import FineTuner
from tests.pixel_models import CLASSES, UVIT, pixel_model, pixel_train_config
from tests.speed_stand_ins import install
from tests.tiny_run import tiny_config

DROPOUT = {"dropout.probability": 0.2}
# What reaches into the UNet, all at once: a break says where it is. The optimizer, the loss and
# the codec of pixels are outside its graph.
TOGETHER = DROPOUT | {"trainer.gradient_checkpointing": True, "trainer.channels_last": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "together": TOGETHER | {"trainer.attention": "sdpa"},
    "together in bf16-mixed with xformers": TOGETHER
    | {"trainer.attention": "xformers", "trainer.precision": "bf16-mixed"},
    "adapters": TOGETHER | {"lora.rank": 2, "lora.dropout": 0.2, "lora.convolutions": True},
}
PIXEL_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "unconditional": ("none", {}),
    "class, wavelet": ("class", {"codec": "wavelet"}),
    "text, u-vit": ("text", UVIT),
}


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traces without a compiler, and with the stand-in for xformers' operator."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: original(self, backend="eager", **options),
    )
    install(monkeypatch, "xformers.ops", memory_efficient_attention=attention)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    counters.clear()


def attention(query: Any, key: Any, value: Any, attn_bias: Any = None, **_: Any) -> Any:
    return scaled_dot_product_attention(query, key, value, attn_bias)


def compiled_tuner(model: DiffusionModel, config: TrainConfig) -> FineTuner:
    """Sets the model up as train/run.py does."""
    trainer = config.trainer
    prepare_unet(model.unet, trainer.attention, trainer.channels_last, compile=True, training=True)
    return FineTuner(model, config)


def step(tuner: FineTuner, height: int, width: int, size: int = 2) -> None:
    """Runs forward and backward as a training step does, then a validation's forward."""
    captions = CLASSES[:size] if tuner.model.pixels else ["a one", "a two"][:size]
    images = torch.zeros(size, 3, height, width, dtype=torch.uint8)
    batch = {"image": images, "caption": captions}
    draws = draw(0, [0] * size, list(range(size)), tuner.latent_shape(batch), 1000)
    if tuner.dropout_seeds is not None:
        tuner.dropout_seeds.of_batch = dropout_seeds(0, [0] * size, list(range(size)))
    low = tuner.config.trainer.precision == "bf16-mixed"
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        tuner.losses(batch, draws).sum().backward()
        tuner.model.unet.eval()
        with torch.no_grad():
            tuner.losses(batch, draws)
        tuner.model.unet.train()


def assert_whole_graphs(num_programs: int) -> None:
    """Asserts that so many programs were made, each of one graph, and nothing ran uncompiled."""
    assert dict(counters["graph_break"]) == {}
    assert counters["stats"]["unique_graphs"] == num_programs
    assert not counters["unimplemented"]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_a_stable_diffusion_trains_in_one_graph(
    name: str, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", pipeline, shards, **OPTIONS[name])
    step(compiled_tuner(DiffusionModel.load(pipeline), config), 16, 16)
    assert_whole_graphs(2)  # of training, and of validation


@pytest.mark.slow
@pytest.mark.parametrize("name", PIXEL_MODELS)
def test_a_pixel_model_trains_in_one_graph(
    name: str, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    condition, changes = PIXEL_MODELS[name]
    model = pixel_model(condition, pipeline, **changes)
    config = pixel_train_config(tmp_path / "run", shards, condition, pipeline, **DROPOUT)
    step(compiled_tuner(model, config), 16, 16)
    assert_whole_graphs(2)


@pytest.mark.slow
def test_each_shape_of_the_buckets_is_one_graph(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", pipeline, shards, **DROPOUT)
    tuner = compiled_tuner(DiffusionModel.load(pipeline), config)
    shapes = [(24, 16, 2), (16, 24, 1)]
    for _ in range(2):  # a shape that comes again has its program
        for height, width, size in shapes:
            step(tuner, height, width, size)
    assert_whole_graphs(2 * len(shapes))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "xformers"])
def test_guided_sampling_runs_in_one_graph(attention: Any, pipeline: Path) -> None:
    dtype = torch.bfloat16 if attention == "xformers" else torch.float32
    model = DiffusionModel.load(pipeline, dtype=dtype)
    prepare_unet(model.unet, attention, channels_last=True, compile=True)
    model.sample("a one", [0, 1], num_steps=3, sampler="euler_ancestral")
    assert_whole_graphs(1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler (g++)")
def test_compiled_masks_are_those_of_the_eager_ones() -> None:
    """Masks are integers that wrap around: made by a C++ compiler they are the same."""
    compiled = torch.compile(keep_mask, fullgraph=True, dynamic=False)
    seeds = torch.tensor([5, -7, 2**62, -(2**63), 2**63 - 1])
    assert torch.equal(compiled(seeds, (16, 9, 5), 0.3), keep_mask(seeds, (16, 9, 5), 0.3))


def test_a_layers_mask_is_that_of_its_number_and_the_samples_seed() -> None:
    """What runs that began earlier have dropped: a fixed value pins it."""
    seeds = SampleSeeds()
    seeds.of_batch = dropout_seeds(3, [0, 1], [4, 5])
    layer = SampleDropout(0.25, 7, seeds).train()
    x = torch.ones(2, 6, 4)
    assert seeds.of_batch is not None
    keys = [derive_seed(3, "dropout", 0, 4), derive_seed(3, "dropout", 1, 5)]
    assert seeds.of_batch.tolist() == keys
    salted = torch.tensor([key ^ derive_seed("layer", 7) for key in keys])
    assert_close(layer(x), keep_mask(salted, (6, 4), 0.25) / 0.75, rtol=0, atol=0)
    kept = "".join(str(int(value > 0)) for value in layer(x).flatten())
    assert kept == "111101000000110111000001010111111111110111001110"
