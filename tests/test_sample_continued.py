"""A stopped `blackpoint sample` continues: the same command makes the pictures that are missing."""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from blackpoint.sampling import sample
from blackpoint.sampling.model import DiffusionModel
from blackpoint.scripts.cli import main
from tests.interrupted_verb import interrupted
from tests.tiny_pipeline import make_tiny_pipeline

PROMPTS = '["a red one on a black background", "a blue two"]'
NAMES = ["0_3.png", "0_4.png", "1_3.png", "1_4.png"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "sd")


def arguments(checkpoint: Path, output: Path, *more: str) -> list[str]:
    given = [f"checkpoint={checkpoint}", f"prompts={PROMPTS}", f"output={output}", "seed=3"]
    return ["sample", *given, "num_images=2", "num_steps=2", "batch_size=1", *more]


@pytest.fixture(scope="module")
def unbroken(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "out"
    assert main(arguments(checkpoint, output)) == 0
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Stop(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize("pictures", range(5))
def test_the_same_command_makes_the_missing_pictures_alone(
    checkpoint: Path,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pictures: int,
) -> None:
    """Stopped before the picture of that number, or before the grid."""
    write, written = sample.write_png, list[str]()

    def stopping(path: Path, picture: Any) -> None:
        if len(written) == pictures:
            raise Stop
        written.append(path.name)
        write(path, picture)

    monkeypatch.setattr(sample, "write_png", stopping)
    with pytest.raises(Stop):
        main(arguments(checkpoint, tmp_path / "out"))
    assert written == NAMES[:pictures]
    with (tmp_path / "out" / "samples.jsonl").open("a") as file:
        file.write('{"prompt": "torn')
    pictures = 10
    assert main(arguments(checkpoint, tmp_path / "out")) == 0
    assert written == [*NAMES, "grid.png"]
    assert contents(tmp_path / "out") == contents(unbroken)


def test_a_finished_folder_is_left_as_it_is_and_needs_no_model(
    checkpoint: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(unbroken)
    monkeypatch.setattr(DiffusionModel, "load", None)
    assert main(arguments(checkpoint, unbroken, "batch_size=4", "attention=sdpa")) == 0
    assert contents(unbroken) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("num_steps=3", "num_steps: 2 there, 3 now"),
        ("seed=4", r"seeds: \[3, 4\] there, \[4, 5\] now"),
        ("num_images=3", "seeds:"),
        ("prompts=a one", "other prompts"),
        ("timestep_spacing=trailing", "timestep_spacing: None there, 'trailing' now"),
        ("clip_skip=1", "clip_skip: 0 there, 1 now"),
        ("dtype=bfloat16", "dtype: 'float32' there, 'bfloat16' now"),
    ],
)
def test_other_settings_are_refused(
    checkpoint: Path,
    unbroken: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
    message: str,
) -> None:
    before = contents(unbroken)
    assert main(arguments(checkpoint, unbroken, change)) == 2
    error = capsys.readouterr().err
    assert "holds images of other settings" in error and "choose another output" in error
    assert re.search(message, error), error
    assert contents(unbroken) == before


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_another_checkpoint_at_the_same_path_is_refused_and_a_moved_one_is_not(
    checkpoint: Path,
    unbroken: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    part: str,
) -> None:
    shutil.copytree(unbroken, tmp_path / "out")
    shutil.copytree(checkpoint, tmp_path / "moved")
    (tmp_path / "out" / "images" / "1_3.png").unlink()
    assert main(arguments(tmp_path / "moved", tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == contents(unbroken)
    (tmp_path / "out" / "images" / "1_3.png").unlink()
    [file] = (tmp_path / "moved" / part).glob("*.safetensors")
    save_file({k: v + 1e-3 for k, v in load_file(file).items()}, file, {"format": "pt"})
    assert main(arguments(tmp_path / "moved", tmp_path / "out")) == 2
    assert "has other weights, or another process" in capsys.readouterr().err
    assert not (tmp_path / "out" / "images" / "1_3.png").exists()


def test_a_finished_folder_is_no_answer_for_another_checkpoint(
    checkpoint: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(unbroken)
    assert main(arguments(tmp_path / "nowhere", unbroken)) == 2
    assert "does not exist" in capsys.readouterr().err
    shutil.copytree(checkpoint, tmp_path / "moved")
    assert main(arguments(tmp_path / "moved", unbroken)) == 0
    [file] = (tmp_path / "moved" / "unet").glob("*.safetensors")
    save_file({k: v + 1e-3 for k, v in load_file(file).items()}, file, {"format": "pt"})
    assert main(arguments(tmp_path / "moved", unbroken)) == 2
    assert "has other weights, or another process" in capsys.readouterr().err
    assert contents(unbroken) == before


@pytest.mark.parametrize("difference", ["none", "settings", "checkpoint"])
def test_of_two_commands_at_once_the_first_keeps_the_folder(
    checkpoint: Path,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    difference: str,
) -> None:
    """The first is run whole while the second makes its first batch."""
    output, sampled, first = tmp_path / "out", DiffusionModel.sample, list[int]()

    def sample_after_the_first(model: DiffusionModel, *args: Any, **settings: Any) -> Any:
        if not first:
            first.append(2)
            first[0] = main(arguments(checkpoint, output))
        return sampled(model, *args, **settings)

    monkeypatch.setattr(DiffusionModel, "sample", sample_after_the_first)
    other = checkpoint
    if difference == "checkpoint":
        other = make_tiny_pipeline(tmp_path / "sd", seed=1)
    more = ["num_steps=3"] if difference == "settings" else []
    assert main(arguments(other, output, *more)) == (0 if difference == "none" else 2)
    assert first == [0]
    message = {"none": "", "settings": "num_steps: 2 there, 3 now", "checkpoint": "other weights"}
    assert message[difference] in capsys.readouterr().err
    assert contents(output) == contents(unbroken)


@pytest.mark.parametrize("kind", ["damaged", "folder"])
def test_what_is_no_picture_is_named_with_the_remedy(
    checkpoint: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    output = tmp_path / "out"
    shutil.copytree(unbroken, output)
    (output / "grid.png").unlink()
    picture = output / "images" / "0_3.png"
    picture.unlink()
    if kind == "folder":
        picture.mkdir()
    else:
        picture.write_bytes((unbroken / "images" / "0_3.png").read_bytes()[:40])
    assert main(arguments(checkpoint, output)) == 2
    error = capsys.readouterr().err
    assert str(picture) in error and "remove it" in error
    picture.rmdir() if kind == "folder" else picture.unlink()
    assert main(arguments(checkpoint, output)) == 0
    assert contents(output) == contents(unbroken)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_record_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "sample.json").write_text(content)
    assert main(arguments(checkpoint, tmp_path)) == 2
    assert "sample.json" in capsys.readouterr().err


def test_a_record_without_a_key_has_its_default(
    checkpoint: Path, unbroken: Path, tmp_path: Path
) -> None:
    """As one of a version that had no such key."""
    shutil.copytree(unbroken, tmp_path / "out")
    record = tmp_path / "out" / "sample.json"
    settings = json.loads(record.read_text())
    record.write_text(json.dumps({k: v for k, v in settings.items() if k != "clip_skip"}))
    assert main(arguments(checkpoint, tmp_path / "out")) == 0


def test_other_timesteps_are_those_of_a_checkpoint_with_that_spacing(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(arguments(checkpoint, tmp_path / "out", "timestep_spacing=trailing")) == 0
    assert "sampled with timestep_spacing=trailing; the checkpoint says leading" in caplog.text
    record = json.loads((tmp_path / "out" / "sample.json").read_text())
    assert record["timestep_spacing"] == "trailing"
    scheduler = {"timestep_spacing": "trailing"}
    other = make_tiny_pipeline(tmp_path / "sd", scheduler=scheduler)
    assert main(arguments(other, tmp_path / "other")) == 0
    for name in NAMES:
        ours, theirs = (tmp_path / folder / "images" / name for folder in ("out", "other"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_leading_timesteps_at_zero_terminal_snr_are_refused_unless_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    zero_snr = {**entries, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    folder = make_tiny_pipeline(tmp_path / "sd", scheduler=zero_snr)
    given = arguments(folder, tmp_path / "out", "timestep_spacing=leading")
    assert main(given) == 2
    assert "timestep_spacing=leading with zero terminal SNR" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*given, "allow_unsound=true"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_stops_it_and_the_same_command_continues(
    checkpoint: Path, unbroken: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output, given = tmp_path / "out", arguments(checkpoint, tmp_path / "out")
    for count in (2, 7):
        found = interrupted(number, count, output, given, is_warm=True)
        assert found.returncode == (-number if number == signal.SIGKILL else 75), found.stderr
        if number != signal.SIGKILL:
            assert f"stopped by {number.name}; the same command continues" in found.stderr
    assert main(given) == 0
    whole = {name: c for name, c in contents(output).items() if not name.endswith(".tmp")}
    assert whole == contents(unbroken)
