"""Tiny random pipelines of diffusers, of every family that searches are tested on.

Architectures as published, sizes as small as the classes allow: images of 32 or 64 px. FLUX, SD3,
PixArt, Chroma and AuraFlow have true text encoders with tiny vocabularies, Qwen-Image, Sana and
Lumina2 stand-ins in their place: embeddings that are a function of the text.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.stand_in_texts import batch, with_stand_in
from tests.tiny_pipeline import WORDS, save_tiny_tokenizer, tokens_and_merges

CLIP_WIDTH, T5_WIDTH = 32, 32


def clip(folder: Path, kind: Any = CLIPTextModel) -> tuple[Any, Any]:
    """Returns a CLIP text encoder and its tokenizer, written to and read from a folder."""
    save_tiny_tokenizer(folder / "clip")
    count = len(tokens_and_merges()[0])
    config = CLIPTextConfig(
        vocab_size=count,
        hidden_size=CLIP_WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=CLIP_WIDTH,
        bos_token_id=count - 2,
        eos_token_id=count - 1,
        pad_token_id=count - 1,
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip", model_max_length=77)
    return kind(config), tokenizer


def t5(
    width: int = T5_WIDTH, config: Any = T5Config, kind: Any = T5EncoderModel
) -> tuple[Any, Any]:
    """Returns a T5 encoder and a tokenizer of the words of the tests."""
    special = ["<pad>", "</s>", "<unk>"]
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*special, "\u2581", *(f"\u2581{word}" for word in WORDS), *letters]
    vocabulary = [(token, -float(rank)) for rank, token in enumerate(dict.fromkeys(tokens))]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    model = kind(
        config(
            vocab_size=len(vocabulary),
            d_model=width,
            d_kv=8,
            d_ff=37,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )
    return model, tokenizer


def autoencoder(channels: int, shift: float | None = None, levels: int = 1) -> AutoencoderKL:
    """Returns an autoencoder that halves the sides `levels - 1` times."""
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        shift_factor=shift,
        scaling_factor=1.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def flow(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**options)


DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 16,
    "max_image_seq_len": 1024,
    "base_shift": 0.5,
    "max_shift": 1.15,
}


def flux(folder: Path, dev: bool = True) -> Any:
    first, tokenizer = clip(folder)
    second, tokenizer_2 = t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=dev,
    )
    return FluxPipeline(
        scheduler=flow(**DYNAMIC, shift=3.0) if dev else flow(shift=1.0),
        vae=autoencoder(4, 0.1, levels=2),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def schnell(folder: Path) -> Any:
    return flux(folder, dev=False)


def sd3(folder: Path) -> Any:
    first, tokenizer = clip(folder, CLIPTextModelWithProjection)
    second, _ = clip(folder, CLIPTextModelWithProjection)
    third, tokenizer_3 = t5(2 * CLIP_WIDTH)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * CLIP_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * CLIP_WIDTH,
        out_channels=4,
        pos_embed_max_size=96,
    )
    return StableDiffusion3Pipeline(
        scheduler=flow(shift=3.0),
        vae=autoencoder(4, 0.06, levels=2),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=third,
        tokenizer_3=tokenizer_3,
        transformer=transformer,
    )


def pixart(folder: Path) -> Any:
    encoder, tokenizer = t5()
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=T5_WIDTH,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=autoencoder(4, levels=4),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
        ),
    )


def chroma(folder: Path) -> Any:
    encoder, tokenizer = t5()
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return ChromaPipeline(
        scheduler=flow(),
        vae=autoencoder(4, 0.1, levels=2),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def aura_flow(folder: Path) -> Any:
    encoder, tokenizer = t5(config=UMT5Config, kind=UMT5EncoderModel)
    transformer = AuraFlowTransformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=T5_WIDTH,
        out_channels=4,
        pos_embed_max_size=256,
    )
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=autoencoder(4, levels=2),
        transformer=transformer,
        scheduler=flow(shift=1.73),
    )


def sana(folder: Path, dpm: bool = False) -> Any:
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    scheduler: Any = flow(shift=3.0)
    if dpm:
        about = {"use_flow_sigmas": True, "flow_shift": 3.0}
        scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", **about)
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "transformer": transformer}
    return with_stand_in(SanaPipeline(**parts, scheduler=scheduler), 8, 24)


def sana_dpm(folder: Path) -> Any:
    return sana(folder, dpm=True)


def lumina2(folder: Path) -> Any:
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=[4, 2, 2],
        axes_lens=[128, 128, 128],
        cap_feat_dim=8,
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": autoencoder(4, 0.1, levels=4)}
    scheduler = flow(shift=6.0)
    return with_stand_in(
        Lumina2Pipeline(transformer=transformer, scheduler=scheduler, **parts), 8, 24
    )


def qwen(folder: Path) -> Any:
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.0, 0.8, 1.2, 1.1],
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "transformer": transformer}
    pipeline = QwenImagePipeline(scheduler=flow(**DYNAMIC, shift_terminal=0.02), **parts)

    def encode_prompt(prompt: Any, device: Any = None, **_: Any) -> Any:
        return batch(prompt, 16, None)

    pipeline.encode_prompt = encode_prompt
    return pipeline


SAVED: dict[str, Callable[[Path], Any]] = {
    "flux": flux,
    "schnell": schnell,
    "sd3": sd3,
    "pixart": pixart,
    "chroma": chroma,
    "aura_flow": aura_flow,
}
"""Families with all of their parts, which a folder can hold."""
FAMILIES: dict[str, Callable[[Path], Any]] = {
    **SAVED,
    "sana": sana,
    "sana_dpm": sana_dpm,
    "lumina2": lumina2,
    "qwen": qwen,
}


def build(name: str, folder: Path, seed: int = 0) -> Any:
    """Returns the random pipeline of a family, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FAMILIES[name](folder)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make(name: str, folder: Path) -> Path:
    """Writes the pipeline of a family to a folder and returns that."""
    build(name, folder).save_pretrained(folder / name)
    return folder / name
