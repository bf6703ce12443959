"""Laws of single files that are written: the published layout, the header, all or nothing."""

import hashlib
import json
import os
import re
import signal
import subprocess
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import CLIPTokenizer

from blackpoint.data.files import whole_file
from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.loading import load_tokenizer
from blackpoint.sampling.checkpoints.single_file import TOKENIZER
from blackpoint.sampling.export import single_file
from blackpoint.sampling.export.carried import check_carried
from blackpoint.sampling.export.clients import Architecture
from blackpoint.sampling.export.export import export
from blackpoint.sampling.export.ldm_config import ldm_yaml
from blackpoint.sampling.export.single_file import modelspec, single_file_tensors
from blackpoint.sampling.pixels.folder import PixelForm
from blackpoint.sampling.pixels.pixel_codec import PixelCodec
from blackpoint.sampling.process import Process
from blackpoint.scripts.cli import main
from blackpoint.scripts.measurements.make_random_base import (
    ARCHITECTURES,
    build_on_meta,
)
from tests.ldm_models import NAMES, PUBLISHED, ZERO, V, make_ldm_model
from tests.toy_denoisers import SD, ZERO_SNR


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_ldm_model(folder / name, name) for name in NAMES}


@pytest.fixture(scope="module")
def written(bases, tmp_path_factory):
    """Unverified files of both, in float16."""
    folder = tmp_path_factory.mktemp("written")
    return {n: export(bases[n], folder / f"{n}.safetensors", verify=False) for n in NAMES}


def clip_tokenizer(config, **options):
    pad = {"pad_token": "!"} if config["hidden_act"] == "gelu" else {}
    return load_tokenizer(TOKENIZER, config, **pad | options)


def tiny_tokenizer():
    return CLIPTokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1}, [])


@cache
def on_meta(name):
    """A model of a published architecture without weights, as far as a file's layout asks."""
    architecture = ARCHITECTURES[name]
    parts = {part: build_on_meta(architecture, part) for part in ("unet", "vae", "text_encoder")}
    side = architecture.vae["sample_size"]
    return SimpleNamespace(
        **parts,
        process=ZERO,
        pixels=None,
        image_sides=(side, side),
        scaling_factor=0.18215,
        tokenizer=clip_tokenizer(architecture.text_encoder),
    )


@pytest.mark.parametrize(("name", "count"), [("sd15", 1130), ("sd21", 1214)])
def test_a_file_has_the_published_number_of_keys_and_the_markers(name, count):
    for process, expected in ((ZERO, {"v_pred", "ztsnr"}), (V, {"v_pred"}), (PUBLISHED, set())):
        tensors = single_file_tensors(with_values(on_meta(name), process=process))
        assert {key for key in tensors if "." not in key} == expected
        assert len(tensors) == count + len(expected)
        for marker in expected:
            assert tensors[marker].shape == (0,) and tensors[marker].dtype == torch.float32


def test_the_header_is_safetensors_and_modelspecs(written):
    for path in written.values():
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        metadata = header.pop("__metadata__")
        assert length % 8 == 0 and metadata["format"] == "pt"
        expected = hashlib.sha256(data[8 + length :]).hexdigest()
        assert metadata["modelspec.hash_sha256"] == f"0x{expected}"
        spans = sorted(entry["data_offsets"] for entry in header.values())
        assert spans[0][0] == 0 and spans[-1][1] == len(data) - 8 - length
        assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
        with safe_open(path, "pt") as file:
            assert file.metadata() == metadata
            kinds = {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
        assert {key for key, kind in kinds.items() if kind != torch.float16} == {"v_pred", "ztsnr"}


@pytest.mark.parametrize(
    ("name", "process", "architecture", "resolution"),
    [
        ("sd15", ZERO, "stable-diffusion-v1", "512x512"),
        ("sd21_base", PUBLISHED, "stable-diffusion-v2-512", "512x512"),
        ("sd21", V, "stable-diffusion-v2-768-v", "768x768"),
    ],
)
def test_modelspec_has_every_entry_that_it_must(name, process, architecture, resolution):
    entries = modelspec(with_values(on_meta(name), process=process), "night")
    prediction = {"v_prediction": "v", "epsilon": "epsilon"}[process.prediction_type]
    expected = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture,
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": "night",
        "resolution": resolution,
        "prediction_type": prediction,
    }
    assert {f"modelspec.{key}": value for key, value in expected.items()}.items() <= entries.items()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", entries["modelspec.date"])
    assert all(isinstance(value, str) and value for value in entries.values())


UNET_V1 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 768,
    "legacy": False,
}
UNET_V2 = {key: value for key, value in UNET_V1.items() if key != "num_heads"} | {
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "context_dim": 1024,
}
DDCONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


