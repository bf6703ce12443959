"""What is no single file of Stable Diffusion 1.x or 2.x is refused, named, with the remedy."""

import contextlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.safetensors_file import MAX_HEADER_BYTES, read_header
from blackpoint.sampling.choices import SingleFileConfig
from blackpoint.sampling.model import DiffusionModel
from blackpoint.scripts.cli import main
from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_single_file import make_folder, tensors_of, write_file

UNET, TEXT = "model.diffusion_model.", "cond_stage_model."
CONV_IN = f"{UNET}input_blocks.0.0.weight"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return tensors_of(make_folder(tmp_path_factory.mktemp("sd") / "sd1", "sd1"))


def without(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda all_: {n: t for n, t in all_.items() if not n.startswith(prefix)}


def only(prefix: str, keep: int = 0) -> Callable[[Tensors], Tensors]:
    return lambda all_: {n[keep:]: t for n, t in all_.items() if n.startswith(prefix)}


def conv_in(*shape: int, **more: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda all_: all_ | {CONV_IN: torch.zeros(shape)} | more


def add(name: str, tensor: Tensor | None = None) -> Callable[[Tensors], Tensors]:
    return lambda all_: all_ | {name: torch.ones(1) if tensor is None else tensor}


def new(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda _: {name: torch.ones(4, 4) for name in names}


SDXL = "conditioner.embedders.1.model.ln_final.weight"
LABEL = f"{UNET}label_emb.0.0.weight"
QKV = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
FILES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "inpainting": (conv_in(32, 9, 3, 3), "is an inpainting model .*9 input channels"),
    "depth": (conv_in(32, 5, 3, 3), "is a depth-to-image model"),
    "edit": (conv_in(32, 8, 3, 3), "is an instruct-pix2pix model"),
    "other channels": (conv_in(32, 16, 3, 3), "another model than a text-to-image model"),
    "refiner": (
        lambda all_: conv_in(384, 4, 3, 3)(all_) | new(LABEL)({}),
        "is the refiner of Stable Diffusion XL",
    ),
    "SDXL's second encoder": (add(SDXL), "is a part of a Stable Diffusion XL .*label_emb"),
    "SDXL's UNet and VAE": (add(LABEL), "is a Stable Diffusion XL without its text encoders, or"),
    "SDXL of one encoder": (
        lambda all_: add(SDXL)(add(LABEL)(all_)),
        r"is a part of a Stable Diffusion XL .no key starts with conditioner.embedders.0.transf",
    ),
    "kohya's LoRA": (new("lora_unet_x.lora_down.weight", "lora_unet_x.alpha"), "is a LoRA"),
    "peft's LoRA": (new("unet.x.lora_A.weight", "unet.x.lora_B.weight"), "is a LoRA"),
    "diffusers' LoRA": (new("unet.x.to_q.lora.down.weight"), "name the checkpoint that it changes"),
    "LyCORIS": (new("lycoris_x.hada_w1_a"), "is a LoRA, or another adapter"),
    "a bare UNet": (only(UNET, len(UNET)), "holds a UNet alone; give a file that holds"),
    "diffusers' UNet": (new("conv_in.weight", "down_blocks.0.x.weight"), "with diffusers' names"),
    "a bare VAE": (new("decoder.conv_in.weight", "encoder.conv_in.weight"), "an autoencoder alone"),
    "the VAE of a file": (only("first_stage_model."), "holds an autoencoder alone"),
    "a text encoder": (new("text_model.final_layer_norm.weight"), "holds a text encoder alone"),
    "no text encoder": (without(TEXT), "holds no text encoder"),
    "no autoencoder": (
        without("first_stage_model."),
        r"holds no autoencoder.*: single_file\.vae=PATH",
    ),
    "a ControlNet": (new("control_model.input_blocks.0.0.weight"), "is a ControlNet"),
    "SD 3": (new(f"{UNET}joint_blocks.0.x.weight"), "is a Stable Diffusion 3"),
    "Flux": (new(f"{UNET}double_blocks.0.x.weight"), "is a Flux"),
    "something else": (new("layers.0.weight"), "holds no Stable Diffusion .*layers.0.weight"),
    "nothing": (lambda _: {}, "holds no tensors"),
    "scaled fp8": (add(f"{QKV[: -len('weight')]}scale_weight"), "holds scaled fp8 weights"),
    "ComfyUI's scaled fp8": (add("scaled_fp8"), "scaled fp8"),
    "quantised": (add(QKV, torch.ones(32, 32, dtype=torch.int8)), "in I8, which is quantised"),
    "whole numbers": (
        lambda all_: all_ | {f"{TEXT}transformer.text_model.x": torch.ones(1, dtype=torch.int64)},
        "x in I64, which is quantised or no weight",
    ),
    "CosXL": (add("edm_vpred.sigma_max"), "another process than noise by betas"),
    "leftovers": (add("denoiser.scale"), "holds 1 tensors that are no Stable Diffusion's, such"),
    "a hole in the UNet": (
        without(f"{UNET}middle_block.1.proj_in"),
        "unet: 2 missing weights, such as mid_block",
    ),
    "a block gone": (without(f"{UNET}input_blocks.1."), r"input_blocks.* is missing"),
    "no level": (without(f"{UNET}output_blocks.0."), "unet: .* missing weights"),
    "another shape": (add(QKV, torch.ones(32, 31)), "unet: 1 of another shape weights"),
    "no rows for q, k and v": (
        lambda all_: (
            without(TEXT)(all_)
            | {
                "cond_stage_model.model.token_embedding.weight": torch.ones(49_408, 64),
                "cond_stage_model.model.positional_embedding": torch.ones(77, 64),
                "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight": torch.ones(8, 64),
                "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": torch.ones(1),
                "v_pred": torch.tensor([]),
            }
        ),
        "its names and shapes make no Stable Diffusion",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_models_are_refused(name: str, sd1: Tensors, tmp_path: Path) -> None:
    change, message = FILES[name]
    path = write_file(tmp_path / "other.safetensors", change(sd1))
    with pytest.raises(UserError, match=rf"checkpoint=.*other\.safetensors(.|\n)*{message}"):
        DiffusionModel.load(path).load_encoders()


def header(content: Any, num_data: int = 0, length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(num_data)


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is damaged, or was not downloaded whole"),
    "7 bytes": (b"\x10\0\0\0\0\0\0", "is damaged"),
    "no header": (struct.pack("<Q", 100), "is damaged"),
    "a header of 100 MB": (struct.pack("<Q", 10**8) + b"{}", "its header has 100000000 bytes"),
    "a header of 2^63": (struct.pack("<Q", 2**63), "the most that are read are 25000000"),
    "no JSON": (header(b"{a"), "is damaged"),
    "no object": (header([1, 2]), "is damaged"),
    "deep": (header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "is damaged"),
    "truncated": (header({"a": ENTRY}, 15), "is damaged"),
    "too long": (header({"a": ENTRY}, 17), "is damaged"),
    "beyond the end": (header({"a": ENTRY | {"data_offsets": [2**40, 2**40 + 16]}}, 16), "damaged"),
    "backwards": (header({"a": ENTRY | {"data_offsets": [16, 0]}}, 16), "is damaged"),
    "overlapping": (header({"a": ENTRY, "b": ENTRY}, 16), "is damaged"),
    "another size": (header({"a": ENTRY | {"shape": [3, 2]}}, 16), "is damaged"),
    "huge shape": (header({"a": ENTRY | {"shape": [2**62, 2**62]}}, 16), "is damaged"),
    "negative": (header({"a": ENTRY | {"shape": [-2, -2]}}, 16), "is damaged"),
    "no such format": (header({"a": ENTRY | {"dtype": "F33"}}, 16), "is damaged"),
    "a pickle": (b"PK\x03\x04" + bytes(100), "is a pickle of PyTorch under another name"),
    "an old pickle": (b"\x80\x02" + bytes(100), "is a pickle under another name"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid ...", "Git LFS .*git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html>", "is a web page"),
    "GGUF": (b"GGUF" + bytes(100), "is a GGUF file"),
}


@pytest.mark.parametrize("dtype, bits", [("F4", 4), ("F8_E8M0", 8), ("C64", 64), ("BOOL", 8)])
def test_formats_of_no_weights_are_refused(dtype: str, bits: int, tmp_path: Path) -> None:
    num_bytes = 4 * bits // 8
    entry = {"dtype": dtype, "shape": [4], "data_offsets": [0, num_bytes]}
    (tmp_path / "x.safetensors").write_bytes(header({CONV_IN: entry}, num_bytes))
    with pytest.raises(UserError, match=rf"in {dtype}, which is quantised|is damaged"):
        DiffusionModel.load(tmp_path / "x.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    path.chmod(0)
    with pytest.raises(UserError, match="can't be read: Permission denied"):
        DiffusionModel.load(path)


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    content, message = DAMAGED[name]
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=rf"checkpoint=.*bad\.safetensors.*{message}"):
        DiffusionModel.load(tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=r"single_file\.vae=.*bad\.safetensors"):
        read_header(tmp_path / "bad.safetensors", "single_file.vae")


def test_the_largest_header_is_read_only_where_it_is_there(tmp_path: Path) -> None:
    """A file may say what it likes: nothing of that size is made before it is looked at."""
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", MAX_HEADER_BYTES) + b"{}")
    with pytest.raises(UserError, match="is damaged"):
        read_header(tmp_path / "x.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes, Path]:
    """The header and the data of a sound file of 0.4 MB, and the folder that it was."""
    folder = make_tiny_pipeline(
        tmp_path_factory.mktemp("whole") / "sd",
        unet={"attention_head_dim": 8, "block_out_channels": (8, 8)},
        vae={"norm_num_groups": 8},
        text_encoder={"num_attention_heads": 1, "hidden_act": "gelu"},
    )
    tensors = tensors_of(folder) | {"v_pred": torch.tensor([])}
    path = write_file(folder / "x.safetensors", tensors)
    DiffusionModel.load(path, single_file=SingleFileConfig(tokenizer=str(folder))).load_encoders()
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :], folder


BYTES = st.integers(0, 255)
WORDS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.text(max_size=5),
    st.lists(st.integers(-3, 2**40), max_size=4),
    st.lists(st.integers(0, 8), min_size=2, max_size=4),
)


@settings(max_examples=60)
@given(data=st.data())
def test_any_damage_to_a_header_is_a_users_error(
    data: st.DataObject, whole: tuple[dict[str, Any], bytes, Path], tmp_path_factory: Any
) -> None:
    """Entries replaced, renamed or gone, offsets and shapes that lie, bytes changed or cut off."""
    entries: dict[str, Any] = json.loads(json.dumps(whole[0]))
    body, added = whole[1], SingleFileConfig(tokenizer=str(whole[2]))
    names = st.sampled_from(sorted(entries))
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(names)
        match data.draw(st.integers(0, 3)):
            case 0:
                entries.pop(name, None)
            case 1:
                entries[_renamed(data, name)] = entries.pop(name, None)
            case 2 if isinstance(entries.get(name), dict):
                entries[name][data.draw(st.sampled_from(list(ENTRY)))] = data.draw(WORDS)
            case _:
                entries[name] = data.draw(WORDS)
    content = bytearray(header(entries) + body)
    for _ in range(data.draw(st.integers(0, 2))):
        content[data.draw(st.integers(0, len(content) - len(body)))] = data.draw(BYTES)
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    with contextlib.suppress(UserError):
        DiffusionModel.load(path, single_file=added).load_encoders()


def _renamed(data: st.DataObject, name: str) -> str:
    """Returns a name with one of its steps replaced, or any text."""
    steps = name.split(".")
    number = data.draw(st.integers(0, len(steps) - 1))
    steps[number] = data.draw(st.sampled_from(["0", "7", "99999999999", "weight", "x", ""]))
    return data.draw(st.sampled_from([".".join(steps), data.draw(st.text(max_size=8))]))


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_of_others_are_refused_with_the_reason(
    suffix: str, sd1: Tensors, tmp_path: Path
) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save({"state_dict": {CONV_IN: sd1[CONV_IN]}}, path)
    with pytest.raises(UserError, match=r"pickles, which can run any code.*\.safetensors file of"):
        DiffusionModel.load(path)


def test_a_file_that_is_not_there_is_no_hub_id() -> None:
    with pytest.raises(UserError, match=r"checkpoint=some/model\.safetensors does not exist"):
        DiffusionModel.load("some/model.safetensors")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vae": "nowhere"}, "single_file.vae=nowhere is neither a diffusers folder"),
        ({"tokenizer": "nowhere"}, "nowhere: its tokenizer is missing"),
    ],
)
def test_what_is_given_with_a_file_is_there(
    options: dict[str, Any], message: str, sd1: Tensors, tmp_path: Path
) -> None:
    path = write_file(tmp_path / "sd1.safetensors", sd1)
    with pytest.raises(UserError, match=message):
        DiffusionModel.load(path, single_file=SingleFileConfig(**options))


def test_a_given_autoencoder_is_one(sd1: Tensors, tmp_path: Path) -> None:
    path = write_file(tmp_path / "sd1.safetensors", sd1)
    lora = write_file(tmp_path / "lora.safetensors", {"lora_unet_x.alpha": torch.ones(1)})
    with pytest.raises(UserError, match=r"single_file\.vae=.*lora\.safetensors holds no autoenc"):
        DiffusionModel.load(path, single_file=SingleFileConfig(vae=str(lora)))


def test_folders_take_nothing_of_single_files(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "sd", "sd1")
    said = SingleFileConfig(prediction_type="v_prediction")
    with pytest.raises(UserError, match=r"single_file\.prediction_type=v_prediction: .*no single"):
        DiffusionModel.load(folder, single_file=said)
    with pytest.raises(UserError, match="variant=fp16: checkpoint=.* is a single file, which has"):
        path = write_file(tmp_path / "x.safetensors", {"a": torch.ones(1)})
        DiffusionModel.load(path, variant="fp16")


def test_the_command_says_it_in_a_few_lines(
    sd1: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_file(tmp_path / "inpaint.safetensors", conv_in(32, 9, 3, 3)(sd1))
    output = tmp_path / "out"
    for verb, more in (("sample", ["prompts=a cat"]), ("export", [])):
        assert main([verb, f"checkpoint={path}", f"output={output}", *more]) == 2
        error = capsys.readouterr().err
        assert "an inpainting model" in error and "Traceback" not in error
        assert not output.exists() or not any(output.iterdir())
