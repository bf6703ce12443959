"""What `attention=auto` takes, and what each speed option refuses where it cannot run."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.data.files.errors import UserError
from blackpoint.data.module import CaptionedImages
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.runtime.precision import check_dtype, check_tf32, set_tf32
from blackpoint.sampling.runtime.speed import head_widths, prepare_unet
from blackpoint.train.cluster.device import check_count, check_device
from blackpoint.train.start import programs_note
from tests.speed_stand_ins import EightBitStandIn, attention_stand_in, calls, install
from tests.test_data_buckets import write_images
from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_run import tiny_config


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls.clear()
    install(monkeypatch, "xformers.ops", memory_efficient_attention=attention_stand_in)


def test_auto_takes_sdpa_without_xformers_and_changes_nothing(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    untouched, prepared = (DiffusionModel.load(pipeline).unet for _ in range(2))
    assert prepare_unet(prepared) is None, "nothing was to be chosen"
    types_of = [{type(p) for p in unet.attn_processors.values()} for unet in (untouched, prepared)]
    assert types_of[0] == types_of[1]
    assert_close(dict(prepared.state_dict()), dict(untouched.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_auto_takes_xformers_where_its_operator_runs(
    pipeline: Path, xformers: None, training: bool
) -> None:
    model = DiffusionModel.load(pipeline)
    arguments = (torch.randn(2, 4, 8, 8), torch.tensor([3, 999]), torch.randn(2, 16, 32))
    expected = model.unet(*arguments).sample
    assert head_widths(model.unet) == [8, 16]
    note = prepare_unet(model.unet, training=training)
    assert note == "attention=auto took xformers: its operators run on cpu in float32"
    assert {shape[-1] for shape in calls} == {8, 16}  # the widths of this UNet
    assert_close(model.unet(*arguments).sample, expected, rtol=1e-4, atol=1e-5)


def no_operator(*_: Any, **__: Any) -> torch.Tensor:
    raise NotImplementedError("No operator found for `memory_efficient_attention`:\nquery: ...")


def no_backward(query: Any, key: Any, value: Any) -> torch.Tensor:
    class ForwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            raise NotImplementedError("No backward operator")

    return ForwardOnly.apply(value)


@pytest.mark.parametrize(
    ("operator", "training", "reason"),
    [
        (no_operator, False, "no operator that runs on cpu in bfloat16.*width 8.*No operator"),
        (no_backward, True, "width 8 and a backward pass.*No backward operator"),
        (no_backward, False, None),
    ],
)
def test_xformers_that_cannot_run_is_refused_and_auto_says_why(
    pipeline: Path,
    monkeypatch: pytest.MonkeyPatch,
    operator: Callable,
    training: bool,
    reason: str | None,
) -> None:
    install(monkeypatch, "xformers.ops", memory_efficient_attention=operator)
    unet = DiffusionModel.load(pipeline, dtype=torch.bfloat16).unet
    note = prepare_unet(unet, "auto", training=training)
    assert note is not None
    if reason is None:
        assert "took xformers" in note
        return
    with pytest.raises(UserError, match=f"attention=xformers cannot run.*{reason}.*use attention="):
        prepare_unet(unet, "xformers", training=training)
    assert "took sdpa" in note and "xformers has no operator" in note


def test_xformers_that_is_absent_or_broken_is_refused(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = DiffusionModel.load(pipeline).unet
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(UserError, match=r"not installed.*pip install -e '\.\[xformers\]'"):
        prepare_unet(unet, "xformers")
    install(monkeypatch, "xformers.ops")
    with pytest.raises(UserError, match="xformers cannot be imported .ImportError"):
        prepare_unet(unet, "xformers")


def config_of(**options: Any) -> Any:
    return tiny_config(Path("run"), Path("base"), Path("shards"), **options)


def test_precision_that_a_gpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce GTX 1080")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with pytest.raises(UserError, match="bf16-mixed needs.*GTX 1080 does not; use 16-mixed"):
        check_device(config_of(**{"trainer.precision": "bf16-mixed"}), gpu)
    with pytest.raises(UserError, match="tf32=true needs compute capability 8.0.*GTX 1080"):
        check_tf32(gpu, "trainer.tf32")
    with pytest.raises(UserError, match="dtype=bfloat16 needs.*GTX 1080.*use float16"):
        check_dtype(gpu, "bfloat16")
    check_device(config_of(**{"trainer.precision": "16-mixed"}), gpu)
    check_dtype(gpu, "float16")


def test_more_devices_than_gpus_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(**{"trainer.devices": 2})
    config.run_dir = str(tmp_path / "run")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        "blackpoint.train.cluster.device.training_device", lambda: torch.device("cuda")
    )
    with pytest.raises(UserError, match="trainer.devices=2 needs 2 GPUs.*sees 1; set .*devices=1"):
        blackpoint.train.run.fit(config)
    assert not list(tmp_path.iterdir())
    check_count(config, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_count(config, torch.device("cuda"))


def test_tf32_sets_products_and_convolutions() -> None:
    before = torch.backends.cudnn.allow_tf32
    try:
        for enabled, precision in ((True, "high"), (False, "highest")):
            set_tf32(enabled)
            assert torch.get_float32_matmul_precision() == precision
            assert torch.backends.cudnn.allow_tf32 is enabled
    finally:
        torch.backends.cudnn.allow_tf32 = before


class FailingStep(EightBitStandIn):
    def step(self, closure: Any = None) -> None:
        raise RuntimeError("no kernel image for cpu")


class IdleStep(EightBitStandIn):
    def step(self, closure: Any = None) -> None:
        pass


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (None, r"not installed.*pip install -e '\.\[eight-bit\]'"),
        (FailingStep, "8-bit step fails on cpu .RuntimeError: no kernel image"),
        (IdleStep, "8-bit step on cpu is wrong"),
    ],
)
def test_eight_bit_optimizer_that_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, optimizer: type | None, reason: str
) -> None:
    if optimizer is None:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    else:
        install(monkeypatch, "bitsandbytes.optim", AdamW8bit=optimizer)
    config = config_of(**{"optimizer.name": "adamw_8bit"})
    with pytest.raises(UserError, match=f"adamw_8bit cannot run here: .*{reason}"):
        check_device(config, torch.device("cpu"))


def test_compile_without_a_compiler_is_refused(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    unet = DiffusionModel.load(pipeline).unet
    with pytest.raises(UserError, match="compile=true needs a C.. compiler.*no-such-compiler.*CXX"):
        prepare_unet(unet, compile=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"compile_mode=max-autotune is of trainer\.compile=true; set it"),
        (
            {"trainer.compile": True, "data.buckets.enabled": True, "data.buckets.step_px": 8},
            r"compile_mode=max-autotune and data\.buckets\.enabled=true do not combine: .*default",
        ),
    ],
)
def test_a_mode_of_compilation_needs_one_shape(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(**{"trainer.compile_mode": "max-autotune", **options})


def test_sizes_that_are_compiled_are_listed(pipeline: Path, tmp_path: Path) -> None:
    options = {"data.buckets.enabled": True, "data.buckets.step_px": 8}
    config = tiny_config(tmp_path / "run", pipeline, write_images(tmp_path, 20), **options)
    images = CaptionedImages(config.data, config.seed, config.batch_size)
    images.prepare_data()
    images.setup("fit")
    text = programs_note(images)
    sizes = images.sizes()
    assert len(sizes) > 1 and f": {len(sizes)} (" in text
    assert all(f"{width} x {height}" in text for width, height in sizes[:12])