@pytest.mark.parametrize(
    ("name", "unet", "text"),
    [("sd15", UNET_V1, "FrozenCLIPEmbedder"), ("sd21", UNET_V2, "FrozenOpenCLIPEmbedder")],
)
def test_the_yaml_is_the_published_one_with_v(name, unet, text):
    """configs/v1-inference.yaml (CompVis) and v2-inference-v.yaml (Stability AI)."""
    config = OmegaConf.to_container(OmegaConf.create(ldm_yaml(on_meta(name))))["model"]
    params = config["params"]
    assert config["target"] == "ldm.models.diffusion.ddpm.LatentDiffusion"
    assert params["parameterization"] == "v"
    assert (params["linear_start"], params["linear_end"]) == (0.00085, 0.0120)
    assert (params["timesteps"], params["scale_factor"]) == (1000, 0.18215)
    assert unet.items() <= params["unet_config"]["params"].items()
    assert params["first_stage_config"]["params"]["ddconfig"] == DDCONFIG
    stage = params["cond_stage_config"]
    assert stage["target"] == f"ldm.modules.encoders.modules.{text}"
    assert (stage.get("params", {}).get("layer") == "penultimate") == (name == "sd21")


def test_files_are_together_and_open_to_colleagues(written, bases, tmp_path):
    for path in written.values():
        assert path.with_suffix(".yaml").is_file() and path.with_suffix(".txt").is_file()
    (path.parent / "usual").touch()
    usual = (path.parent / "usual").stat().st_mode
    for name in ("small.safetensors", "small.yaml", "small.txt"):
        assert (path.parent / name).stat().st_mode == usual
    make_ldm_model(tmp_path / "eps", "small", PUBLISHED)
    out = tmp_path / "made" / "eps.safetensors"
    export(tmp_path / "eps", out, verify=False)
    assert sorted(p.name for p in out.parent.iterdir()) == ["eps.safetensors", "eps.txt"]


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "F32"), ("bfloat16", "BF16")])
def test_the_number_format_is_the_chosen_one(bases, tmp_path, dtype, kind):
    path = export(bases["small_21"], tmp_path / "x.safetensors", verify=False, dtype=dtype)
    header = path.read_bytes()[8:5000].decode(errors="ignore")
    assert f'"dtype":"{kind}"' in header
    weight = load_file(path)["model.diffusion_model.out.2.weight"]
    name = "unet/diffusion_pytorch_model.safetensors"
    expected = load_file(bases["small_21"] / name)["conv_out.weight"].to(getattr(torch, dtype))
    assert_close(weight, expected, rtol=0, atol=0)


class Config(dict):
    """A config as diffusers and transformers have them, for what reads it."""

    def __getattr__(self, key):
        return self[key]

    def to_dict(self):
        return self


def changed(model, part, **settings):
    """Returns the model with other settings in one part's config."""
    config = getattr(model, part).config
    values = config.to_dict() if part == "text_encoder" else dict(config)
    return with_values(model, **{part: SimpleNamespace(config=Config(values | settings))})


def with_values(model, **values):
    return SimpleNamespace(**{**vars(model), **values})


SD15_TEXT = ARCHITECTURES["sd15"].text_encoder
PIXELS = PixelForm(PixelCodec("space_to_depth", 4), ("zero",), False)
NOT_CARRIED = {
    "shifted": (
        lambda m: with_values(m, process=Process(ZERO_SNR.shifted(64, 128))),
        "betas are its own",
    ),
    "cosine": (lambda m: with_values(m, process=Process(SD.cosine())), "betas are its own"),
    "other timesteps": (
        lambda m: with_values(m, process=Process(SD.scaled_linear(num_steps=500))),
        "betas are its own",
    ),
    "sample": (
        lambda m: with_values(m, process=replace(ZERO, prediction_type="sample")),
        "predicts the sample",
    ),
    "epsilon at zero SNR": (
        lambda m: with_values(m, process=replace(ZERO, prediction_type="epsilon")),
        "divides by 0",
    ),
    "pixels": (lambda m: with_values(m, pixels=PIXELS), "works in pixels"),
    "heads": (lambda m: changed(m, "unet", attention_head_dim=4), "attention heads by level"),
    "linear": (lambda m: changed(m, "unet", use_linear_projection=True), "use_linear_projection"),
    "groups": (lambda m: changed(m, "unet", norm_num_groups=8), "norm_num_groups=8"),
    "blocks": (
        lambda m: changed(m, "unet", down_block_types=("SimpleCrossAttnDownBlock2D",)),
        "SimpleCrossAttnDownBlock2D",
    ),
    "widths": (lambda m: changed(m, "unet", block_out_channels=(320, 600)), "no multiples"),
    "layers": (lambda m: changed(m, "unet", layers_per_block=(1, 2)), "not one number"),
    "scale": (lambda m: changed(m, "vae", scaling_factor=0.13025), "scaling_factor=0.13025"),
    "text heads": (lambda m: changed(m, "text_encoder", num_attention_heads=8), "assume 12"),
    "positions": (lambda m: changed(m, "text_encoder", max_position_embeddings=248), "assume 77"),
    "activation": (lambda m: changed(m, "text_encoder", hidden_act="relu"), "hidden_act=relu"),
    "words": (lambda m: with_values(m, tokenizer=tiny_tokenizer()), "another vocabulary"),
    "padding": (
        lambda m: with_values(
            m, tokenizer=clip_tokenizer(ARCHITECTURES["sd15"].text_encoder, pad_token="!")
        ),
        "fills texts up with !",
    ),
}


