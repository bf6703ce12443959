"""Everything is where a GPU would need it: the device check that needs no GPU.

torch's FakeTensorMode runs shapes, number formats and devices without data. Here weights are fake
tensors on "cuda:0", what the host makes is on the CPU, and an operation that mixes them raises as
it would on a GPU, or a product of float16 and float32. Looked at: the training step with its loss,
samplers with guidance and rescale, re-noising, inversion, decoding, and the verifiers.

What it cannot see, in torch 2.14:
- the backward pass: autograd asks for the CUDA context of its device ("hasPrimaryContext");
- autocast, which switches itself off where there is no CUDA: mixed precision;
- anything that depends on data: the retry in float32 of an autoencoder whose float16 result is not
  finite, the oracle (its sets are compared on the CPU, number by number), and the records of a
  search; the noise schedule, which is host arithmetic, is computed outside of the mode;
- that a copy is pageable or needless, and all speed and memory (which copies the host waits for is
  looked at in tests/test_train_waits.py).
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

import blackpoint.sampling.checkpoints.encoders
from blackpoint.sampling.grid import SampleState, SamplingGrid, renoise
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.inversion import Inverter, invert
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.noise import seeded_noise
from blackpoint.sampling.process import Process
from blackpoint.sampling.samplers import SAMPLERS
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.sampling.verifiers.load import VerifierConfig, load_verifier
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.ema import Ema
from blackpoint.train.module import FineTuner
from tests import test_verifiers_clip, test_verifiers_hpsv2, test_verifiers_image_reward
from tests.pixel_models import CLASSES, pixel_model, pixel_train_config
from tests.tiny_run import tiny_config
from tests.tiny_vision import make_tiny_vit

pytestmark = pytest.mark.slow  # every operation goes through Python
GPU = torch.device("cuda:0")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF = torch.float16
"""Of a method among several: only half precision has products of two formats to get wrong."""
GUIDANCE = Guidance(7.5, 0.7)
clip, head = test_verifiers_clip.clip, test_verifiers_clip.head
image_reward = test_verifiers_image_reward.folder
hpsv2 = test_verifiers_hpsv2.checkpoint


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a function on real tensors, whose values it needs."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return run


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    for name in ("alpha", "sigma"):
        value = getattr(NoiseSchedule, name)
        monkeypatch.setattr(NoiseSchedule, name, property(on_host(value.fget)))
    for owner, name in (
        (Process, "check_sound"),
        (Process, "timesteps"),
        (Process, "final_alpha_bar"),
    ):
        monkeypatch.setattr(owner, name, on_host(getattr(owner, name)))
    monkeypatch.setattr(
        blackpoint.sampling.checkpoints.encoders, "_overflowed", lambda given, result: False
    )
    return FakeTensorMode(allow_non_fake_inputs=True)


def to_gpu(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> nn.Module:
    """Puts a module's tensors on the GPU, once; `dtype` is that of the floating ones."""

    def moved(tensor: Tensor) -> Tensor:
        wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=wanted, device=GPU)

    with mode:
        return module._apply(moved)


def model_on_gpu(
    model: DiffusionModel, mode: FakeTensorMode, dtype: torch.dtype = torch.float32
) -> DiffusionModel:
    model.load_encoders()
    for part in model.loaded_parts():
        to_gpu(part, mode, dtype)
    return model


def tuner_on_gpu(model: DiffusionModel, config: TrainConfig, mode: FakeTensorMode) -> FineTuner:
    model.load_encoders()
    tuner = FineTuner(model, config)
    owned = [tuner] if tuner.unet is model.unet else [model.unet]  # whose adapters are the tuner's
    for part in (*owned, *model.loaded_parts()[1:]):
        to_gpu(part, mode)
    tuner._device = GPU  # as Lightning does when it moves the module
    return tuner


