"""Laws of the speed options: which combine, that none changes the result, and what each refuses.

What a CPU has no operator for is tested with a stand-in: xformers' attention by torch's own,
bitsandbytes' AdamW8bit by AdamW, fp16 training by Lightning's fp16 plugin on the CPU.
"""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.data.files.errors import UserError
from blackpoint.sampling.choices import CompileMode
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.runtime.speed import prepare_unet
from blackpoint.train.module import FineTuner
from blackpoint.train.records.metrics_file import read_metrics
from tests.speed_stand_ins import EightBitStandIn, attention_stand_in, calls, install
from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_run import tiny_config

OPTIONS: dict[str, dict[str, Any]] = {
    "bf16-mixed": {"trainer.precision": "bf16-mixed"},
    "16-mixed": {"trainer.precision": "16-mixed"},
    "tf32": {"trainer.tf32": True},
    "sdpa": {"trainer.attention": "sdpa"},
    "xformers": {"trainer.attention": "xformers"},
    "channels_last": {"trainer.channels_last": True},
    "compile": {"trainer.compile": True},
    "gradient_checkpointing": {"trainer.gradient_checkpointing": True},
    "adamw_8bit": {"optimizer.name": "adamw_8bit"},
    "bf16-true": {"trainer.precision": "bf16-true"},
    "adafactor": {"optimizer.name": "adafactor"},
}
GPU_ONLY = {"16-mixed", "tf32"}
REFUSED_PAIRS = {frozenset({"channels_last", "adamw_8bit"})}
PAIRS = [
    pair
    for pair in itertools.combinations(OPTIONS, 2)
    if not OPTIONS[pair[0]].keys() & OPTIONS[pair[1]].keys()  # one key has one value
]
COMBINED = [
    ("sdpa", "channels_last", "gradient_checkpointing"),
    ("xformers", "channels_last", "gradient_checkpointing"),
    ("sdpa", "gradient_checkpointing", "adamw_8bit"),
    ("xformers", "gradient_checkpointing", "adamw_8bit"),
    ("bf16-mixed", "sdpa", "channels_last", "gradient_checkpointing"),
    ("bf16-mixed", "xformers", "gradient_checkpointing", "adamw_8bit"),
    ("compile", "sdpa", "channels_last", "gradient_checkpointing"),
    ("compile", "xformers", "adamw_8bit"),
    ("compile", "bf16-mixed"),
    ("bf16-mixed", "xformers", "adafactor"),
    ("sdpa", "channels_last", "gradient_checkpointing", "bf16-true", "adafactor"),
    ("xformers", "bf16-true", "adamw_8bit"),
    ("compile", "bf16-true", "adafactor"),
]
"""Every pair that no device and no rule refuses is in one of them."""
REFUSED = [pair for pair in PAIRS if GPU_ONLY & set(pair) or frozenset(pair) in REFUSED_PAIRS]
DOCS = Path(__file__).parents[1] / "docs" / "speed_options.md"
NO_COMPILER = "there is no C++ compiler (g++) for torch.compile"


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )


@pytest.fixture(scope="module")
def plain(pipeline: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
        )
        return two_steps(tmp_path_factory.mktemp("plain"), pipeline, shards)


def two_steps(folder: Path, pipeline: Path, shards: Path, **options: Any) -> dict[str, Any]:
    """Trains two steps and returns their losses and the checkpoint."""
    length = {"trainer.max_steps": 2, "trainer.validate_every_steps": 0}
    config = tiny_config(folder / "run", pipeline, shards, **length, **options)
    assert blackpoint.train.run.fit(config) == 0
    metrics = read_metrics(folder / "run" / "metrics.csv")
    saved = torch.load(folder / "run/checkpoints/step_00000002.ckpt", weights_only=True)
    return {"losses": [loss for _, loss in metrics["train/loss"]], "saved": saved}


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls.clear()
    install(monkeypatch, "xformers.ops", memory_efficient_attention=attention_stand_in)


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "bitsandbytes.optim", AdamW8bit=EightBitStandIn)


def compiling_with(backend: str, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiles without the C++ compiler: tracing is torch.compile's own."""
    original = torch.nn.Module.compile
    patch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: original(self, backend=backend, **options),
    )
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from compiling_with("eager", monkeypatch)


@pytest.fixture
def traced_with_autograd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backward pass is torch.compile's own too."""
    yield from compiling_with("aot_eager", monkeypatch)


def test_every_pair_is_tried() -> None:
    together = {pair for group in COMBINED for pair in itertools.combinations(sorted(group), 2)}
    assert {tuple(sorted(pair)) for pair in PAIRS} == together | {
        tuple(sorted(pair)) for pair in REFUSED
    }


