"""Reading adapters: all spellings of the same ones are read alike; what is no LoRA is named."""

import json
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.ldm_keys import unet_modules
from blackpoint.sampling.lora.adapters import Lora
from blackpoint.sampling.lora.files import read_lora
from blackpoint.sampling.lora.keys import ADAPTER_METADATA, kohya_name, matched
from tests.lora_files import ALL_BLOCKS, ATTENTION, CONVOLUTIONS, adapted_unet, adapters
from tests.tiny_pipeline import make_tiny_pipeline

TEXT_LAYER = "text_model.encoder.layers.0.self_attn.q_proj"
TEXT_SHAPES = {f"{TEXT_LAYER}.weight": [32, 32]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("base") / "sd", unet=ALL_BLOCKS)


@pytest.fixture(scope="module")
def unet(base):
    return UNet2DConditionModel.from_pretrained(base / "unet")


@pytest.fixture(scope="module")
def trained(base):
    return adapters(adapted_unet(base, targets=ATTENTION + CONVOLUTIONS, rank=2))


def fitted(unet, path, named="lora=x"):
    shapes = {name: list(tensor.shape) for name, tensor in unet.state_dict().items()}
    parts = {"unet": shapes, "text_encoder": TEXT_SHAPES}
    return matched(read_lora(path, named), parts, unet_modules(unet.config))


def names_of(state):
    return {name.removesuffix(".lora_A.weight") for name in state if name.endswith("A.weight")}


def kohya(state, alpha=None):
    """Writes peft's names as kohya does: `_` for `.`, lora_down, lora_up, and an alpha."""
    result = {}
    for name in names_of(state):
        flat = "lora_unet_" + name.replace(".", "_")
        result[f"{flat}.lora_down.weight"] = state[f"{name}.lora_A.weight"]
        result[f"{flat}.lora_up.weight"] = state[f"{name}.lora_B.weight"]
        if alpha is not None:
            result[f"{flat}.alpha"] = torch.tensor(float(alpha))
    return result


def of_diffusers(state, folder):
    layers = convert_state_dict_to_diffusers(dict(state))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return load_file(folder / "pytorch_lora_weights.safetensors")


def of_diffusers_kohya(state, folder):
    return convert_state_dict_to_kohya({f"unet.{name}": t for name, t in state.items()})


def ldm_blocks(state, folder):
    """As kohya names SDXL's, by the table of LDM's blocks: two of them are written out."""
    names = {
        "lora_unet_down_blocks_1_attentions_0": "lora_unet_input_blocks_4_1",
        "lora_unet_up_blocks_1_upsamplers_0_conv": "lora_unet_output_blocks_5_2_conv",
        "lora_unet_mid_block_resnets_1_conv1": "lora_unet_middle_block_2_in_layers_2",
    }
    spelled = kohya(state, alpha=2)
    for old, new in names.items():
        assert any(key.startswith(old) for key in spelled)
        spelled = {
            new + key.removeprefix(old) if key.startswith(old) else key: tensor
            for key, tensor in spelled.items()
        }
    return spelled


def of_processors(state, folder):
    """As diffusers wrote attention before it had peft."""
    result = {}
    for key, tensor in state.items():
        old = re.sub(r"\.to_out\.0\.lora_", ".processor.to_out_lora.", key)
        old = re.sub(r"\.to_(q|k|v)\.lora_", r".processor.to_\1_lora.", old)
        old = old.replace("_lora.A", "_lora.down").replace("_lora.B", "_lora.up")
        result[f"unet.{old}"] = tensor
    return result


