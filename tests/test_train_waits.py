"""Neither the host nor a GPU waits for the other between two rows of metrics.

Three ways to see it. On a CPU a whole run is watched: torch's function mode sees each number that
Python asks of a tensor (`.item()`, `bool()`, `.tolist()`, `.cpu()`), a dispatch mode those that
torch asks itself and operations whose size depends on data. On fake tensors of "cuda:0" (see
tests/test_fake_device.py) a dispatch mode sees copies that the host waits for, and raises where a
number of the GPU is asked for. And where there is a GPU, CUDA itself tells.

Not counted: what the loss scaling of fp16 reads at every step by its nature.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils.pin_memory import pin_memory

import blackpoint.train.run
from blackpoint.data.module import CaptionedImages
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.runtime.transfer import sent
from blackpoint.train.callbacks.interruption import StopOnSignal
from blackpoint.train.callbacks.trainer import build_trainer
from blackpoint.train.callbacks.watch import Watch
from blackpoint.train.draws import Draws
from blackpoint.train.ema import Ema
from blackpoint.train.module import FineTuner
from tests import test_fake_device
from tests.devices import fake_gpus
from tests.test_fake_device import GPU, OPTIONS, batch_of, tuner_on_gpu
from tests.tiny_run import tiny_config, tiny_tuner

mode = test_fake_device.mode
aten = torch.ops.aten
READS = {"item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__int__", "__float__"}
READS |= {"__index__", "__complex__", "__format__", "__repr__"}
OPERATORS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"}
OPERATORS |= {"_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}
ALL_DRAWS = {
    "loss.timesteps": "stratified",
    "loss.terminal_share": 0.3,
    "loss.input_perturbation": 0.1,
    "dropout.probability": 0.1,
}


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )


def slow(name: str, fast: str) -> Any:
    """Marks all values of a parameter but one."""
    return name if name == fast else pytest.param(name, marks=pytest.mark.slow)


def between_rows(
    patch: pytest.MonkeyPatch, opened: Callable[[Any], None], closed: Callable[[], None]
) -> None:
    """Calls `opened` with the trainer after the first row of metrics and each that follows, and
    `closed` before the next; not after the last one."""
    original = Watch._log
    is_open: list[bool] = []

    def log(self: Watch, trainer: Any, module: Any) -> None:
        if is_open:
            is_open.clear()
            closed()
        original(self, trainer, module)
        if trainer.global_step < trainer.max_steps:
            is_open.append(True)
            opened(trainer)

    patch.setattr(Watch, "_log", log)


class Reads:
    """The numbers that are asked of tensors while it is open, but for those of `on_host`."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.on_host: list[int] = []
        self._modes = ExitStack()

    def open(self, trainer: Any) -> None:
        # train/ema.py counts on the host.
        averages = [each for each in trainer.callbacks if isinstance(each, Ema)]
        self.on_host = [id(each._average_model.n_averaged) for each in averages]
        self._modes.enter_context(Functions(self))
        self._modes.enter_context(Operators(self))

    def close(self) -> None:
        self._modes.close()

    def note(self, name: str, args: Any) -> None:
        if not args or id(args[0]) not in self.on_host:
            self.seen.append(name)


class Functions(TorchFunctionMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            self.reads.note(func.__name__, args)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masks = name in ("index", "index_put_") and any(
            i.dtype == torch.bool for i in args[1] if i is not None
        )
        if name in OPERATORS or masks:
            self.reads.note(str(func), args)
        return func(*args, **(kwargs or {}))


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"trainer.accumulate_grad_batches": 2, "trainer.gradient_clip": 0.0},
    "all draws": {**ALL_DRAWS, "loss.uncertainty": True, "loss.weighting": "min_snr"},
    "adapters": {"lora.rank": 2, "lora.dropout": 0.1, "ema.enabled": False},
}


def rows_at_2_4_and_5(folder: Path, pipeline: Path, shards: Path, **options: Any) -> Any:
    """A run whose batches are read in another process."""
    values = {
        "trainer.max_steps": 5,
        "trainer.log_every_steps": 2,
        "trainer.validate_every_steps": 0,
        "trainer.checkpoint_every_steps": 5,
        "watch.weights_every_steps": 0,
        "data.num_workers": 1,
    }
    return tiny_config(folder, pipeline, shards, **values | options)


