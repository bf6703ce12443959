"""Out of memory: exit status 1 and one message with the peak, what is kept and what needs less.

The errors are torch's own words, raised by stand-ins: on a GPU that is not there too.
"""

import dataclasses
import os
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from blackpoint.data.files.errors import RunFailed
from blackpoint.sampling.evaluation.config import RESULT_INVARIANT_KEYS, MetricsConfig
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.options import SampleConfig
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.scripts import cli
from blackpoint.scripts.config import load, to_yaml
from blackpoint.scripts.out_of_memory import (
    OTHER_RUN,
    explained,
    is_out_of_memory,
    out_of_memory,
    remedies,
)
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.encode.config import EncodeConfig
from blackpoint.train.records.resume_keys import rule_of
from tests.devices import NEW, OLD, fake_gpus
from tests.tiny_run import stop_in_step, tiny_config

ON_GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.64 GiB of "
    "which 1.21 GiB is free."
)
ON_CPU = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4000000000 bytes. Error code 12 (Cannot allocate memory)"
)
GIVEN: dict[type, list[str]] = {
    TrainConfig: ["run_dir=r", "checkpoint=c", "data.shards=s", "batch_size=4"],
    SampleConfig: ["checkpoint=c", "prompts=p", "output=o", "batch_size=4"],
    SearchConfig: [
        *("checkpoint=c", "prompts=p", "output=o", "batch_size=4", "budget_nfe=100"),
        *("verifiers.black.kind=luminance", "verifiers.black.target=0"),
    ],
    MetricsConfig: ["checkpoint=c", "prompts=p", "output=o", "batch_size=4"],
    EncodeConfig: ["source=s", "checkpoint=c", "output=o", "batch_size=4"],
}
"""What each verb with a batch is given."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """Returns what makes torch tell of two GPUs, of which the second was full."""

    def install(capability: tuple[int, int]) -> None:
        fake_gpus(monkeypatch, capability, count=2)
        properties = types.SimpleNamespace(total_memory=25_400_000_000)
        monkeypatch.setattr(
            torch.cuda, "max_memory_allocated", lambda device: int(1e9 + 23e9 * device.index)
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    return install


@pytest.mark.parametrize("capability", [None, OLD, NEW])
@pytest.mark.parametrize("config_class", GIVEN, ids=lambda given: given.__name__)
def test_remedies_are_settings_of_the_verb_and_end(
    config_class: type, capability: Any, gpu: Any
) -> None:
    """Each is taken, alone, by the config that lacks it; once taken it is not named again."""
    if capability:
        gpu(capability)
    given, seen = list(GIVEN[config_class]), []
    while named := [s for s, _ in remedies(load(config_class, given)) if "=" in s]:
        for settings in named:
            load(config_class, [*given, *settings.split()])
        assert named[0] not in seen
        seen.append(named[0])
        given += named[0].split()
    assert any(settings.startswith("batch_size=") for settings in seen)
    on_gpu_alone = {"trainer.precision=bf16-mixed"} if capability == NEW else set()
    on_gpu_alone |= {"trainer.precision=16-mixed"} if capability == OLD else set()
    if config_class is TrainConfig:
        assert {s for s in seen if s.startswith("trainer.precision")} == on_gpu_alone
    formats = [s for s in seen if "dtype=" in s]
    is_encode = config_class is EncodeConfig
    half = {None: "bfloat16", OLD: "float16", NEW: None}[capability]
    if config_class is not TrainConfig:
        name = "encoder_dtype" if is_encode else "dtype"
        is_named = half is not None and not (is_encode and half == "float16")
        assert formats == ([f"{name}={half}"] if is_named else [])


@pytest.mark.parametrize("capability", [None, NEW])
def test_what_goes_on_in_the_same_run_is_what_resume_allows(capability: Any, gpu: Any) -> None:
    if capability:
        gpu(capability)
    for settings, note in remedies(load(TrainConfig, GIVEN[TrainConfig])):
        keys = [setting.partition("=")[0] for setting in settings.split() if "=" in setting]
        assert (OTHER_RUN not in note) == bool(keys and all(rule_of(key) for key in keys)), settings
    assert "batch_size" in RESULT_INVARIANT_KEYS


def test_a_step_takes_as_many_images_with_the_smaller_batch() -> None:
    config = load(TrainConfig, [*GIVEN[TrainConfig], "trainer.devices=2"])
    settings = dict(remedies(config))
    assert "batch_size=2 trainer.accumulate_grad_batches=2" in settings
    config = load(TrainConfig, [*GIVEN[TrainConfig], "trainer.devices=4"])
    assert not any("batch_size" in each for each, _ in remedies(config))


def test_cached_latents_are_no_remedy_where_they_are_used(tmp_path: Path) -> None:
    given = [*GIVEN[TrainConfig], f"data.shards={tmp_path}"]
    assert any("data encode" in settings for settings, _ in remedies(load(TrainConfig, given)))
    (tmp_path / "encoding.json").touch()
    assert not any("data encode" in settings for settings, _ in remedies(load(TrainConfig, given)))


@pytest.mark.parametrize(
    "error, is_one",
    [
        (torch.OutOfMemoryError(ON_GPU), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError(ON_CPU), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_loader_worker_is_explained_also_where_another_error_hides_it() -> None:
    config = load(TrainConfig, GIVEN[TrainConfig])
    loader: DataLoader[int] = DataLoader([0], num_workers=1, worker_init_fn=die)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="call iter first") as hidden:
        try:
            next(iter(loader))
        except RuntimeError:
            raise RuntimeError("call iter first")  # noqa: B904
    text = explained(config, hidden.value)
    assert text is not None and text.endswith(
        "the same command continues; fewer data.num_workers need less memory"
    )
    assert explained(config, RuntimeError("another")) is None


def test_the_peak_is_that_of_the_fullest_gpu_or_of_the_process(gpu: Any) -> None:
    gpu(NEW)
    config = load(SampleConfig, GIVEN[SampleConfig])
    text = out_of_memory(config, torch.OutOfMemoryError(ON_GPU))
    assert "held up to 24.0 GB of the 25.4 GB of GeForce GTX 1080, and 2.50 GiB more" in text
    assert text.endswith("to need less: batch_size=2 (the same results to rounding)")
    assert "of the machine's memory, and 4000000000 bytes" in out_of_memory(
        config, RuntimeError(ON_CPU)
    )


@pytest.mark.slow
def test_a_training_keeps_its_checkpoint_and_goes_on_with_a_remedy(
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir, file = tmp_path / "run", tmp_path / "config.yaml"
    file.write_text(to_yaml(tiny_config(run_dir, pipeline, shards)))
    monkeypatch.setattr(
        "blackpoint.train.run.export", lambda source, output, weights: output.mkdir()
    )

    def fail() -> None:
        raise torch.OutOfMemoryError(ON_GPU)

    with monkeypatch.context() as patch:
        stop_in_step(patch, 1, fail)
        assert cli.main(["train", str(file)]) == 1
    assert "no checkpoint was written yet; to need less: " in capsys.readouterr().err
    with monkeypatch.context() as patch:
        stop_in_step(patch, 4, fail)
        assert cli.main(["train", str(file)]) == 1
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("blackpoint: ")]
    saved = run_dir / "checkpoints" / "step_00000003.ckpt"
    (line,) = lines
    assert line.startswith("blackpoint: out of memory: ") and f"; {saved} is kept; " in line
    remedy = "batch_size=2 trainer.accumulate_grad_batches=2"
    assert f"{remedy} (the same images per step)" in line and "; plan=true plans 0.0 GB; " in line
    assert cli.main(["train", str(file), *remedy.split()]) == 0
    assert (run_dir / "checkpoints" / "step_00000006.ckpt").exists()


@pytest.mark.parametrize("verb", ["sample", "search", "evaluate"])
def test_sampling_verbs_name_a_smaller_batch(
    verb: str,
    pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def denoiser(*_: Any, **__: Any) -> Any:
        raise RuntimeError(ON_CPU)

    monkeypatch.setattr(DiffusionModel, "denoiser", denoiser)
    given = [f"checkpoint={pipeline}", "prompts=snow", f"output={tmp_path / 'out'}", "num_steps=2"]
    if verb == "search":
        given += ["budget_nfe=8", "verifiers.black.kind=luminance", "verifiers.black.target=0"]
    assert cli.main([verb, *given]) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert "to need less: batch_size=8 (the same results to rounding); or dtype=bfloat16" in message


def test_what_failed_for_another_reason_keeps_its_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cell that the system killed is named by the sweep itself."""
    config = dataclasses.make_dataclass("Config", [("seed", int, 0)])
    module = types.ModuleType("toy_verb")
    module.config_class = lambda: config  # type: ignore[attr-defined]

    def run(config: Any) -> int:
        raise RunFailed("killed by SIGKILL (out of memory?)")

    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_verb", module)
    monkeypatch.setitem(cli.VERBS, "toy", ("toy_verb", "Plays."))
    assert cli.main(["toy"]) == 1
    assert capsys.readouterr().err == "blackpoint: killed by SIGKILL (out of memory?)\n"
