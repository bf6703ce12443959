"""What `auto` takes on a device, and who may go on with what was begun in other formats."""

from pathlib import Path
from typing import Any

import pytest
import torch

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.choices import PLAIN_FORMATS
from blackpoint.sampling.options import SampleConfig
from blackpoint.sampling.runtime.precision import current, settle
from blackpoint.scripts.cli import main
from blackpoint.scripts.config import load, to_yaml
from blackpoint.scripts.sweep.config import CLASSES
from blackpoint.scripts.sweep.identity import differing
from blackpoint.train.config.config import TrainConfig
from tests.devices import NEW, OLD, fake_gpus
from tests.tiny_run import tiny_config

CPU, GPU, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
AUTO = dict.fromkeys(PLAIN_FORMATS, "auto")
ON_GPU = {"dtype": "bfloat16", "encoder_dtype": "bfloat16", "tf32": True}


class Said(list[str]):
    """What was said."""

    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [
        (CPU, NEW, PLAIN_FORMATS),
        (MPS, NEW, PLAIN_FORMATS),
        (GPU, NEW, ON_GPU),
        (GPU, (9, 0), ON_GPU),
        (GPU, OLD, PLAIN_FORMATS),
        (GPU, (7, 5), PLAIN_FORMATS),
    ],
)
def test_auto_takes_what_the_device_has_and_says_so_once(
    device: torch.device,
    capability: tuple[int, int],
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_gpus(monkeypatch, capability)
    said = Said()
    assert settle("output=out", AUTO, device, said) == expected
    if expected == PLAIN_FORMATS:
        assert not said
    else:
        [text] = said
        assert "dtype=auto took bfloat16, encoder_dtype=auto took bfloat16" in text
        assert "tf32=auto took true on this GPU" in text


def test_what_is_asked_for_is_taken_and_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch)
    said = Said()
    for asked in (ON_GPU, PLAIN_FORMATS, {"dtype": "float16", "tf32": False}):
        assert settle("output=out", asked, GPU, said) == asked
    assert not said


@pytest.mark.parametrize(
    ("asked", "device", "message"),
    [
        ({"dtype": "bfloat16"}, GPU, "dtype=bfloat16 needs a GPU.*GTX 1080.*use float16"),
        ({"tf32": True}, GPU, "tf32=true needs compute capability 8.0.*GTX 1080 is older"),
        ({"tf32": True}, CPU, "tf32=true needs a GPU .CUDA., and this process.*cpu"),
    ],
)
def test_what_the_device_lacks_is_refused(
    asked: dict[str, Any], device: torch.device, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, OLD)
    with pytest.raises(UserError, match=message):
        settle("output=out", asked, device, Said())
    with pytest.raises(UserError, match=f"trainer.{message}"):
        settle("output=out", asked, device, Said(), prefix="trainer.")


def test_other_formats_than_the_kept_ones_are_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_gpus(monkeypatch)
    asked = {"dtype": "auto", "tf32": "auto"}
    kept = {"dtype": "bfloat16", "tf32": False}
    with pytest.raises(UserError) as on_cpu:
        settle("output=out", asked, CPU, Said(), kept)
    assert str(on_cpu.value) == (
        "output=out: dtype was bfloat16 there, and auto takes float32 on this cpu device; "
        "number formats are not mixed: set dtype=bfloat16 to continue it here"
    )
    with pytest.raises(UserError, match="tf32 was false there, and auto takes true.*set tf32=fal"):
        settle("output=out", asked, GPU, Said(), kept)
    with pytest.raises(UserError, match="computes with dtype=bfloat16 tf32=true"):
        settle("output=out", asked, CPU, Said(), {"dtype": "bfloat16", "tf32": True})
    with pytest.raises(UserError, match="dtype was float16 there, and float32 on this cpu device"):
        settle("output=out", {"dtype": "float32"}, CPU, Said(), {"dtype": "float16"})
    assert settle("output=out", kept, CPU, Said(), kept) == kept


def test_what_has_no_record_goes_on_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch)
    said = Said()
    kept = {"dtype": "float16", "tf32": False}
    asked = dict.fromkeys(kept, "auto")
    assert settle("output=out", asked, GPU, said, kept, is_recorded=False) == kept
    assert said == [
        "output=out was begun without a record of number formats; "
        "it goes on with dtype=float16, tf32=false"
    ]
    with pytest.raises(UserError, match="tf32 was false there, and true"):
        settle("output=out", asked | {"tf32": True}, GPU, said, kept, is_recorded=False)


def test_a_gpu_with_a_number_is_current_while_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise torch asks, and starts, the first GPU."""
    asked = fake_gpus(monkeypatch, count=2)
    with current(CPU), current(GPU):
        assert not asked
    second = torch.device("cuda", 1)
    settle("output=out", {"dtype": "auto"}, second, Said())
    assert asked == [second]


@pytest.mark.parametrize("config_class", [SampleConfig, *CLASSES.values()])
def test_tf32_is_a_word_or_a_truth_value(config_class: type, tmp_path: Path) -> None:
    section = "trainer." if config_class is TrainConfig else ""
    path = tmp_path / "config.yaml"
    for text, value in (("auto", "auto"), ("true", True), ("false", False)):
        path.write_text("trainer:\n  tf32: " + text if section else "tf32: " + text)
        given = [str(path), "checkpoint=x", "output=x", "prompts=x", "budget_nfe=1"]
        given += ["verifiers.dark.kind=luminance", "verifiers.dark.target=0"]
        if config_class is TrainConfig:
            given = [str(path), "checkpoint=x", "run_dir=x", "data.shards=x"]
        elif config_class is SampleConfig:
            given = given[:-3]
        elif config_class is CLASSES["evaluate"]:
            given.remove("budget_nfe=1")
        for argv in (given, [*given, f"{section}tf32={text}"]):
            config = load(config_class, argv)
            holder = config.trainer if isinstance(config, TrainConfig) else config
            assert holder.tf32 is value or holder.tf32 == value
            assert f"tf32: {text}" in to_yaml(config)
        with pytest.raises(UserError, match="tf32 = 'maybe'.*expected auto . true . false"):
            load(config_class, [*given, f"{section}tf32=maybe"])


def test_help_shows_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("train", "sample", "search", "evaluate"):
        assert main([verb, "--help"]) == 0
        assert "tf32  (auto | true | false; default auto)" in capsys.readouterr().out


def test_cells_of_sweeps_keep_their_names() -> None:
    """A default that is now auto is in no digest, as the float32 before it was not."""
    config = tiny_config(Path("run"), Path("base"), Path("shards"))
    assert not {"trainer.tf32", "trainer.encoder_dtype"} & differing(config, ()).keys()
    sample = load(CLASSES["evaluate"], ["checkpoint=x", "output=x", "prompts=x"])
    assert not {"dtype", "tf32"} & differing(sample, ()).keys()
