"""Laws of the names in single files: the published key sets and shapes, and diffusers' converters.

Architectures are the published ones on the meta device; values are tested on small models.
"""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from blackpoint.data.files.dotted import renamed
from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.ldm_keys import (
    ema_name,
    from_ldm,
    published_text_name,
    to_ldm,
    unet_modules,
)
from blackpoint.scripts.measurements.make_random_base import ARCHITECTURES, build_on_meta

SDXL_UNET = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SMALL_UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}
SMALL_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (4, 8, 8),
    "layers_per_block": 2,
    "norm_num_groups": 2,
    "latent_channels": 4,
}
SMALL_TEXT = {
    "vocab_size": 20,
    "max_position_embeddings": 7,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 8,
}
BLOCKS = {
    "attention everywhere": {
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "as in SD 1.x": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "as in SDXL": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
        "layers_per_block": 2,
    },
}


def parts_of(name):
    architecture = ARCHITECTURES[name]
    models = {part: build_on_meta(architecture, part) for part in ("unet", "vae", "text_encoder")}
    configs = {part: getattr(architecture, part) for part in models}
    configs["unet"] = models["unet"].config
    return {part: (configs[part], model.state_dict()) for part, model in models.items()}


def values_of(model):
    """Tells every weight from every other."""
    state, start = model.state_dict(), 0
    for name, tensor in state.items():
        state[name] = torch.arange(start, start + tensor.numel(), dtype=torch.float32).reshape(
            tensor.shape
        )
        start += tensor.numel()
    return state


def assert_same(state, other):
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert_close(tensor, other[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "name, counts",
    [("sd15", (686, 248, 196)), ("sd21_base", (686, 248, 280)), ("sd21", (686, 248, 280))],
)
def test_keys_are_as_many_as_in_published_files(name, counts):
    """SD 1.5: 1130, SD 2.1: 1214, without buffers and what the text encoder does not use."""
    parts = parts_of(name)
    written = {part: to_ldm(part, config, state) for part, (config, state) in parts.items()}
    assert tuple(map(len, written.values())) == counts
    for part, (config, state) in parts.items():
        back = from_ldm(part, config, written[part])
        if part == "text_encoder":
            state = {published_text_name(key): tensor for key, tensor in state.items()}
        assert {k: t.shape for k, t in back.items()} == {k: t.shape for k, t in state.items()}


def test_unet_of_sdxl_has_its_1680_keys():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET)
    written = to_ldm("unet", unet.config, unet.state_dict())
    assert len(written) == 1680
    for key in ("label_emb.0.0.weight", "output_blocks.2.2.conv.bias", "input_blocks.6.0.op.bias"):
        assert f"model.diffusion_model.{key}" in written
    assert from_ldm("unet", unet.config, written).keys() == unet.state_dict().keys()


