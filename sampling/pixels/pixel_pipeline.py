"""A diffusers pipeline for pixel-space models; exports carry a copy of this file and of its codec.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    image = pipe("a prompt", num_inference_steps=50).images[0]

It needs diffusers alone. Whatever the model is conditioned on, the prompt is a string: a text, the
name of a class, or "" for none.
"""

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.utils.torch_utils import randn_tensor

from .pixel_codec import PixelCodec  # relative: beside this file wherever it is copied


class PixelPipeline(DiffusionPipeline):
    """UNet, scheduler and, for models of text, CLIP; the codec is named in model_index.json."""

    _optional_components = ["text_encoder", "tokenizer"]
    vae_scale_factor = 1

    def __init__(
        self,
        unet,
        scheduler,
        text_encoder=None,
        tokenizer=None,
        codec="space_to_depth",
        patch=4,
        classes=(),
    ):
        super().__init__()
        self.register_modules(
            unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(codec=codec, patch=patch, classes=list(classes))
        self.pixel_codec = PixelCodec(codec, patch)

    @torch.no_grad()
    def __call__(
        self,
        prompt="",
        height=None,
        width=None,
        num_inference_steps=50,
        guidance_scale=1.0,
        guidance_rescale=0.0,
        negative_prompt="",
        num_images_per_prompt=1,
        eta=0.0,
        generator=None,
        latents=None,
        output_type="pil",
        return_dict=True,
    ):
        """Samples images; `latents` is noise (B, 3, H, W), output_type "latent" leaves [-1, 1]."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        side = self.unet.config.sample_size * self.pixel_codec.patch
        shape = (len(prompts), 3, height or side, width or side)
        device, dtype = self._execution_device, self.unet.dtype
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        latents = latents.to(device, dtype)
        guided = guidance_scale != 1
        conditions = self._encode([negative_prompt] * len(prompts) + prompts if guided else prompts)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            rows = torch.cat([latents, latents]) if guided else latents
            rows = self.pixel_codec.to_channels(self.scheduler.scale_model_input(rows, t))
            output = self.pixel_codec.to_pixels(self.unet(rows, t, **conditions).sample)
            if guided:
                empty, conditional = output.chunk(2)
                output = empty + guidance_scale * (conditional - empty)
                if guidance_rescale:
                    output = rescale_noise_cfg(output, conditional, guidance_rescale)
            extra = {"eta": eta, "generator": generator} if eta else {}
            latents = self.scheduler.step(output, t, latents, **extra).prev_sample
        images = VaeImageProcessor().postprocess(latents, output_type=output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def _encode(self, prompts):
        device, dtype = self._execution_device, self.unet.dtype
        if self.text_encoder is not None:
            tokens = self.tokenizer(
                prompts,
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            embeds = self.text_encoder(tokens.input_ids.to(device))[0]
            return {"encoder_hidden_states": embeds.to(dtype)}
        embeds = torch.zeros(len(prompts), 1, 1, device=device, dtype=dtype)
        names = [*self.config.classes, ""]
        unknown = sorted(set(prompts) - set(names))
        if unknown:
            raise ValueError(f"prompt {unknown[0]!r} is not one of the model's classes: {names}")
        if not self.config.classes:
            return {"encoder_hidden_states": embeds}
        labels = torch.tensor([names.index(text) for text in prompts], device=device)
        return {"encoder_hidden_states": embeds, "class_labels": labels}