@pytest.mark.parametrize("name", [slow(name, "plain") for name in RUNS])
def test_nothing_is_asked_of_a_tensor_between_two_rows(
    name: str, pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads()
    between_rows(monkeypatch, reads.open, reads.close)
    steps: list[int] = []
    original = FineTuner.training_step

    def training_step(self: FineTuner, batch: Any, batch_index: int) -> Any:
        if reads._modes._exit_callbacks:  # type: ignore[attr-defined]
            steps.append(self.global_step)
        return original(self, batch, batch_index)

    monkeypatch.setattr(FineTuner, "training_step", training_step)
    config = rows_at_2_4_and_5(tmp_path / "run", pipeline, shards, **RUNS[name])
    assert blackpoint.train.run.fit(config) == 0
    assert sorted(set(steps)) == [2, 3, 4]
    assert reads.seen == []


def test_what_is_asked_of_a_tensor_is_seen() -> None:
    """The check itself."""
    x, reads = torch.arange(3.0), Reads()
    asked: list[Callable[[], Any]] = [
        lambda: x[0].item(),
        lambda: bool(x.any()),
        lambda: int(x.sum()),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.numpy(),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: f"{x.sum():.3f}",
        lambda: torch.equal(x, x),
        lambda: torch.nn.functional.one_hot(x.long()),
    ]
    for ask in asked:
        reads.seen.clear()
        reads.on_host = []
        with Functions(reads), Operators(reads):
            ask()
        assert reads.seen, ask
    reads.seen.clear()
    with Functions(reads), Operators(reads):
        torch.where(x > 1, x, 0).sum().clamp(max=1).isfinite().logical_not()
    assert not reads.seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("name", RUNS)
def test_cuda_waits_for_nothing_between_two_rows(
    name: str, pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    between_rows(
        monkeypatch,
        lambda trainer: torch.cuda.set_sync_debug_mode("error"),
        lambda: torch.cuda.set_sync_debug_mode("default"),
    )
    config = rows_at_2_4_and_5(tmp_path / "run", pipeline, shards, **RUNS[name])
    try:
        assert blackpoint.train.run.fit(config) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Waits(TorchDispatchMode):
    """Copies to a fake GPU that the host waits for, numbers read from it, and float64 there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.waits(func._schema.name.removeprefix("aten::"), args, kwargs or {}, result):
            self.seen.append(str(func))
        if isinstance(result, Tensor) and result.device == GPU and result.dtype == torch.float64:
            self.seen.append(f"{func} in float64")
        return result

    def waits(self, name: str, args: Any, kwargs: Any, result: Any) -> bool:
        if name in ("index", "index_put_"):  # which copies indices by itself
            indices = [index for index in args[1] if index is not None]
            return args[0].device == GPU and any(index.device != GPU for index in indices)
        if name not in ("_to_copy", "copy_"):
            return False
        source = args[0] if name == "_to_copy" else args[1]
        is_free = kwargs.get("non_blocking", False) or (name == "copy_" and args[2:] == (True,))
        return source.device != result.device and not (is_free and result.device == GPU)


@pytest.mark.parametrize("name", [slow(name, "plain") for name in OPTIONS])
@pytest.mark.parametrize("kind", [slow(kind, "latents") for kind in ("images", "latents")])
def test_a_step_copies_to_a_gpu_without_waiting(
    name: str,
    kind: str,
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    mode: FakeTensorMode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the second step: the first one lays tables there that are used from then on.

    A step's new captions are encoded together.
    """
    config = tiny_config(tmp_path / "run", pipeline, shards, **OPTIONS[name])
    tuner = tuner_on_gpu(DiffusionModel.load(pipeline), config, mode)
    waits = Waits()
    encoded: list[int] = []
    original = DiffusionModel.encode_prompts

    def encode_prompts(self: DiffusionModel, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        encoded.append(len(prompts))
        return original(self, prompts, *args, **kwargs)

    monkeypatch.setattr(DiffusionModel, "encode_prompts", encode_prompts)
    for captions in (["a one", "a two"], ["a three", "a two"]):
        batch = batch_of(captions)
        if kind == "latents":
            del batch["image"], batch["caption"]
            batch |= {"moments": torch.zeros(2, 8, 8, 8), "prompt_embeds": torch.zeros(2, 16, 32)}
        batch["draws"] = tuner.draw(batch)
        waits.seen.clear()
        with mode, waits:
            moved = tuner.transfer_batch_to_device(batch, GPU, 0)
            tuner.training_step(moved, 0)
        tensors = [value for value in moved.values() if isinstance(value, Tensor)]
        tensors += [part for part in moved["draws"] if part is not None]
        # DDP copies every tensor of a batch that is elsewhere, and the host waits.
        assert {tensor.device for tensor in tensors} == {GPU}
    assert waits.seen == []
    assert encoded == ([2, 1] if kind == "images" else [])


def test_copies_that_wait_are_seen(mode: FakeTensorMode) -> None:
    """The check itself."""
    host = torch.zeros(3)
    with mode:
        there = torch.zeros(3, device=GPU)
        asked: list[Callable[[], Any]] = [
            lambda: host.to(GPU),
            lambda: there.cpu(),
            lambda: there[torch.tensor([0])],
            lambda: torch.tensor([1.0], device=GPU),
            lambda: there.copy_(host),
            lambda: there.double(),
        ]
        for ask in asked:
            with Waits() as waits:
                ask()
            assert waits.seen, ask
        with Waits() as waits:
            there.copy_(sent(host, GPU), non_blocking=True)
            there[sent(torch.tensor([0]), GPU)].float().isfinite()
        assert waits.seen == []


def test_what_is_sent_to_a_gpu_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a loader makes of the draws; only a GPU has pinned memory."""
    fake_gpus(monkeypatch)
    calls: list[Any] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(Tensor, "to", lambda self, *args, **kwargs: calls.append((args, kwargs)))
    sent(torch.zeros(2), GPU)
    assert calls == ["pinned", ((GPU,), {"non_blocking": True})]
    calls.clear()
    sent(torch.zeros(2), torch.device("cpu"))
    assert calls == [((torch.device("cpu"),), {"non_blocking": True})]
    draws = Draws(None, *(torch.zeros(2) for _ in range(4)))
    calls.clear()
    assert isinstance(pin_memory({"draws": draws})["draws"], Draws)
    assert calls == ["pinned"] * 4


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, ALL_DRAWS], ids=["plain", "all draws"])
def test_draws_of_the_reader_are_those_of_the_step(
    num_workers: int, options: dict[str, Any], pipeline: Path, shards: Path
) -> None:
    """To the bit; and they are a function that any other process can be sent."""
    is_plain = not options
    options = {"data.shards": str(shards), "data.num_workers": num_workers, **options}
    tuner = tiny_tuner(pipeline, **options)
    assert pickle.loads(pickle.dumps(tuner.draw)) == tuner.draw
    images = CaptionedImages(tuner.config.data, tuner.config.seed, 4, start_sample=0)
    images.prepare_data()
    images.draw = tuner.draw
    batches: Iterator[dict[str, Any]] = iter(images.train_dataloader())
    for _ in range(4):  # 12 samples: into the second epoch
        batch = next(batches)
        found = batch.pop("draws")
        expected = tuner.draws(batch)
        options_drawn = [p is not None for p in (found.dropout_seeds, found.perturbation)]
        assert options_drawn == [not is_plain] * 2
        assert_close(found._asdict(), expected._asdict(), rtol=0, atol=0)


def test_lightnings_own_signal_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads a number from the device before every batch of several processes."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *args, **kwargs: asked.append(args))
    for listens in (False, True):
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        stop = StopOnSignal(Watch(1, 1))
        if listens:
            stop.listen(trainer)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
        stop.restore_handlers()
        assert len(asked) == 1


@pytest.mark.parametrize(
    ("options", "is_static"),
    [
        ({}, True),
        ({"trainer.accumulate_grad_batches": 2}, False),
        ({"trainer.compile": True}, False),
    ],
)
def test_gradients_of_several_processes_lie_in_the_buckets(
    options: dict[str, Any], is_static: bool, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, tmp_path, tmp_path, **options, **{"trainer.devices": 2})
    trainer = build_trainer(config, tmp_path, [], [])
    assert isinstance(trainer.strategy, DDPStrategy)
    settings = trainer.strategy._ddp_kwargs
    assert settings["static_graph"] == is_static
    assert settings["gradient_as_bucket_view"] and not settings["broadcast_buffers"]