@pytest.mark.parametrize("name", NOT_CARRIED)
def test_what_a_file_cannot_carry_is_refused_with_the_reason(name):
    make_wrong, reason = NOT_CARRIED[name]
    model = on_meta("sd15")
    check_carried(model, "x")
    with pytest.raises(
        UserError, match=f"checkpoint=x can't be written.*{reason}.*a diffusers folder"
    ):
        check_carried(make_wrong(model), "x")


@pytest.mark.parametrize("name", ["sd15", "sd21_base", "sd21", "small", "small_21"])
def test_published_architectures_are_carried(name):
    check_carried(on_meta(name), "x")


def test_a_shifted_model_is_refused_by_the_command(tmp_path, capsys):
    folder = make_ldm_model(tmp_path / "base", "small", Process(ZERO_SNR.shifted(64, 128)))
    assert main(["export", f"checkpoint={folder}", f"output={tmp_path / 'x.safetensors'}"]) == 2
    assert "no more than zero terminal SNR or not" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("suffix", [".safetensors", ".yaml", ".txt"])
def test_nothing_is_overwritten(bases, tmp_path, capsys, suffix):
    taken = tmp_path / f"night{suffix}"
    taken.write_text("mine")
    output = tmp_path / "night.safetensors"
    assert main(["export", f"checkpoint={bases['small']}", f"output={output}"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [taken.name]
    assert taken.read_text() == "mine"


def test_a_folder_of_that_name_is_no_place_for_a_file(bases, tmp_path, capsys):
    (tmp_path / "x.safetensors").mkdir()
    arguments = [f"checkpoint={bases['small']}", f"output={tmp_path / 'x.safetensors'}"]
    assert main(["export", *arguments]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_file_made_meanwhile_is_kept_and_none_of_ours_is_left(bases, tmp_path, monkeypatch):
    output = tmp_path / "x.safetensors"
    write = single_file.write_tensors

    def write_late(*arguments):
        output.write_text("theirs")
        return write(*arguments)

    monkeypatch.setattr(single_file, "write_tensors", write_late)
    with pytest.raises(UserError, match="is there by now"):
        export(bases["small"], output, verify=False)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [
        ("x.safetensors", "theirs")
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_a_move_that_fails_leaves_nothing(bases, tmp_path, monkeypatch, error):
    move = whole_file._move_to_new

    def move_but_the_last(source, place):
        if place.suffix == ".safetensors":
            raise error
        move(source, place)

    monkeypatch.setattr(whole_file, "_move_to_new", move_but_the_last)
    with pytest.raises(error):
        export(bases["small"], tmp_path / "x.safetensors", verify=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_not_written(bases, tmp_path, capsys, suffix):
    output = tmp_path / f"x{suffix}"
    assert main(["export", f"checkpoint={bases['small']}", f"output={output}"]) == 2
    assert "are pickles" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_unknown_number_format_is_refused(bases, tmp_path, capsys):
    arguments = [f"checkpoint={bases['small']}", f"output={tmp_path / 'x.safetensors'}"]
    assert main(["export", *arguments, "dtype=fp16"]) == 2
    assert re.search(r"dtype.*fp16.*float16", capsys.readouterr().err, re.S)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size_kb", [64, 20_000])
def test_a_full_disk_says_what_to_do_and_leaves_nothing(bases, tmp_path, capsys, size_kb):
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(tmp_path)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root to mount a small disk")
    try:
        output = tmp_path / "x.safetensors"
        assert main(["export", f"checkpoint={bases['small']}", f"output={output}"]) == 1
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert re.search(r"output=.*can't be written: No space left on device.*make room", said)
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_killed_export_leaves_nothing(bases, tmp_path, monkeypatch):
    def be_killed(model, file):
        assert file.is_file() and list(tmp_path.glob(".partial-*"))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(single_file, "check_single_file", be_killed)
    with pytest.raises(SystemExit) as caught:
        main(["export", f"checkpoint={bases['small']}", f"output={tmp_path / 'x.safetensors'}"])
    assert caught.value.code == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_an_sd2_model_that_clients_mistake_is_said_so(caplog):
    for process, statistic, is_said in (
        (ZERO, 0.05, True),
        (ZERO, 0.12, False),
        (PUBLISHED, 0.12, True),
        (PUBLISHED, 0.05, False),
    ):
        caplog.clear()
        model = SimpleNamespace(process=process)
        single_file.warn_of_statistic(model, Architecture("SD 2", statistic))
        assert ("ComfyUI" in caplog.text) == is_said
    single_file.warn_of_statistic(SimpleNamespace(process=ZERO), Architecture("SD 1"))
    assert not caplog.text