@pytest.mark.parametrize(
    "group",
    [
        *(pytest.param(g, marks=pytest.mark.slow if "compile" in g else ()) for g in COMBINED),
        *REFUSED,
    ],
    ids="+".join,
)
@pytest.mark.usefixtures("xformers", "bitsandbytes", "traced_with_autograd")
def test_groups_train_to_the_same_losses_or_are_refused_by_name(
    group: tuple[str, ...], plain: dict[str, Any], pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    options = {key: value for name in group for key, value in OPTIONS[name].items()}
    if frozenset(group) in REFUSED_PAIRS:
        with pytest.raises(UserError, match="do not combine") as caught:
            two_steps(tmp_path, pipeline, shards, **options)
        assert all(key in str(caught.value) for key in options)
        assert not (tmp_path / "run").exists()
        return
    lacking = GPU_ONLY & set(group)
    if lacking and not torch.cuda.is_available():
        with pytest.raises(UserError, match=rf"{'|'.join(lacking)}.* needs a GPU"):
            two_steps(tmp_path, pipeline, shards, **options)
        assert not (tmp_path / "run").exists()
        return
    found = two_steps(tmp_path, pipeline, shards, **options)
    tolerance = 2e-2 if {"bf16-mixed", "bf16-true"} & set(group) else 1e-4
    if "adafactor" in group:  # another second step
        found["losses"], plain = found["losses"][:1], plain | {"losses": plain["losses"][:1]}
    assert found["losses"] == pytest.approx(plain["losses"], rel=tolerance)
    for key in ("state_dict", "current_model_state"):
        weights, expected = found["saved"][key], plain["saved"][key]
        assert list(weights) == list(expected)  # no prefix of a wrapper
        is_half = "bf16-true" in group and key == "current_model_state"
        dtype = torch.bfloat16 if is_half else torch.float32
        assert all(value.dtype == dtype for value in weights.values())
    if "xformers" in group:
        assert calls


def test_document_names_every_option_and_every_refused_pair() -> None:
    text = DOCS.read_text()
    for key in {key for options in OPTIONS.values() for key in options}:
        assert f"`{key}" in text, key
    row = next(line for line in text.splitlines() if "channels_last" in line and "refused" in line)
    assert "adamw_8bit" in row


def test_channels_last_changes_the_order_and_not_the_picture(
    pipeline: Path, tmp_path: Path
) -> None:
    model = DiffusionModel.load(pipeline)
    expected = model.sample("a one", [0], num_steps=2)
    assert prepare_unet(model.unet, "sdpa", channels_last=True) is None
    weight = model.unet.down_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert_close(model.sample("a one", [0], num_steps=2), expected, rtol=0, atol=1e-4)
    model.save(tmp_path / "saved")
    again = DiffusionModel.load(tmp_path / "saved")
    assert_close(dict(again.unet.state_dict()), dict(model.unet.state_dict()), rtol=0, atol=0)


GPU_MODES = [pytest.param("cuda", mode, marks=pytest.mark.gpu) for mode in get_args(CompileMode)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason=NO_COMPILER)
@pytest.mark.parametrize(("device", "mode"), [("cpu", "default"), *GPU_MODES])
def test_compiled_unet_gives_the_same_output_and_gradients(
    device: str, mode: Any, tmp_path: Path
) -> None:
    """A UNet of one level: a C++ compiler takes seconds for each kernel, and max-autotune makes
    dozens. Three times: CUDA graphs are recorded at the second and replayed at the third."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU")
    level = {"block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",)}
    level |= {"up_block_types": ("CrossAttnUpBlock2D",), "mid_block_type": None}
    base = make_tiny_pipeline(tmp_path / "sd", unet=level)
    torch.compiler.reset()
    torch.manual_seed(0)
    plain, compiled = (
        DiffusionModel.load(base, device).unet.requires_grad_(True) for _ in range(2)
    )
    prepare_unet(compiled, "sdpa", compile=True, training=True, compile_mode=mode)
    parts = (torch.randn(2, 4, 8, 8), torch.tensor([3, 999]), torch.randn(2, 16, 32))
    arguments = [part.to(device) for part in parts]
    for _ in range(1 if device == "cpu" else 3):
        gradients = []
        outputs = [unet(*arguments).sample for unet in (plain, compiled)]
        assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
        for unet, output in zip((plain, compiled), outputs, strict=True):
            unet.zero_grad()
            output.square().mean().backward()
            gradients.append({name: weight.grad for name, weight in unet.named_parameters()})
        assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
    assert list(compiled.state_dict()) == list(plain.state_dict())


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_compiled_run_resumes_to_the_bit_validates_previews_and_exports(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradient checkpointing, channels_last and the average swapped in and out."""
    from blackpoint.sampling.export.export import export

    monkeypatch.setattr(blackpoint.train.run, "export", export)
    options = {
        "trainer.compile": True,
        "trainer.channels_last": True,
        "trainer.gradient_checkpointing": True,
        "trainer.max_steps": 4,
        "trainer.checkpoint_every_steps": 2,
        "trainer.validate_every_steps": 2,
        "data.validation_shards": str(shards),
        "preview.every_steps": 2,
        "preview.num_steps": 2,
        "preview.num_images": 1,
    }
    saved = {}
    for name in ("unbroken", "resumed"):
        config = tiny_config(tmp_path / name, pipeline, shards, **options)
        torch.compiler.reset()
        if name == "resumed":
            with pytest.MonkeyPatch.context() as patch:
                stop_at(patch, step=3)
                with pytest.raises(KeyError, match="killed"):
                    blackpoint.train.run.fit(config)
            torch.compiler.reset()  # as in a new process
        assert blackpoint.train.run.fit(config) == 0
        path = tmp_path / name / "checkpoints" / "step_00000004.ckpt"
        saved[name] = torch.load(path, weights_only=True)
        assert (tmp_path / name / "export" / "model_index.json").is_file()
    for key in ("state_dict", "current_model_state", "optimizer_states"):
        assert_close(saved["resumed"][key], saved["unbroken"][key], rtol=0, atol=0)
    exported = DiffusionModel.load(tmp_path / "unbroken" / "export").unet.state_dict()
    average = {f"unet.{name}": value for name, value in exported.items()}
    assert_close(average, dict(saved["unbroken"]["state_dict"]), rtol=0, atol=0)


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    original = FineTuner.training_step

    def training_step(self: FineTuner, batch: Any, batch_index: int) -> Any:
        if self.global_step == step:
            raise KeyError("killed")
        return original(self, batch, batch_index)

    patch.setattr(FineTuner, "training_step", training_step)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_fp16_training_scales_and_unscales_once(
    plain: dict[str, Any],
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bitsandbytes: None,
    name: str,
) -> None:
    """A fused optimizer leaves unscaling to us, any other has it done by Lightning."""

    def trainer(*, precision: str, plugins: list[Any], **others: Any) -> Any:
        plugin = MixedPrecision("16-mixed", "cpu")  # type: ignore[arg-type]
        return lightning.pytorch.Trainer(plugins=[*plugins, plugin], **others)

    monkeypatch.setattr("blackpoint.train.cluster.device.check_device", lambda config, device: None)
    monkeypatch.setattr("blackpoint.train.callbacks.trainer.Trainer", trainer)
    options = {"optimizer.name": name, "trainer.precision": "16-mixed"}
    found = two_steps(tmp_path, pipeline, shards, **options)
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-2)
    norms = read_metrics(tmp_path / "run" / "metrics.csv")["train/gradient_norm"]
    assert all(0 < norm < 100 for _, norm in norms)  # scaled, they would be 65536 times that


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_real_eight_bit_optimizer_trains_and_resumes(
    plain: dict[str, Any], pipeline: Path, shards: Path, tmp_path: Path, precision: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra eight-bit is not installed")
    options = {"optimizer.name": "adamw_8bit", "trainer.checkpoint_every_steps": 1}
    options |= {"trainer.precision": precision}
    whole = two_steps(tmp_path / "whole", pipeline, shards, **options)
    rounding = 1e-2 if precision == "32-true" else 3e-2  # half a step of bfloat16 is 2**-8
    assert whole["losses"] == pytest.approx(plain["losses"], rel=rounding)
    states = whole["saved"]["optimizer_states"][0]["state"].values()
    quantised = [s["__bnb_optimizer_quant_state__"]["state1"].dtype for s in states]
    assert torch.uint8 in quantised
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step=1)
        with pytest.raises(KeyError, match="killed"):
            two_steps(tmp_path / "broken", pipeline, shards, **options)
    resumed = two_steps(tmp_path / "broken", pipeline, shards, **options)
    for key in ("state_dict", "current_model_state", "optimizer_states"):
        assert_close(resumed["saved"][key], whole["saved"][key], rtol=0, atol=0)


@pytest.mark.parametrize("mode", get_args(CompileMode))
def test_a_mode_reaches_torch_and_no_shape_is_dynamic(
    mode: Any, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dynamic program would be made at the second shape, and its bits depend on their order."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: asked.append(options))
    monkeypatch.setattr("blackpoint.sampling.runtime.speed.check_compiler", lambda device: None)
    prepare_unet(DiffusionModel.load(pipeline).unet, "sdpa", compile=True, compile_mode=mode)
    assert asked == [{"dynamic": False, "mode": mode}]
