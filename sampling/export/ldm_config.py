"""NAME.yaml beside a single file: the config of latent-diffusion, for clients that look for it.

A1111 builds the model by it; Forge and reForge read `parameterization` alone. As
configs/v1-inference.yaml of CompVis and v2-inference-v.yaml of Stability AI, but for the
parameterization, and for sizes, which are the model's own. That of SDXL is generative-models', as
A1111's sd_xl_v.yaml: a denoiser with VScaling.
"""

from typing import Any

from omegaconf import OmegaConf

from blackpoint.sampling.checkpoints.ldm_architecture import HEAD_WIDTH, HEADS
from blackpoint.sampling.checkpoints.ldm_keys import has_attention, is_open_clip
from blackpoint.sampling.export.clients import LDM_TYPES, of_xl
from blackpoint.sampling.model import DiffusionModel


def ldm_yaml(model: DiffusionModel) -> str:
    """Returns the text of the file."""
    if of_xl(model.unet.config):
        return OmegaConf.to_yaml(OmegaConf.create({"model": _of_sdxl(model)}))
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


def _of_sdxl(model: DiffusionModel) -> dict[str, Any]:
    unet, vae = model.unet.config, model.vae.config
    kind = {"v_prediction": "V", "epsilon": "Eps"}[model.process.prediction_type]
    denoising = "sgm.modules.diffusionmodules"
    sizes = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    return {
        "target": "sgm.models.diffusion.DiffusionEngine",
        "params": {
            "scale_factor": model.scaling_factor,
            "disable_first_stage_autocast": True,
            "denoiser_config": {
                "target": f"{denoising}.denoiser.DiscreteDenoiser",
                "params": {
                    "num_idx": model.process.schedule.num_steps,
                    "weighting_config": {
                        "target": f"{denoising}.denoiser_weighting.{kind}Weighting"
                    },
                    "scaling_config": {"target": f"{denoising}.denoiser_scaling.{kind}Scaling"},
                    "discretization_config": {
                        "target": f"{denoising}.discretizer.LegacyDDPMDiscretization"
                    },
                },
            },
            "network_config": {
                "target": f"{denoising}.openaimodel.UNetModel",
                "params": _unet_of_sdxl(unet),
            },
            "conditioner_config": {
                "target": "sgm.modules.GeneralConditioner",
                "params": {"emb_models": [*map(_embedder, TEXTS), *map(_size, sizes)]},
            },
            "first_stage_config": {
                "target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper",
                "params": {
                    "embed_dim": int(vae.latent_channels),
                    "monitor": "val/rec_loss",
                    "ddconfig": {"attn_type": "vanilla-xformers", **_autoencoder(vae)},
                    "lossconfig": {"target": "torch.nn.Identity"},
                },
            },
        },
    }


def _unet_of_sdxl(config: Any) -> dict[str, Any]:
    shared = _unet(config, open_clip=True)
    for name in ("image_size", "transformer_depth", "use_checkpoint"):
        del shared[name]
    depths = config.transformer_layers_per_block
    return {
        "adm_in_channels": int(config.projection_class_embeddings_input_dim),
        "num_classes": "sequential",
        "use_checkpoint": False,
        **shared,
        "transformer_depth": [depths] * len(config.block_out_channels)
        if isinstance(depths, int)
        else list(depths),
        "spatial_transformer_attn_type": "softmax-xformers",
    }


TEXTS: dict[str, dict[str, Any]] = {
    "FrozenCLIPEmbedder": {"layer": "hidden", "layer_idx": 11},
    "FrozenOpenCLIPEmbedder2": {
        "arch": "ViT-bigG-14",
        "version": "laion2b_s39b_b160k",
        "freeze": True,
        "layer": "penultimate",
        "always_return_pooled": True,
        "legacy": False,
    },
}


def _embedder(name: str) -> dict[str, Any]:
    target = f"sgm.modules.encoders.modules.{name}"
    return {
        "is_trainable": False,
        "input_key": "txt",
        "target": target,
        "params": TEXTS[name],
    }


def _size(name: str) -> dict[str, Any]:
    return {
        "is_trainable": False,
        "input_key": name,
        "target": "sgm.modules.encoders.modules.ConcatTimestepEmbedderND",
        "params": {"outdim": 256},
    }


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