SPELLINGS = {
    "diffusers": of_diffusers,
    "diffusers, kohya": of_diffusers_kohya,
    "diffusers, processors": of_processors,
    "unet": lambda state, _: {f"unet.{name}": tensor for name, tensor in state.items()},
    "peft": lambda state, _: {f"base_model.model.{name}": t for name, t in state.items()},
    "peft, with a name": lambda state, _: {
        name.replace(".weight", ".default.weight"): tensor for name, tensor in state.items()
    },
    "kohya": lambda state, _: kohya(state, alpha=2),
    "kohya, no alpha": lambda state, _: kohya(state),
    "kohya, LDM blocks": ldm_blocks,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read_as_the_same(unet, trained, tmp_path, spelling):
    """alpha is the rank, 2, in each of them: diffusers has it in no tensor."""
    state = {k: t.contiguous() for k, t in SPELLINGS[spelling](trained, tmp_path).items()}
    save_file(state, tmp_path / "a.safetensors")
    lora = fitted(unet, tmp_path / "a.safetensors")
    assert {f"unet.{name}" for name in names_of(trained)} == set(lora.modules)
    for name, module in lora.of("unet").items():
        assert torch.equal(module.down, trained[f"{name}.lora_A.weight"])
        assert torch.equal(module.up, trained[f"{name}.lora_B.weight"])
        assert module.alpha == module.rank == 2


def test_sd15_has_192_modules_and_278_with_convolutions(base):
    """Attention, feed-forward layers and projections: what kohya trains; and LoCon."""
    assert len(names_of(adapters(adapted_unet(base)))) == 192
    assert len(names_of(adapters(adapted_unet(base, targets=ATTENTION + CONVOLUTIONS)))) == 278


@pytest.mark.parametrize("prefix", ["unet.", ""])
@pytest.mark.parametrize(
    "settings, q, v",
    [
        ({"lora_alpha": 4}, 4, 4),
        ({"lora_alpha": 4, "alpha_pattern": {"attn1.to_q": 1}}, 1, 4),
        ({"lora_alpha": 4, "use_rslora": True}, 4 * 2**0.5, 4 * 2**0.5),
        ({}, 2, 2),
    ],
)
def test_alpha_comes_from_the_header(unet, trained, tmp_path, prefix, settings, q, v):
    """peft's settings: its scale is alpha / r, or alpha / sqrt(r) with rslora."""
    block = "mid_block.attentions.0.transformer_blocks.0.attn1"
    keys = [name for name in trained if name.startswith((f"{block}.to_q", f"{block}.to_v"))]
    state = {f"unet.{name}": trained[name] for name in keys}
    header = json.dumps({f"{prefix}{key}": value for key, value in settings.items()})
    save_file(state, tmp_path / "a.safetensors", {ADAPTER_METADATA: header})
    modules = fitted(unet, tmp_path / "a.safetensors").of("unet")
    found = [modules[f"{block}.to_{letter}"].alpha for letter in "qv"]
    assert found == pytest.approx([q, v])


def test_a_folder_of_peft_has_alpha_in_its_config(unet, trained, tmp_path):
    state = {f"base_model.model.{name}": tensor for name, tensor in trained.items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 2}))
    lora = fitted(unet, tmp_path)
    assert {module.alpha for module in lora.modules.values()} == {8.0}


@pytest.mark.parametrize(
    "key",
    [
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.{}.weight",
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora.{}.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.{}.weight",
    ],
)
def test_text_encoders_are_read(unet, tmp_path, key):
    """transformers 5 leaves out text_model, kohya counts the encoders for SDXL, or does not."""
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    save_file({key.format("down"): down, key.format("up"): up}, tmp_path / "a.safetensors")
    lora = fitted(unet, tmp_path / "a.safetensors")
    assert list(lora.modules) == [f"text_encoder.{TEXT_LAYER}"] and lora.parts == ["text_encoder"]


