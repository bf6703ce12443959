"""Laws of `blackpoint sample`: what it writes, and what it refuses before writing anything."""

import json
import sys

import numpy
import pytest
import torch
from PIL import Image

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.runtime.picture_grid import caption_grid
from blackpoint.sampling.runtime.pictures import to_picture
from blackpoint.sampling.sample import SampleConfig, read_prompts, sample_to_folder
from blackpoint.scripts.cli import main
from tests.tiny_pipeline import make_tiny_pipeline


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.fixture(scope="module")
def zero_snr_checkpoint(tmp_path_factory):
    return make_tiny_pipeline(
        tmp_path_factory.mktemp("tiny") / "zero_snr",
        scheduler={
            "_class_name": "DDIMScheduler",
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
    )


def test_pictures_rows_and_grid_are_written(zero_snr_checkpoint, tmp_path, capsys):
    output = tmp_path / "deep" / "out"
    prompts = '["a red one on a black background", "a blue two"]'
    arguments = [f"checkpoint={zero_snr_checkpoint}", f"prompts={prompts}", f"output={output}"]
    status = main(["sample", *arguments, "seed=3", "num_images=2", "num_steps=2", "batch_size=3"])
    assert status == 0, capsys.readouterr().err
    assert str(output) in capsys.readouterr().out
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["seed"], row["file"]) for row in rows] == [
        ("a red one on a black background", 3, "images/0_3.png"),
        ("a red one on a black background", 4, "images/0_4.png"),
        ("a blue two", 3, "images/1_3.png"),
        ("a blue two", 4, "images/1_4.png"),
    ]
    assert {path.name for path in output.iterdir()} == {
        "images",
        "samples.jsonl",
        "grid.png",
        "sample.json",
    }
    model = DiffusionModel.load(zero_snr_checkpoint)
    expected = model.sample(["a blue two"], seeds=[4], num_steps=2)[0]
    painted = numpy.asarray(Image.open(output / "images/1_4.png")).astype(int)
    difference = abs(painted - numpy.asarray(to_picture(expected)).astype(int))
    assert difference.max() <= 1  # alone and in a batch agree to 1e-4, so to a step of rounding
    assert Image.open(output / "grid.png").width > 2 * 16


def test_eta_interval_and_speed_options_reach_the_sampler(zero_snr_checkpoint, tmp_path):
    config = SampleConfig(
        checkpoint=str(zero_snr_checkpoint),
        prompts="a one",
        output=str(tmp_path / "out"),
        num_steps=4,
        eta=0.5,
        guidance_interval=[300, 800],
        channels_last=True,
        attention="sdpa",
    )
    sample_to_folder(config)
    painted = numpy.asarray(Image.open(tmp_path / "out/images/0_0.png")).astype(int)
    model = DiffusionModel.load(zero_snr_checkpoint)

    def distance(**options):
        expected = model.sample("a one", [0], num_steps=4, **options)[0]
        return abs(painted - numpy.asarray(to_picture(expected)).astype(int)).max()

    assert distance(eta=0.5, guidance_interval=(300, 800)) <= 1
    assert distance(eta=0.5) > 1
    assert distance(guidance_interval=(300, 800)) > 1


def test_auto_has_no_word_where_xformers_is_not_installed(
    zero_snr_checkpoint, tmp_path, caplog, monkeypatch
):
    monkeypatch.setitem(sys.modules, "xformers", None)
    arguments = [f"checkpoint={zero_snr_checkpoint}", 'prompts=["a one", "a two"]', "num_steps=1"]
    assert main(["sample", *arguments, f"output={tmp_path / 'out'}", "batch_size=1"]) == 0
    assert "xformers" not in caplog.text and "sdpa" not in caplog.text


