"""NAME.yaml beside a single file: the config of latent-diffusion, for clients that look for it.

A1111 builds the model by it; Forge and reForge read `parameterization` alone. As
configs/v1-inference.yaml of CompVis and v2-inference-v.yaml of Stability AI, but for the
parameterization, and for sizes, which are the model's own.
"""

from typing import Any

from omegaconf import OmegaConf

from blackpoint.sampling.checkpoints.ldm_architecture import HEAD_WIDTH, HEADS
from blackpoint.sampling.checkpoints.ldm_keys import has_attention, is_open_clip
from blackpoint.sampling.export.clients import LDM_TYPES
from blackpoint.sampling.model import DiffusionModel


def ldm_yaml(model: DiffusionModel) -> str:
    """Returns the text of the file."""
    unet, vae = model.unet.config, model.vae.config
    process = model.process
    config = {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "base_learning_rate": 1e-4,
        "params": {
            "parameterization": LDM_TYPES[process.prediction_type],
            "linear_start": 0.00085,
            "linear_end": 0.012,
            "num_timesteps_cond": 1,
            "log_every_t": 200,
            "timesteps": process.schedule.num_steps,
            "first_stage_key": "jpg",
            "cond_stage_key": "txt",
            "image_size": 64,
            "channels": int(unet.in_channels),
            "cond_stage_trainable": False,
            "conditioning_key": "crossattn",
            "monitor": "val/loss_simple_ema",
            "scale_factor": model.scaling_factor,
            "use_ema": False,
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": _unet(unet, is_open_clip(model.text_encoder.config.to_dict())),
            },
            "first_stage_config": {
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {
                    "embed_dim": int(vae.latent_channels),
                    "monitor": "val/rec_loss",
                    "ddconfig": _autoencoder(vae),
                    "lossconfig": {"target": "torch.nn.Identity"},
                },
            },
            "cond_stage_config": _text(is_open_clip(model.text_encoder.config.to_dict())),
        },
    }
    return OmegaConf.to_yaml(OmegaConf.create({"model": config}))


def _unet(config: Any, open_clip: bool) -> dict[str, Any]:
    widths = list(config.block_out_channels)
    kinds = list(config.down_block_types)
    heads = {"num_heads": HEADS}
    linear = {}
    if open_clip:
        heads = {"num_head_channels": HEAD_WIDTH}
        linear = {"use_linear_in_transformer": True}
    return {
        "image_size": 32,
        "in_channels": int(config.in_channels),
        "out_channels": int(config.out_channels),
        "model_channels": widths[0],
        "attention_resolutions": [2**i for i, kind in enumerate(kinds) if has_attention(kind)][
            ::-1
        ],
        "num_res_blocks": int(config.layers_per_block),
        "channel_mult": [width // widths[0] for width in widths],
        **heads,
        "use_spatial_transformer": True,
        **linear,
        "transformer_depth": 1,
        "context_dim": int(config.cross_attention_dim),
        "use_checkpoint": False,
        "legacy": False,
    }


def _autoencoder(config: Any) -> dict[str, Any]:
    widths = list(config.block_out_channels)
    return {
        "double_z": True,
        "z_channels": int(config.latent_channels),
        "resolution": 256,
        "in_channels": int(config.in_channels),
        "out_ch": int(config.out_channels),
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": int(config.layers_per_block),
        "attn_resolutions": [],
        "dropout": 0.0,
    }


def _text(open_clip: bool) -> dict[str, Any]:
    if not open_clip:
        return {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    return {
        "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
        "params": {"freeze": True, "layer": "penultimate"},
    }
