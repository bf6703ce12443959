"""The bundle that samples: UNet, autoencoder, text encoder and the process they were trained for.

Loads any Stable Diffusion 1.x, 2.x or XL, and models of our own that generate pixels; samples by
their own schedule, and saves a diffusers folder. The autoencoder and the text encoders are loaded
on first use: training from cached latents needs neither. A pixel-space model has no autoencoder,
and a text encoder only if it understands text.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.signals import stop_if_asked
from blackpoint.sampling.checkpoints import loading
from blackpoint.sampling.checkpoints.architecture import check_architecture, sample_size_of
from blackpoint.sampling.checkpoints.encoders import Encoders, dtype_of
from blackpoint.sampling.checkpoints.fingerprint import model_digest, sampling_digest
from blackpoint.sampling.checkpoints.merged import check_bases, with_loras
from blackpoint.sampling.checkpoints.resolve import resolve
from blackpoint.sampling.checkpoints.saving import save_model
from blackpoint.sampling.choices import (
    PLAIN,
    Attention,
    LoraFile,
    PredictionType,
    SingleFileConfig,
    Weights,
)
from blackpoint.sampling.conditioning import Conditioning, encode_classes, joined
from blackpoint.sampling.grid import Denoise, Prediction
from blackpoint.sampling.guidance import NO_GUIDANCE, Guidance, guided_output
from blackpoint.sampling.noise import initial_noise
from blackpoint.sampling.pipelines.painter import Painter
from blackpoint.sampling.pixels.folder import PixelForm
from blackpoint.sampling.pixels.pixel_codec import IMAGE_CHANNELS
from blackpoint.sampling.process import Process
from blackpoint.sampling.runtime.speed import prepare_unet
from blackpoint.sampling.text_encoding import encode_text


class DiffusionModel(Painter):
    """A loaded model: no Module itself, so that a trainer can own the UNet alone.

    `pixels` is set for models in pixel space, which have no VAE; `text_encoder` and `tokenizer` are
    None for those that know classes, or nothing at all. SDXL has a second of each.
    """

    process: Process
    base_process: Process | None = None
    """What a training starts from: the process of its checkpoint, if that is sound."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL | loading.Part | None,
        text_encoder: CLIPTextModel | loading.Part | None,
        tokenizer: CLIPTokenizer | None,
        process: Process,
        source: str = "",
        pipeline: loading.Pipeline | None = None,
        pixels: PixelForm | None = None,
        text_encoder_2: CLIPTextModelWithProjection | loading.Part | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
    ) -> None:
        assert (vae is None) == (pixels is not None)
        self.unet, self.process, self.source = unet, process, source
        self.tokenizer: Any = tokenizer
        self.tokenizers = [part for part in (tokenizer, tokenizer_2) if part is not None]
        self.pipeline = pipeline  # where the encoders are read
        self.pixels = pixels
        self._device = unet.device
        parts = {"vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
        self._encoders = encoders = Encoders(parts)
        self.vae_scale, self.vae_is_float32 = encoders.vae_scale, encoders.vae_is_float32
        self.scaling_factor = encoders.scaling_factor
        self.unet.requires_grad_(False).eval()

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        weights: Weights = "ema",
        with_unet: bool = True,
        variant: str | None = None,
        single_file: SingleFileConfig = PLAIN,
        undecided: PredictionType | None = None,
        loras: Sequence[LoraFile] | None = None,
    ) -> "DiffusionModel":
        """Loads a diffusers folder, hub id, run directory, .ckpt or single .safetensors file.

        Keys must match exactly. `weights` chooses the averaged or the raw UNet of a .ckpt, run
        directory or single file, `variant` the files of a folder or hub id (fp16, bf16, non_ema),
        as in diffusers; `single_file` adds what a single file lacks, `undecided` is the prediction
        type of one that does not tell, for those who need none; `loras` are merged in. Without the
        UNet's weights the model only encodes and decodes. Raises UserError for what is not there,
        neither a Stable Diffusion 1.x, 2.x or XL nor a pixel-space model of ours, or only a pickle;
        what the configs tell, before weights are read.
        """
        resolved = with_loras(resolve(checkpoint, weights, variant, single_file), loras, weights)
        pipeline = resolved.pipeline
        index = pipeline.read_json("model_index.json")
        pixels = PixelForm.of(index, checkpoint)
        check_architecture(pipeline, index, pixels, checkpoint)
        scheduler = resolved.scheduler_config or pipeline.scheduler(undecided)
        process = Process.of_checkpoint(checkpoint, scheduler, loading.is_xl(index))
        if with_unet:
            check_bases(resolved, process)
        vae = None if pixels else loading.Part(AutoencoderKL, pipeline, "vae", dtype)
        encoders = loading.text_encoders_of(index) if pixels is None or pixels.has_text else []
        first, second = loading.text_parts(pipeline, encoders, dtype)
        unet = loading.load_unet(resolved, dtype) if with_unet else loading.empty_unet(pipeline)
        source = str(checkpoint)
        return cls(unet, vae, *first, process, source, pipeline, pixels, *second).to(device)

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder, loaded when it is first asked for; pixel-space models have none."""
        return self._encoders.get("vae", self.device)

    @property
    def text_encoder(self) -> CLIPTextModel:
        """The text encoder, loaded when it is first asked for."""
        return self._encoders.get("text_encoder", self.device)

    @property
    def text_encoder_2(self) -> CLIPTextModelWithProjection:
        """SDXL's second text encoder, loaded when it is first asked for."""
        return self._encoders.get("text_encoder_2", self.device)

    @property
    def is_xl(self) -> bool:
        """Whether it is an SDXL: it has two text encoders, and takes the sizes of pictures."""
        return len(self.tokenizers) > 1

    @property
    def is_unconditional(self) -> bool:
        """Whether the model knows neither texts nor classes, so that guidance has no effect."""
        return self.pixels is not None and not (self.pixels.has_text or self.pixels.classes)

    def load_encoders(self) -> None:
        """Loads lazy parts now, so that their faults show now."""
        self._encoders.load(self.device)

    def set_encoder_dtype(self, dtype: torch.dtype) -> None:
        """Holds the autoencoder and the text encoder in `dtype` from here on, loaded or not."""
        self._encoders.set_dtype(dtype)

    def loaded_parts(self) -> list[Any]:
        """Returns the UNet and the encoders that are in memory."""
        return [self.unet, *self._encoders.loaded()]

    def save(self, folder: str | Path) -> None:
        """Writes a diffusers folder: of a stock pipeline, or of PixelPipeline with its code."""
        save_model(self, Path(folder))

    def to(self, device: str | torch.device) -> "DiffusionModel":
        """Moves all parts, those not yet loaded when they are; returns itself."""
        self._device = torch.device(device)
        for part in self.loaded_parts():
            if part.device.type != "meta":
                part.to(device)
        return self

    @property
    def device(self) -> torch.device:
        device = next(self.unet.parameters()).device
        return self._device if device.type == "meta" else device

    @property
    def downsampling_factor(self) -> int:
        """Pixels per position of the UNet's input, along one side."""
        return self.pixels.codec.patch if self.pixels else self.vae_scale

    @property
    def image_sides(self) -> tuple[int, int]:
        """The height and width that the model was made for, in pixels."""
        size = sample_size_of(self.unet.config)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return height * self.downsampling_factor, width * self.downsampling_factor

    @property
    def image_size(self) -> int:
        """The side that the model was made for, in pixels; the shorter one of a rectangle."""
        return min(self.image_sides)

    @property
    def size_multiple(self) -> int:
        """Divisor of the sides of images, in pixels.

        Latents may have any sides: where the UNet cannot halve one evenly, diffusers' passes the
        size to upsample to on. In pixel space it must, and SDXL was trained on such sides alone.
        """
        must_halve = self.pixels is not None or self.is_xl
        halvings = len(self.unet.config.block_out_channels) - 1 if must_halve else 0
        return self.downsampling_factor * 2**halvings

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """Returns the shape of x0, (C, H/f, W/f), or (3, H, W) of a pixel-space model.

        Raises UserError for a side that is not a multiple of `size_multiple`.
        """
        default_height, default_width = self.image_sides
        height = default_height if height is None else height
        width = default_width if width is None else width
        multiple = self.size_multiple
        for name, side in (("height", height), ("width", width)):
            if side < multiple or side % multiple:
                raise UserError(f"{name}={side} must be a positive multiple of {multiple} px")
        channels = IMAGE_CHANNELS if self.pixels else int(self.unet.config.in_channels)
        return channels, height // self.vae_scale, width // self.vae_scale

    def noise(
        self, seeds: Sequence[int], height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Draws unit noise, (N, C, H/f, W/f), as diffusers does: float32 on the CPU."""
        return initial_noise(seeds, self.latent_shape(height, width))

    def rows_at(self, t: int, guidance: Guidance) -> tuple[int, int]:
        """Returns the rows of the UNet that a sample takes at t, and those of the empty prompt."""
        return 1, int(guidance.is_on(t))

    def prepare(
        self, attention: Attention = "auto", channels_last: bool = False, compiled: bool = False
    ) -> str | None:
        """Sets speed options of the UNet; returns what there is to say of them."""
        return prepare_unet(self.unet, attention, channels_last, compiled)

    def check_prompts(
        self, prompts: Sequence[str], clip_skip: int = 0, max_tokens: int | None = None
    ) -> None:
        """Raises UserError for unknown classes, and for layers or tokens that no encoder has."""
        if clip_skip or max_tokens is not None:
            self.encode_prompts([""], clip_skip, max_tokens)
        if self.tokenizer is None:
            self.encode_prompts(prompts)

    def count_rows(self, tell: Callable[[int], None]) -> None:
        """Has `tell` told, from here on, the rows of every evaluation of the UNet."""
        self.unet.register_forward_pre_hook(lambda _, arguments: tell(len(arguments[0])))

    def digest(self, of_encoders: bool = True) -> str:
        """Returns the digest of all that decides its images, of a model that was loaded."""
        return sampling_digest(self) if of_encoders else model_digest(self)

    @torch.no_grad()
    def encode_prompts(
        self, prompts: Sequence[str], clip_skip: int = 0, max_tokens: int | None = None
    ) -> Conditioning:
        """Encodes texts (sampling/text_encoding.py) or class names; "" stands for no condition."""
        if self.tokenizer is None:
            assert self.pixels is not None
            for name, value in (("clip_skip", clip_skip), ("max_tokens", max_tokens)):
                if value:
                    raise UserError(f"{name}={value}: this model has no text encoder")
            return encode_classes(self.pixels.classes, prompts, self.device)
        encoders = self._encoders.text_encoders(self.device)
        return encode_text(self.tokenizers, encoders, prompts, self.device, clip_skip, max_tokens)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "n 3 h w"], noise: Tensor | None = None) -> Tensor:
        """Encodes images in [0, 1] to x0: scaled latents (N, C, H/f, W/f), or pixels in [-1, 1].

        `noise` is unit noise of the latents' shape that draws from the posterior; None takes its
        mean. Float32.
        """
        if self.pixels:
            return 2 * images.to(self.device) - 1
        return self.draw_latents(self.encode_moments(images), noise)

    @torch.no_grad()
    def encode_moments(self, images: Float[Tensor, "n 3 h w"]) -> Tensor:
        """Encodes images in [0, 1] to mean and log variance, (N, 2C, H/f, W/f) float32, unscaled.

        They describe the posterior of the latents, before the scaling factor.
        """
        return self._encoders.encode(2 * images - 1, self.device)

    def draw_latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draws scaled latents from posteriors by unit noise; needs no autoencoder."""
        mean, log_variance = moments.chunk(2, dim=1)
        if noise is not None:
            mean = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise.to(mean)
        return mean * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 height width"]:
        """Decodes x0 to images in [0, 1], float32."""
        return self.decode_with_gradient(latents)

    def decode_with_gradient(
        self, latents: Float[Tensor, "n c h w"]
    ) -> Float[Tensor, "n 3 height width"]:
        """Decodes as `decode` does, and lets gradients through where they are wanted."""
        if self.pixels:
            return (latents / 2 + 0.5).clamp(0, 1)
        images = self._encoders.decode(latents / self.scaling_factor, self.device)
        return (images / 2 + 0.5).clamp(0, 1)

    def network(self, x: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        """Evaluates the UNet on x of x0's shape; returns its raw output, of that shape.

        `t` is (N,). A pixel-space model is down-sampled before and up-sampled after it.
        """
        height, width = (side * self.vae_scale for side in x.shape[-2:])
        codec = self.pixels.codec if self.pixels else None
        x = codec.to_channels(x) if codec else x
        others = condition.unet_arguments(height, width)
        output = self.unet(x, t, condition.prompt_embeds, **others, return_dict=False)[0]
        return codec.to_pixels(output) if codec else output

    def denoiser(
        self,
        conditioning: Conditioning,
        unconditional: Conditioning | None = None,
        guidance: Guidance = NO_GUIDANCE,
    ) -> Denoise:
        """Returns the function (x_t, t) -> x0, eps that samplers walk with, in float32."""
        read, dtype = self.process.reader(), dtype_of(self.unet)
        conditioning = conditioning.to(dtype)
        both = None if unconditional is None else joined([unconditional.to(dtype), conditioning])

        def denoise(x_t: Tensor, t: int) -> Prediction:
            stop_if_asked()

            def predict(x: Tensor, condition: Conditioning) -> Tensor:
                steps = torch.full((len(x),), t, device=x.device)
                return self.network(x.to(dtype), steps, condition)

            return read(guided_output(predict, x_t, t, conditioning, both, guidance), x_t, t)

        return denoise
