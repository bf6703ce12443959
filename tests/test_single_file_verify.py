"""Laws of the round trip: what a single file was written from is what each reader gets from it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from blackpoint.data.files.errors import RunFailed
from blackpoint.sampling.export import single_file, verify_file
from blackpoint.sampling.export.export import export
from blackpoint.sampling.export.verify_file import tensor_digests
from blackpoint.sampling.model import DiffusionModel
from blackpoint.scripts.cli import main
from tests.ldm_models import NAMES, PUBLISHED, V, make_ldm_model

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_ldm_model(folder / name, name) for name in NAMES}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_folder_to_file_to_folder_keeps_every_bit(bases, tmp_path, capsys, name):
    """Verified on the way: the file by blackpoint and diffusers, the folder by diffusers."""
    file, back = tmp_path / "x.safetensors", tmp_path / "back"
    arguments = [f"checkpoint={bases[name]}", f"output={file}", "dtype=float32"]
    assert main(["export", *arguments]) == 0
    said = capsys.readouterr().out
    assert "verified against diffusers" in said and file.with_suffix(".txt").read_text() in said
    assert main(["export", f"checkpoint={file}", f"output={back}"]) == 0
    for part, stem in WEIGHTS.items():
        first, second = (load_file(f / part / f"{stem}.safetensors") for f in (bases[name], back))
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert_close(second[key], tensor, rtol=0, atol=0)
    before, after = DiffusionModel.load(bases[name]), DiffusionModel.load(back)
    assert_close(before.process.schedule.alpha_bar, after.process.schedule.alpha_bar)
    for key in ("prediction_type", "timestep_spacing", "set_alpha_to_one"):
        assert getattr(before.process, key) == getattr(after.process, key)
    assert before.image_sides == after.image_sides
    prompt = "a photo of a cat, 42 of them"
    assert before.tokenizer(prompt).input_ids == after.tokenizer(prompt).input_ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "process"), [("float16", PUBLISHED), ("bfloat16", V)], ids=["published", "v"]
)
def test_other_processes_and_formats_are_verified(tmp_path, process, dtype):
    base = make_ldm_model(tmp_path / "base", "small", process)
    file = export(base, tmp_path / "x.safetensors", dtype=dtype)
    read = DiffusionModel.load(file, dtype=getattr(torch, dtype))
    assert read.process.prediction_type == process.prediction_type
    assert not read.process.schedule.is_zero_terminal_snr
    assert tensor_digests(read) == tensor_digests(
        DiffusionModel.load(base, dtype=getattr(torch, dtype))
    )


def test_the_average_or_the_last_step_of_a_run_is_written(bases, tmp_path):
    base = DiffusionModel.load(bases["small"])
    average = {f"unet.{key}": value for key, value in base.unet.state_dict().items()}
    last = {key: value + 1 for key, value in average.items()}
    record = {"base": str(bases["small"]), "process": base.process.to_diffusers()}
    stored = {"state_dict": average, "current_model_state": last, "blackpoint": record}
    torch.save(stored, tmp_path / "run.ckpt")
    for weights, offset in (("ema", 0), ("raw", 1)):
        output = tmp_path / f"{weights}.safetensors"
        export(tmp_path / "run.ckpt", output, weights, verify=False, dtype="float32")
        written = load_file(output)["model.diffusion_model.out.2.bias"]
        assert_close(written, base.unet.conv_out.bias.detach() + offset, rtol=0, atol=0)


def swapped(tensors):
    first, second = (
        f"model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_{x}.weight"
        for x in "qk"
    )
    return tensors | {first: tensors[second], second: tensors[first]}


FAULTS = {
    "two weights in each other's place": (swapped, "2 weights otherwise than written"),
    "no marker of v": (
        lambda tensors: {k: t for k, t in tensors.items() if k not in ("v_pred", "ztsnr")},
        "reads v_prediction and alpha_bar",
    ),
    "zero SNR unsaid": (
        lambda tensors: {k: t for k, t in tensors.items() if k != "ztsnr"},
        "alpha_bar",
    ),
    "a weight of zeros": (
        lambda tensors: (
            tensors | {"first_stage_model.quant_conv.bias": torch.zeros(8, dtype=torch.float16) + 1}
        ),
        "1 weights otherwise than written, such as vae.quant_conv.bias",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_read_otherwise_is_not_left(bases, tmp_path, monkeypatch, fault):
    change, message = FAULTS[fault]
    make = single_file.single_file_tensors
    monkeypatch.setattr(single_file, "single_file_tensors", lambda model: change(make(model)))
    with pytest.raises(RunFailed, match=message):
        export(bases["small"], tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_scheduler_that_the_report_gets_wrong_is_found(bases, tmp_path, monkeypatch):
    from blackpoint.sampling.export import verify

    settings = verify.diffusers_settings
    monkeypatch.setattr(
        verify, "diffusers_settings", lambda process: settings(process) | {"clip_sample": True}
    )
    with pytest.raises(RunFailed, match="clip_sample is True, must be False"):
        export(bases["small"], tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_diffusers_readings_are_compared_too(bases, tmp_path, monkeypatch):
    load = verify_file.stock_pipeline_of_file

    def load_wrongly(*arguments):
        pipeline = load(*arguments)
        pipeline.vae.quant_conv.bias.data.add_(1)
        return pipeline

    monkeypatch.setattr(verify_file, "stock_pipeline_of_file", load_wrongly)
    with pytest.raises(RunFailed, match="diffusers reads 1 weights otherwise"):
        export(bases["small"], tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


MEMORY = """
import dataclasses, gc, json, sys
from pathlib import Path
from blackpoint.scripts.measurements import make_random_base as bases
from blackpoint.sampling.export.export import export

def rss(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

work, action, dtype = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if action == "make":
    wide = bases.UNET | {"block_out_channels": (128, 256, 512, 512), "cross_attention_dim": 64}
    small = bases.ARCHITECTURES["small"]
    bases.ARCHITECTURES["small"] = dataclasses.replace(small, unet=wide)
    bases.make(bases.RandomBaseConfig("small", str(work / dtype), dtype))
else:
    gc.collect()
    before = rss("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    file = work / "x.safetensors"
    if action == "write":
        export(work / dtype, file, verify=False)
    else:
        export(file, work / "back", verify=False, dtype="float16")
    print(json.dumps((rss("VmHWM") - before) / file.stat().st_size))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_writing_and_reading_hold_no_second_copy(tmp_path, dtype):
    """Peak memory above the imports, in sizes of the file, float16; of bases in both formats."""

    def run(action):
        result = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path), action, dtype],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1]) if result.stdout else None

    run("make")
    assert run("write") < 1.3
    assert run("read") < 1.3