def test_prompts_come_from_a_text_file_and_seeds_from_a_list(checkpoint, tmp_path):
    (tmp_path / "prompts.txt").write_text("a one\n\n  a two  \n")
    config = SampleConfig(
        checkpoint=str(checkpoint),
        prompts=str(tmp_path / "prompts.txt"),
        output=str(tmp_path / "out"),
        seeds=[7, 1],
        num_steps=1,
        guidance_scale=1.0,
    )
    sample_to_folder(config)
    rows = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").open()]
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        ("a one", 7),
        ("a one", 1),
        ("a two", 7),
        ("a two", 1),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["num_steps=0"], "num_steps=0"),
        (["num_steps=1001"], r"num_steps=1001.*1000"),
        (["sampler=dpmpp2m"], r"sampler.*dpmpp2m.*dpmpp_2m"),
        (["height=17"], r"height.*17"),
        (["width=-2"], r"width.*-2"),
        (["num_images=0"], "num_images=0"),
        (["batch_size=0"], "batch_size=0"),
        (["seed=-1"], r"seed=-1: a seed must be from 0 to 18446744073709551615"),
        ([f"seed={2**64}"], r"seed=18446744073709551616: a seed must be from 0"),
        ([f"seed={2**64 - 1}", "num_images=2"], r"seed=\d+ with 2 in a row: a seed must"),
        (["seeds=[3, -1]"], r"seeds=-1: a seed must be from 0"),
        ([f"seeds=[{2**64}]"], r"seeds=18446744073709551616: a seed must be from 0"),
        (["guidance_scal=3"], r"guidance_scal.*guidance_scale"),
        (["num_steps=many"], r"num_steps.*many.*int"),
        (["prompts=[]"], "prompts is empty"),
        (["prompts=[1]"], "quote a prompt that reads as a number"),
        (["prompts=nowhere.txt"], "nowhere.txt: no such file"),
        (["device=toaster"], "device.*toaster"),
        (["checkpoint=/nowhere/at/all"], "/nowhere/at/all"),
        (["eta=2"], r"eta=2.*0\.\.1"),
        (["eta=0.5", "sampler=euler"], "eta=0.5 goes with sampler=ddim alone"),
        (["guidance_interval=[200]"], r"guidance_interval=\[200\] must be two timesteps"),
        (["guidance_interval=[800,200]"], r"guidance_interval=.*the lower first"),
        (["guidance_interval=often"], r"guidance_interval.*often"),
        (["guidance_scale=-1"], "guidance_scale=-1"),
        (["guidance_rescale=2"], "guidance_rescale=2"),
        (["attention=flash"], r"attention.*flash"),
        (["attention=xformers"], r"attention=xformers cannot run here.*use attention=sdpa"),
    ],
)
def test_wrong_input_exits_2_with_a_remedy_and_writes_nothing(
    zero_snr_checkpoint, tmp_path, capsys, arguments, message
):
    output = tmp_path / "out"
    given = [f"checkpoint={zero_snr_checkpoint}", "prompts=a one", f"output={output}"]
    assert main(["sample", *given, *arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    import re

    assert re.search(message, error), error
    assert not output.exists()


def test_leading_spacing_on_a_zero_snr_checkpoint_is_refused(tmp_path, capsys):
    folder = make_tiny_pipeline(
        tmp_path / "sd",
        scheduler={
            "_class_name": "DDIMScheduler",
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "leading",
        },
    )
    arguments = [f"checkpoint={folder}", "prompts=a one", f"output={tmp_path / 'out'}"]
    assert main(["sample", *arguments]) == 2
    error = capsys.readouterr().err
    assert "trailing" in error and "allow_unsound=true" in error
    assert not (tmp_path / "out").exists()
    assert main(["sample", *arguments, "allow_unsound=true", "num_steps=1"]) == 0
    assert (tmp_path / "out/images/0_0.png").exists()


def test_taken_output_is_refused_and_kept(checkpoint, tmp_path, capsys):
    (tmp_path / "note.txt").write_text("mine")
    arguments = [f"checkpoint={checkpoint}", "prompts=a one", f"output={tmp_path}"]
    assert main(["sample", *arguments]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_prompts_of_every_shape_are_read(tmp_path):
    assert read_prompts("a one") == ["a one"]
    assert read_prompts(["a one", ""]) == ["a one", ""]
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(str(tmp_path / "empty.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="UTF-8"):
        read_prompts(str(tmp_path / "latin.txt"))
    for wrong in (None, 3, {"a": "b"}, [["a"]]):
        with pytest.raises(UserError, match="must be a prompt"):
            read_prompts(wrong)


def test_pictures_round_to_nearest_and_non_finite_pixels_are_refused():
    image = torch.tensor([0.0, 1.0, 0.5 / 255, 1.6 / 255]).view(1, 2, 2).expand(3, 2, 2)
    assert numpy.asarray(to_picture(image))[..., 0].tolist() == [[0, 255], [0, 2]]
    with pytest.raises(RunFailed, match="non-finite"):
        to_picture(image * float("nan"))


def test_grid_places_every_picture():
    rows = [[Image.new("RGB", (64, 64), color) for color in ("black", "white")]] * 3
    grid = caption_grid(["a", "b", "c"], rows, ["seed 0", "seed 1"])
    pixels = numpy.asarray(grid)
    assert (pixels == 0).all(-1).sum() >= 3 * 64 * 64
    assert (pixels == 255).all(-1).sum() >= 3 * 64 * 64