def test_dora_is_read_in_both_spellings(base, unet, tmp_path):
    state = adapters(adapted_unet(base, rank=2, use_dora=True, targets=["to_q"]))
    spelled = kohya(state, alpha=2)
    for name in names_of(state):
        magnitude = state[f"{name}.lora_magnitude_vector"]
        spelled[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = magnitude[:, None]
    for number, one in enumerate(({f"unet.{k}": t for k, t in state.items()}, spelled)):
        save_file(one, tmp_path / f"{number}.safetensors")
    first, second = (fitted(unet, tmp_path / f"{n}.safetensors") for n in range(2))
    assert first.is_dora and first.digest() == second.digest()


def test_names_of_kohya_are_the_published_ones():
    assert kohya_name("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q") == (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    )
    assert kohya_name(f"text_encoder.{TEXT_LAYER}") == (
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    )


MODULE = "lora_unet_mid_block_attentions_0_proj_in"
OTHERS = {
    "LoHa": f"{MODULE}.hada_w1_a",
    "LoKr": f"{MODULE}.lokr_w1",
    "OFT or BOFT": f"{MODULE}.oft_blocks",
    "GLoRA": f"{MODULE}.a1.weight",
    "IA3": f"{MODULE}.on_input",
    "LoRA with a Tucker decomposition": f"{MODULE}.lora_mid.weight",
    "LoRA with a bias": "unet.mid_block.attentions.0.proj_in.lora_B.bias",
    "full difference": f"{MODULE}.diff",
    "textual inversion": "emb_params",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_refused_by_name(unet, trained, tmp_path, kind):
    save_file(kohya(trained) | {OTHERS[kind]: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"lora=x is of the kind {kind}.*merge it with the tool"):
        fitted(unet, tmp_path / "a.safetensors")


def test_a_file_that_fits_in_part_is_refused_with_what_does_not(unet, trained, tmp_path):
    state = kohya(trained)
    for number in range(6):
        state[f"lora_unet_nothing_{number}.lora_down.weight"] = torch.ones(2, 2)
        state[f"lora_unet_nothing_{number}.lora_up.weight"] = torch.ones(2, 2)
    save_file(state, tmp_path / "a.safetensors")
    expected = r"lora=x does not fit the checkpoint: 6 of \d+ modules.*nothing_0.*and 2 more"
    with pytest.raises(UserError, match=expected):
        fitted(unet, tmp_path / "a.safetensors")


@pytest.mark.parametrize("width, name", [(768, "SD 1.x"), (1024, "SD 2.x"), (2048, "SDXL")])
def test_the_architecture_of_a_misfit_is_named(unet, tmp_path, width, name):
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    state = {f"{module}.lora_down.weight": torch.ones(2, width)}
    state[f"{module}.lora_up.weight"] = torch.ones(16, 2)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"for a weight of.*looks made for {re.escape(name)}"):
        fitted(unet, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "key, name",
    [
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "SDXL"),
        ("transformer.transformer_blocks.0.attn.to_q", "Flux"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "Flux"),
    ],
)
def test_other_models_are_named(unet, tmp_path, key, name):
    state = {f"{key}.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"looks made for {name}"):
        fitted(unet, tmp_path / "a.safetensors")


def damaged(state, name):
    """Damages one module's tensors."""
    down, up = f"{name}.lora_down.weight", f"{name}.lora_up.weight"
    return {
        "has down alone": state | {up: None},
        "not finite": state | {down: state[down] * float("nan")},
        "in torch.int64": state | {down: state[down].long()},
        "another": state | {down: state[down][:1].contiguous()},
        "alpha of .* is 2 numbers": state | {f"{name}.alpha": torch.ones(2)},
        "there under another name": state
        | {
            f"unet.mid_block.attentions.0.proj_in.lora_{letter}.weight": state[key]
            for letter, key in (("A", down), ("B", up))
        },
        "normalised over its": state | {f"{name}.dora_scale": torch.ones(1, 999)},
    }


FAULTS = list(damaged({f"a.lora_{s}.weight": torch.ones(2, 2) for s in ("down", "up")}, "a"))


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_files_are_refused(unet, trained, tmp_path, fault):
    state = damaged(kohya(trained), MODULE)[fault]
    state = {key: tensor.clone() for key, tensor in state.items() if tensor is not None}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=fault):
        fitted(unet, tmp_path / "a.safetensors")


def test_truncated_files_and_pickles_are_refused(unet, trained, tmp_path):
    save_file(kohya(trained), tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    for size in (0, 7, 100, len(content) // 2):
        (tmp_path / "a.safetensors").write_bytes(content[:size])
        with pytest.raises(UserError, match="can't be read.*damaged"):
            read_lora(tmp_path / "a.safetensors", "lora=x")
    torch.save({}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"pickle.*safetensors"):
        read_lora(tmp_path / "a.pt", "lora=x")


def test_whole_models_and_folders_without_a_lora_are_refused(base, tmp_path):
    weights = base / "unet/diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match="is no LoRA.*whole models as checkpoint"):
        read_lora(weights, "lora=x")
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        read_lora(tmp_path, "lora=x")
    for name in "ab":
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="2 of them.*name the file"):
        read_lora(tmp_path, "lora=x")


def test_the_digest_does_not_depend_on_the_spelling(unet, trained, tmp_path):
    save_file(kohya(trained, alpha=2), tmp_path / "a.safetensors")
    save_file({f"unet.{k}": t for k, t in trained.items()}, tmp_path / "b.safetensors")
    some, other = (fitted(unet, tmp_path / f"{name}.safetensors") for name in "ab")
    assert some.digest() == other.digest()
    stronger = {name: module for name, module in some.modules.items()}
    name, module = next(iter(stronger.items()))
    stronger[name] = type(module)(module.down, module.up, 3.0)
    assert Lora(stronger).digest() != some.digest()