PUBLISHED = {
    "sd15": {
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "model.diffusion_model.middle_block.2.out_layers.3.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.8.2.conv.weight": (640, 640, 3, 3),
        "model.diffusion_model.output_blocks.11.1.proj_out.weight": (320, 320, 1, 1),
        "model.diffusion_model.out.0.weight": (320,),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.0.block.1.conv2.weight": (128, 128, 3, 3),
        "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.encoder.mid.block_2.norm1.bias": (512,),
        "first_stage_model.decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.mid.attn_1.norm.weight": (512,),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.norm_out.bias": (128,),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,),
    },
    "sd21_base": {
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias": (320,),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight": (1280, 1024),
        "cond_stage_model.model.token_embedding.weight": (49408, 1024),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.ln_final.weight": (1024,),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": (3072,),
        "cond_stage_model.model.transformer.resblocks.0.attn.out_proj.weight": (1024, 1024),
        "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight": (4096, 1024),
        "cond_stage_model.model.transformer.resblocks.0.mlp.c_proj.bias": (1024,),
        "cond_stage_model.model.transformer.resblocks.0.ln_1.bias": (1024,),
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_shapes_are_the_published_ones(name):
    written = {}
    for part, (config, state) in parts_of(name).items():
        written |= to_ldm(part, config, state)
    shapes = {key: tuple(written[key].shape) for key in PUBLISHED[name]}
    assert shapes == PUBLISHED[name]
    assert "cond_stage_model.model.transformer.resblocks.23.ln_1.weight" not in written


@pytest.mark.parametrize("blocks", BLOCKS)
def test_diffusers_reads_the_unet_that_is_written(blocks):
    unet = UNet2DConditionModel(**(SMALL_UNET | BLOCKS[blocks]))
    state = values_of(unet)
    written = to_ldm("unet", unet.config, state)
    assert_same(from_ldm("unet", unet.config, written), state)
    assert_same(convert_ldm_unet_checkpoint(dict(written), unet.config), state)


def test_diffusers_reads_the_autoencoder_that_is_written():
    vae = AutoencoderKL(**SMALL_VAE)
    state = values_of(vae)
    written = to_ldm("vae", vae.config, state)
    assert_same(from_ldm("vae", vae.config, written), state)
    assert_same(convert_ldm_vae_checkpoint(dict(written), vae.config), state)


def test_diffusers_reads_the_text_encoder_of_sd1_that_is_written():
    config = CLIPTextConfig(**SMALL_TEXT, hidden_act="quick_gelu")
    state = values_of(CLIPTextModel(config))
    published = {published_text_name(name): tensor for name, tensor in state.items()}
    written = to_ldm("text_encoder", config.to_dict(), state)
    assert_same(from_ldm("text_encoder", config.to_dict(), written), published)
    theirs = convert_ldm_clip_checkpoint(dict(written))
    assert_same({published_text_name(name): t for name, t in theirs.items()}, published)


def test_diffusers_reads_the_text_encoder_of_sd2_that_is_written():
    config = CLIPTextConfig(**SMALL_TEXT, hidden_act="gelu")
    model = CLIPTextModelWithProjection(config)
    state = values_of(model)
    published = {published_text_name(name): tensor for name, tensor in state.items()}
    written = to_ldm("text_encoder", config.to_dict(), state)
    assert_same(from_ldm("text_encoder", config.to_dict(), written), published)
    qkv = [published[f"text_model.encoder.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
    key = "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"
    assert_close(written[key], torch.cat(qkv), rtol=0, atol=0)
    projection = written["cond_stage_model.model.text_projection"]
    assert_close(projection, published["text_projection.weight"].T, rtol=0, atol=0)
    # diffusers leaves the text projection of Stable Diffusion 2 out: it is not used there
    other = {name.replace("cond_stage_model", "embedder"): t for name, t in written.items()}
    theirs = convert_open_clip_checkpoint(model, other, prefix="embedder.model.")
    assert_same({published_text_name(name): t for name, t in theirs.items()}, published)


def test_reading_takes_views():
    config = CLIPTextConfig(**SMALL_TEXT, hidden_act="gelu")
    vae = AutoencoderKL(**SMALL_VAE)
    for part, settings, model in (
        ("text_encoder", config.to_dict(), CLIPTextModelWithProjection(config)),
        ("vae", vae.config, vae),
    ):
        written = to_ldm(part, settings, model.state_dict())
        storages = {tensor.untyped_storage().data_ptr() for tensor in written.values()}
        for tensor in from_ldm(part, settings, written).values():
            assert tensor.untyped_storage().data_ptr() in storages


def test_modules_have_the_names_that_lora_files_of_sdxl_use():
    config = SDXL_UNET | {"layers_per_block": 2}

    def name(module):
        return renamed([module], unet_modules(config))[module]

    attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert name(attention) == "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    assert name("up_blocks.1.upsamplers.0.conv") == "output_blocks.5.2.conv"
    assert name("mid_block.resnets.1.time_emb_proj") == "middle_block.2.emb_layers.1"
    with pytest.raises(UserError, match=r"no module of Stable Diffusion's, such as down_blocks\.7"):
        to_ldm("unet", config, {"down_blocks.7.resnets.0.conv1": torch.zeros(1)})


def test_averages_have_keys_without_dots():
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert ema_name(key) == "model_ema.diffusion_modelinput_blocks00weight"