def assert_on(found: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    assert isinstance(found, FakeTensor), "it was not computed in the mode"
    assert (found.device, found.dtype) == (device, dtype)


def batch_of(captions: list[str]) -> dict[str, Any]:
    return {
        "image": torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
        "caption": captions,
        "epoch": torch.zeros(2, dtype=torch.long),
        "index": torch.arange(2),
        "position": torch.arange(2),
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {
        "dropout.probability": 0.1,
        "loss.uncertainty": True,
        "loss.weighting": "min_snr",
        "loss.pool_factors": [1, 2],
        "loss.timesteps": "stratified",
        "loss.input_perturbation": 0.1,
        "trainer.gradient_checkpointing": True,
    },
    "adapters": {"lora.rank": 4, "lora.convolutions": True, "lora.dropout": 0.1},
    "adapters with DoRA": {"lora.rank": 4, "lora.dora": True, "dropout.probability": 0.1},
    "bf16-true": {"trainer.precision": "bf16-true", "loss.uncertainty": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["images", "latents"])
def test_the_training_step_of_a_stable_diffusion(
    name: str, kind: str, pipeline: Path, shards: Path, tmp_path: Path, mode: FakeTensorMode
) -> None:
    config = tiny_config(tmp_path / "run", pipeline, shards, **OPTIONS[name])
    tuner = tuner_on_gpu(DiffusionModel.load(pipeline), config, mode)
    batch = batch_of(["a one", "a two"])
    if kind == "latents":
        del batch["image"], batch["caption"]
        batch |= {"moments": torch.zeros(2, 8, 8, 8), "prompt_embeds": torch.zeros(2, 16, 32)}
    check_step(tuner, batch, mode)


@pytest.mark.parametrize("condition", ["none", "class", "text"])
def test_the_training_step_of_a_pixel_model(
    condition: str, pipeline: Path, shards: Path, tmp_path: Path, mode: FakeTensorMode
) -> None:
    config = pixel_train_config(tmp_path / "run", shards, condition, pipeline)
    model = pixel_model(condition, pipeline, codec="wavelet")
    check_step(tuner_on_gpu(model, config, mode), batch_of(CLASSES[:2]), mode)


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_follows_weights_and_is_swapped_in(
    dtype: torch.dtype, on_cpu: bool, mode: FakeTensorMode
) -> None:
    module, ema = LightningModule(), Ema(0.9, on_cpu=on_cpu)
    module.unet = nn.Linear(4, 4)
    ema.setup(Trainer(accelerator="cpu", logger=False), module, "fit")
    average = ema._average_model
    assert average is not None
    to_gpu(module, mode, dtype)
    with mode:
        place = torch.device("cpu") if on_cpu else GPU
        average.module._apply(lambda tensor: torch.empty(tensor.shape, device=place))
        average.update_parameters(module)
        average.update_parameters(module)
        ema.distance(module)
        with ema.swapped_in(module):
            assert_on(module.unet.weight, GPU, dtype)
        assert_on(module.unet.weight, GPU, dtype)
        assert_on(average.module.unet.weight, place)


def check_step(tuner: FineTuner, batch: dict[str, Any], mode: FakeTensorMode) -> None:
    draws = tuner.draws(batch)
    with mode:
        moved = tuner.transfer_batch_to_device(batch, GPU, 0)
        found = tuner.training_step(moved, 0)
        for name in ("loss", "objective", "losses", "scales"):
            assert_on(found[name], GPU)
        output, target = tuner.predict(moved, draws)
        assert_on(output, GPU, tuner.model.unet.conv_in.weight.dtype)
        assert_on(target, GPU)
        losses = tuner.losses(moved, draws)
        assert_on(losses, GPU)
        assert_on(tuner.objective(losses, draws.t), GPU)


@pytest.mark.parametrize("dtype", DTYPES)
def test_guided_sampling_and_decoding(
    dtype: torch.dtype, pipeline: Path, mode: FakeTensorMode
) -> None:
    """In two batches."""
    model = model_on_gpu(DiffusionModel.load(pipeline), mode, dtype)
    with mode:
        images = model.sample(["a one", "a two"], [0, 1], 1, 7.5, 0.7, batch_size=1)
        assert_on(images, torch.device("cpu"))
        assert_on(model.encode(torch.rand(2, 3, 16, 16)), GPU)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(sampler: str, pipeline: Path, mode: FakeTensorMode) -> None:
    """Over a first, a middle and a last step."""
    model = model_on_gpu(DiffusionModel.load(pipeline), mode, HALF)
    with mode:
        assert_on(model.sample("a one", [0], 3, 7.5, 0.7, sampler), torch.device("cpu"))


@pytest.mark.parametrize("condition", ["none", "class", "text"])
def test_sampling_of_a_pixel_model(condition: str, pipeline: Path, mode: FakeTensorMode) -> None:
    model = model_on_gpu(pixel_model(condition, pipeline), mode, torch.float16)
    prompts = [""] * 2 if condition == "none" else CLASSES[:2]
    with mode:
        assert_on(model.sample(prompts, [0, 1], 2), torch.device("cpu"))


def guided(model: DiffusionModel) -> tuple[Any, SamplingGrid, Tensor]:
    """Returns a denoiser, a grid and noise on the host; called in the mode."""
    condition = model.encode_prompts(["", "a one", "a two"])
    denoise = model.denoiser(condition[1:], condition[torch.zeros(2, dtype=torch.long)], GUIDANCE)
    grid = SamplingGrid.of(model.process.schedule, model.process.timesteps(2))
    return denoise, grid, torch.stack([seeded_noise(seed, (4, 8, 8)) for seed in (0, 1)])


def test_renoising(pipeline: Path, mode: FakeTensorMode) -> None:
    model = model_on_gpu(DiffusionModel.load(pipeline), mode, HALF)
    with mode:
        _, grid, noise = guided(model)
        state = SampleState(torch.zeros(2, 4, 8, 8, device=GPU), 2)
        assert_on(renoise(grid, state, 1, noise).x, GPU)


@pytest.mark.parametrize("method", ["ddim", "fixed_point", "anderson", "renoise"])
def test_inversion(method: Any, pipeline: Path, mode: FakeTensorMode) -> None:
    model = model_on_gpu(DiffusionModel.load(pipeline), mode, HALF)
    with mode:
        denoise, grid, _ = guided(model)
        found = invert(denoise, grid, torch.zeros(2, 4, 8, 8, device=GPU), Inverter(method, 3))
        for tensor in (found.x, found.residual, found.contraction):
            assert_on(tensor, GPU)


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    return make_tiny_vit(tmp_path / "vit")


VERIFIERS: dict[str, dict[str, str]] = {
    "luminance": {},
    "clip_score": {"checkpoint": "clip"},
    "pick_score": {"checkpoint": "clip"},
    "aesthetic": {"checkpoint": "head", "base": "clip"},
    "hpsv2": {"checkpoint": "hpsv2"},
    "image_reward": {"checkpoint": "image_reward"},
    "classifier": {"checkpoint": "vit"},
    "self_supervised": {"checkpoint": "vit"},
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", VERIFIERS)
def test_verifiers(
    kind: Any,
    dtype: Any,
    mode: FakeTensorMode,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {key: str(request.getfixturevalue(name)) for key, name in VERIFIERS[kind].items()}
    settings = {"luminance": {"target": 0.5}, "classifier": {"label": "1"}}.get(kind, {})
    config = VerifierConfig(kind=kind, dtype=dtype, **files, **settings)

    original = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if GPU not in args:
            return original(module, *args, **kwargs)
        return to_gpu(module, mode, *(arg for arg in args if isinstance(arg, torch.dtype)))

    monkeypatch.setattr(nn.Module, "to", to)
    if kind == "hpsv2":
        monkeypatch.setattr(
            "blackpoint.sampling.verifiers.models.hpsv2.ARCHITECTURE", test_verifiers_hpsv2.SMALL
        )
    verifier: Any = load_verifier(config, GPU)
    with mode:
        images, previews = (torch.rand(2, 3, 16, 16, device=GPU) for _ in range(2))
        scores = verifier.score(images, ["a one", "a two"], previews)
        assert scores.shape == (2,)
        assert_on(scores, GPU, scores.dtype)


def test_what_is_left_on_the_host_raises(
    pipeline: Path, shards: Path, tmp_path: Path, mode: FakeTensorMode
) -> None:
    """The check itself: it sees a batch and a noise that nobody moved, and a format that is off."""
    config = tiny_config(tmp_path / "run", pipeline, shards)
    tuner = tuner_on_gpu(DiffusionModel.load(pipeline), config, mode)
    tuner._device = torch.device("cpu")
    batch = batch_of(["a one", "a two"])
    draws = tuner.draws(batch)
    with mode, pytest.raises(RuntimeError, match="device"):
        tuner.predict(batch, draws)
    model = model_on_gpu(DiffusionModel.load(pipeline), mode, torch.float16)
    with mode:
        denoise, grid, noise = guided(model)
        with pytest.raises(RuntimeError, match="device"):
            denoise(noise, grid.timesteps[0])
        with pytest.raises(RuntimeError, match="dtype|Half"):
            model.unet(noise.to(GPU), 3, model.encode_prompts(["a", "b"]).prompt_embeds)
