"""The bundle that samples: UNet, autoencoder, text encoder and the process they were trained for.

Loads any Stable Diffusion 1.x or 2.x, samples it by its own schedule, and saves a diffusers folder.
The autoencoder and the text encoder are loaded on first use: training from cached latents needs
neither.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sampling.checkpoint import Weights, resolve
from sampling.errors import UserError
from sampling.guidance import NO_GUIDANCE, Guidance, guided_output
from sampling.loading import Part, empty_unet, load_tokenizer, load_unet, read_json, save_tokenizer
from sampling.noise import initial_noise, step_noise
from sampling.prediction import to_eps, to_x0
from sampling.process import Process
from sampling.samplers import (
    Denoise,
    Prediction,
    SampleState,
    SamplingGrid,
    check_sampler,
    run,
)

log = logging.getLogger(__name__)

VAE_SLICE_IMAGES = 8
TEXT_BATCH = 64


@dataclass(frozen=True)
class Conditioning:
    """What a UNet is conditioned on. `pooled` and `time_ids` are None for SD 1.x and 2.x."""

    prompt_embeds: Float[Tensor, "n tokens width"]
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> "Conditioning":
        pooled = None if self.pooled is None else self.pooled[rows]
        time_ids = None if self.time_ids is None else self.time_ids[rows]
        return Conditioning(self.prompt_embeds[rows], pooled, time_ids)


class DiffusionModel:
    """A loaded Stable Diffusion: not a Module, so that a trainer can own the UNet alone."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL | Part,
        text_encoder: CLIPTextModel | Part,
        tokenizer: CLIPTokenizer,
        process: Process,
        source: str = "",
        folder: Path | None = None,
    ) -> None:
        self.unet, self.tokenizer, self.process, self.source = unet, tokenizer, process, source
        self.folder = folder  # where the encoders were read
        self._device = unet.device
        self._encoders: dict[str, Any] = {"vae": vae, "text_encoder": text_encoder}
        setting = vae.setting if isinstance(vae, Part) else partial(getattr, vae.config)
        self.vae_scale = 2 ** (len(setting("block_out_channels")) - 1)
        self.scaling_factor = float(setting("scaling_factor"))
        for part in (unet, *self._loaded_encoders()):
            part.requires_grad_(False).eval()

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        weights: Weights = "ema",
        with_unet: bool = True,
    ) -> "DiffusionModel":
        """Loads a diffusers folder, hub id, run directory or .ckpt; keys must match exactly.

        `weights` chooses the averaged or the raw UNet of a .ckpt or run directory; without the
        UNet's weights the model only encodes and decodes. Raises UserError for what is not there,
        not a Stable Diffusion 1.x / 2.x, or only a pickle.
        """
        found = resolve(checkpoint, weights)
        folder = found.folder
        index = read_json(folder / "model_index.json")
        if "text_encoder_2" in index or "transformer" in index or "unet" not in index:
            raise UserError(
                f"checkpoint={checkpoint} is a {index.get('_class_name')}; this version takes "
                "Stable Diffusion 1.x and 2.x (one UNet, one CLIP text encoder)"
            )
        process = Process.from_diffusers(
            found.scheduler_config or read_json(folder / "scheduler" / "scheduler_config.json")
        )
        if process.unsound():
            log.warning("note: %s: %s", checkpoint, process.unsound())
        vae = Part(AutoencoderKL, folder, "vae", dtype)
        text_encoder = Part(CLIPTextModel, folder, "text_encoder", dtype)
        tokenizer = load_tokenizer(folder)
        unet = load_unet(found, dtype) if with_unet else empty_unet(folder)
        model = cls(unet, vae, text_encoder, tokenizer, process, str(checkpoint), folder)
        return model.to(device)

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder, loaded when it is first asked for."""
        return self._encoder("vae")

    @property
    def text_encoder(self) -> CLIPTextModel:
        """The text encoder, loaded when it is first asked for."""
        return self._encoder("text_encoder")

    def load_encoders(self) -> None:
        """Loads now what would be loaded on first use, so that its faults show now."""
        for name in self._encoders:
            self._encoder(name)

    def _encoder(self, name: str) -> Any:
        found = self._encoders[name]
        if isinstance(found, Part):
            found = found.load().requires_grad_(False).eval().to(self.device)
            self._encoders[name] = found
        return found

    def _loaded_encoders(self) -> list[Any]:
        return [part for part in self._encoders.values() if not isinstance(part, Part)]

    def save(self, folder: str | Path) -> None:
        """Writes a diffusers folder (StableDiffusionPipeline) that any tool reads."""
        folder = Path(folder)
        for part, name in ((self.unet, "unet"), (self.vae, "vae")):
            part.save_pretrained(folder / name, safe_serialization=True)
        # transformers 5 drops the prefix that all published files have and other tools look for.
        published = {
            f"text_model.{name.removeprefix('text_model.')}": tensor
            for name, tensor in self.text_encoder.state_dict().items()
        }
        self.text_encoder.save_pretrained(folder / "text_encoder", state_dict=published)
        save_tokenizer(self.tokenizer, folder)
        _write_json(folder / "scheduler" / "scheduler_config.json", self.process.to_diffusers())
        _write_json(
            folder / "model_index.json",
            {
                "_class_name": "StableDiffusionPipeline",
                "feature_extractor": [None, None],
                "image_encoder": [None, None],
                "requires_safety_checker": False,
                "safety_checker": [None, None],
                "scheduler": ["diffusers", "DDIMScheduler"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "unet": ["diffusers", "UNet2DConditionModel"],
                "vae": ["diffusers", "AutoencoderKL"],
            },
        )

    def to(self, device: str | torch.device) -> "DiffusionModel":
        """Moves all parts, those not yet loaded when they are; returns itself."""
        self._device = torch.device(device)
        for part in (self.unet, *self._loaded_encoders()):
            if part.device.type != "meta":
                part.to(device)
        return self

    @property
    def device(self) -> torch.device:
        device = next(self.unet.parameters()).device
        return self._device if device.type == "meta" else device

    @property
    def image_size(self) -> int:
        """The side that the model was trained for, in pixels."""
        return int(self.unet.config.sample_size) * self.vae_scale

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """Returns (C, H/f, W/f); raises UserError where the UNet cannot halve the size evenly."""
        height = self.image_size if height is None else height
        width = self.image_size if width is None else width
        multiple = self.vae_scale * 2 ** (len(self.unet.config.block_out_channels) - 1)
        for name, side in (("height", height), ("width", width)):
            if side < multiple or side % multiple:
                raise UserError(f"{name}={side} must be a positive multiple of {multiple} px")
        channels = int(self.unet.config.in_channels)
        return channels, height // self.vae_scale, width // self.vae_scale

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encodes each distinct prompt once; over-long ones are cut, with a warning."""
        distinct = list(dict.fromkeys(prompts))
        limit = self.tokenizer.model_max_length
        states = []
        for start in range(0, len(distinct), TEXT_BATCH):
            texts = distinct[start : start + TEXT_BATCH]
            tokens = self.tokenizer(
                texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
            )
            lengths = map(len, self.tokenizer(texts).input_ids)
            for text, length in zip(texts, lengths, strict=True):
                if length > limit:
                    log.warning("cut to %d of %d tokens: %.60r", limit, length, text)
            uses_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
            mask = tokens.attention_mask.to(self.device) if uses_mask else None
            encoded = self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)
            states.append(encoded.last_hidden_state)
        place = {text: row for row, text in enumerate(distinct)}
        rows = torch.tensor([place[text] for text in prompts], device=self.device)
        return Conditioning(torch.cat(states)[rows])

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "n 3 h w"], noise: Tensor | None = None) -> Tensor:
        """Encodes images in [0, 1] to scaled latents (N, C, H/f, W/f) float32.

        `noise` is unit noise of the latents' shape that draws from the posterior; None takes its
        mean.
        """
        return self.draw_latents(self.encode_moments(images), noise)

    @torch.no_grad()
    def encode_moments(self, images: Float[Tensor, "n 3 h w"]) -> Tensor:
        """Encodes images in [0, 1] to mean and log variance, (N, 2C, H/f, W/f) float32, unscaled.

        They describe the posterior of the latents, before the scaling factor.
        """
        return self._by_slices(
            lambda pixels: self.vae.encode(pixels).latent_dist.parameters, 2 * images - 1
        )

    def draw_latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draws scaled latents from posteriors by unit noise; needs no autoencoder."""
        mean, log_variance = moments.chunk(2, dim=1)
        if noise is not None:
            mean = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise.to(mean)
        return mean * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 height width"]:
        """Decodes scaled latents to images in [0, 1], float32."""
        images = self._by_slices(lambda x: self.vae.decode(x).sample, latents / self.scaling_factor)
        return (images / 2 + 0.5).clamp(0, 1)

    def _by_slices(self, part: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """Runs the autoencoder on a few images at a time, in float32 where fp16 overflows.

        It runs in the format of its own weights: previews of a run in mixed precision come here
        under autocast, which would compute it in fp16 unseen.
        """
        results = []
        device, dtype = self.device, _dtype_of(self.vae)
        with torch.autocast(device.type, enabled=False):
            for rows in batch.split(VAE_SLICE_IMAGES):
                result = part(rows.to(device, dtype)).float()
                if dtype == torch.float16 and _overflowed(rows, result):
                    log.warning(
                        "note: the autoencoder overflows in fp16 (dtype=float16); it runs in "
                        "float32 from here on"
                    )
                    self.vae.float()  # for good: what overflowed once will again
                    dtype = torch.float32
                    result = part(rows.to(device, dtype))
                results.append(result)
        return torch.cat(results)

    def denoiser(
        self,
        conditioning: Conditioning,
        unconditional: Conditioning | None = None,
        guidance: Guidance = NO_GUIDANCE,
    ) -> Denoise:
        """Returns the function (x_t, t) -> x0, eps that samplers walk with, in float32."""
        kind = self.process.prediction_type
        schedule = self.process.schedule
        alphas, sigmas = schedule.alpha.tolist(), schedule.sigma.tolist()
        condition = conditioning.prompt_embeds
        empty = None if unconditional is None else unconditional.prompt_embeds
        dtype = _dtype_of(self.unet)

        def denoise(x_t: Tensor, t: int) -> Prediction:
            def predict(x: Tensor, embeds: Tensor) -> Tensor:
                steps = torch.full((len(x),), t, device=x.device)
                return self.unet(x.to(dtype), steps, embeds.to(dtype), return_dict=False)[0]

            output = guided_output(predict, x_t, t, condition, empty, guidance)
            alpha, sigma = alphas[t], sigmas[t]
            return Prediction(
                to_x0(kind, output, x_t, alpha, sigma), to_eps(kind, output, x_t, alpha, sigma)
            )

        return denoise

    @torch.no_grad()
    def sample(
        self,
        prompts: str | Sequence[str],
        seeds: Sequence[int],
        num_steps: int = 25,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.7,
        sampler: str = "ddim",
        eta: float | None = None,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str = "",
        guidance_interval: tuple[int, int] | None = None,
        batch_size: int = 16,
        allow_unsound: bool = False,
        on_batch: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "n 3 h w"]:
        """Samples one image a (prompt, seed) pair; returns (N, 3, H, W) float32 in [0, 1] on CPU.

        One prompt goes with any number of seeds. Seed N starts from the latent that
        `torch.Generator("cpu").manual_seed(N)` draws in diffusers. `on_batch` is told the number of
        images that each batch finished.
        """
        prompts = [prompts] * len(seeds) if isinstance(prompts, str) else list(prompts)
        if len(prompts) != len(seeds):
            raise UserError(f"{len(prompts)} prompts and {len(seeds)} seeds do not pair up")
        check_sampler(sampler, eta)
        self.process.check_sound(allow_unsound)
        shape = self.latent_shape(height, width)
        schedule = self.process.schedule
        grid = SamplingGrid.of(schedule, self.process.timesteps(num_steps))
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval)
        conditioning = self.encode_prompts([negative_prompt, *prompts])
        images = []
        for start in range(0, len(seeds), batch_size):
            rows = slice(start, start + batch_size)
            batch_seeds = list(seeds[rows])
            state = SampleState(initial_noise(batch_seeds, shape).to(self.device))
            denoise = self.denoiser(
                conditioning[1:][rows],
                conditioning[torch.zeros(len(batch_seeds), dtype=torch.long)],
                guidance,
            )

            def noise(step: int, batch_seeds: list[int] = batch_seeds) -> Tensor:
                return step_noise(batch_seeds, step, shape)

            final = run(sampler, denoise, grid, state, eta=eta, noise=noise)
            images.append(self.decode(final.x).cpu())
            if on_batch is not None:
                on_batch(len(batch_seeds))
        return torch.cat(images) if images else torch.empty(0, 3, *shape[1:])


def _dtype_of(part: torch.nn.Module) -> torch.dtype:
    """Returns the format of a part's weights.

    Part.dtype and part.device of diffusers look for hooks in all modules: milliseconds a call.
    """
    return next(part.parameters()).dtype


def _overflowed(given: Tensor, result: Tensor) -> bool:
    """Whether the result is not finite though what it was made of is."""
    return not torch.isfinite(result).all() and bool(torch.isfinite(given).all())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
