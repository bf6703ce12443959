"""Any text-to-image pipeline of diffusers as a model that search, sampling and evaluation take.

The pipeline stays whole: texts, packing, guidance and decoding are its own. Its scheduler is a
stand-in (catcher.py) that hands its loop none of the timesteps, or one. With none, the call draws a
seed's noise in the pipeline's layout, or decodes latents; with one, it says what the network makes
of latents, guidance included, and that is (x_t, timestep) -> (x0, eps): all that samplers ask.
Nothing here knows a family.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.data.files.notes import first
from blackpoint.data.files.signals import stop_if_asked
from blackpoint.sampling.checkpoints.fingerprint import loaded_digest
from blackpoint.sampling.choices import Attention
from blackpoint.sampling.grid import Denoise, Prediction
from blackpoint.sampling.guidance import NO_GUIDANCE, Guidance
from blackpoint.sampling.pipelines.call import Arguments
from blackpoint.sampling.pipelines.catcher import Advance, Catcher
from blackpoint.sampling.pipelines.flow import FlowLevels, Place, is_flow, listed
from blackpoint.sampling.pipelines.painter import Painter
from blackpoint.sampling.pipelines.texts import Encoding, Text, Texts
from blackpoint.sampling.process import Process

log = logging.getLogger(__name__)

NETWORKS = ("transformer", "unet", "transformer_2")
"""Components that denoise."""
UNPACKED = ["latents", "height", "width", "vae_scale_factor"]
"""What FLUX, Chroma and Qwen-Image take to unpack their latents."""
PROBES = ("a", "a white cat beside a black dog, seen from above on a gray carpet at night")
"""Texts of different lengths, whose embeddings tell whether prompts are padded to the batch."""


@dataclass(frozen=True)
class Made:
    """What one call of the pipeline gave: its output, and the network's of the last timestep."""

    output: Tensor
    predicted: Tensor | None
    rows: int
    """Rows of the network."""


class PipelineModel(Painter):
    """A loaded pipeline of `diffusers`, at one size and with one set of call arguments.

    `source` names it in messages. Raises UserError for a pipeline that latents and prompts alone
    do not drive.
    """

    def __init__(
        self,
        pipeline: Any,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str = "",
        arguments: Mapping[str, Any] | None = None,
        source: str = "",
    ) -> None:
        self.pipeline, self.source = pipeline, source
        self.arguments = Arguments(type(pipeline), arguments or {}, source)
        self.sides, self.negative = (height, width), negative_prompt
        self.scheduler = pipeline.scheduler
        self._device = torch.device(pipeline._execution_device)  # found by a walk over all parts
        self._catcher = Catcher(self.scheduler)
        pipeline.scheduler = self._catcher
        pipeline.set_progress_bar_config(disable=True)
        pipeline.maybe_free_model_hooks = lambda: None  # at the end of each call: held instead
        self._encoding = Encoding(getattr(pipeline, "encode_prompt", lambda: None))
        if hasattr(pipeline, "encode_prompt"):
            pipeline.encode_prompt = self._encoding
        self._count, self._known_rows = 0, dict[Guidance, int]()
        self._tell: Callable[[int], None] = lambda rows: None
        for network in self._networks():
            network.register_forward_pre_hook(self._see, with_kwargs=True)
        self._none = Text("")
        self.process: Any = self._levels()
        self.one_prompt_per_batch = self._pads_to_batch()
        self._image_sides: tuple[int, int] | None = None

    def _networks(self) -> list[Any]:
        parts = [getattr(self.pipeline, name, None) for name in NETWORKS]
        return [part for part in parts if isinstance(part, torch.nn.Module)]

    def _see(self, _: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        rows = len(args[0] if args else next(iter(kwargs.values())))
        self._count += rows
        self._tell(rows)

    def _levels(self) -> Any:
        config = {**self.scheduler.config, "_class_name": type(self.scheduler).__name__}
        if is_flow(config):
            return FlowLevels(self._listing)
        return Process.of_checkpoint(self.source, config, is_xl=True)

    @torch.no_grad()
    def _listing(self, num_steps: int) -> tuple[list[float], list[float]]:
        self.call(Texts((self._none,)), num_steps, generator=_generators([0]))
        return listed(self.scheduler)

    def _pads_to_batch(self) -> bool:
        texts = [Texts.of([probe]) for probe in PROBES]
        for text in texts:
            with torch.no_grad():
                made = self.call(text, generator=_generators([0]))
        self.latent_dtype = made.output.dtype  # of the latents in its loop
        a, b = (text.rows[0].shapes() for text in texts)
        return not a or a != b

    def call(
        self,
        texts: Texts,
        num_steps: int = 1,
        choose: Any = lambda timesteps: timesteps[:0],
        advance: Advance | None = None,
        guidance: Guidance = NO_GUIDANCE,
        negative: str = "",
        **others: Any,
    ) -> Made:
        """Calls the pipeline, undecorated, so that gradients are as around it."""
        caught: list[Tensor] = []

        def keep(output: Tensor, latents: Tensor) -> Tensor:
            caught.append(output)
            return latents if advance is None else advance(output, latents)

        self._catcher.choose, self._catcher.advance = choose, keep
        self._encoding.texts, self._count = texts, 0
        try:
            output = self.arguments.call(
                self.pipeline, texts.prompts, num_steps, self.sides, guidance, negative, others
            )
        finally:
            self._encoding.texts = None
        return Made(output, caught[-1] if caught else None, self._count)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def image_sides(self) -> tuple[int, int]:
        if self._image_sides is None:
            height, width = self.decode(self.noise([0], *self.sides).to(self.device)).shape[-2:]
            self._image_sides = int(height), int(width)
        return self._image_sides

    @torch.no_grad()
    def noise(
        self, seeds: Sequence[int], height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Draws the noise that the pipeline starts from, (N, ...) in its layout, float32 on the
        CPU. It comes in the number format of the texts' embeddings, as in the pipeline."""
        if (height, width) != self.sides:
            raise UserError(
                f"height={height}, width={width}: this pipeline was loaded for images of "
                f"{self.sides[0]} by {self.sides[1]} px; load it again for others"
            )
        texts = Texts((self._none,) * len(seeds))
        return self.call(texts, generator=_generators(seeds)).output.float().cpu()

    def encode_prompts(
        self, prompts: Sequence[str], clip_skip: int = 0, max_tokens: int | None = None
    ) -> Texts:
        """Returns the prompts, which are encoded where they are first used."""
        for name, value in (("clip_skip", clip_skip), ("max_tokens", max_tokens)):
            if value:
                raise UserError(
                    f"{name}={value} goes with Stable Diffusion 1.x, 2.x and XL; leave it out, or "
                    f"set what this pipeline has: {self.arguments.listed()}"
                )
        return Texts.of(prompts)

    def stock(
        self, prompt: str, seed: int, num_steps: int, guidance: Guidance, scheduler: Any
    ) -> Tensor:
        """Returns the image that the pipeline makes by itself with a scheduler, (1, 3, H, W)."""
        others = {"generator": _generators([seed]), "output_type": "pt"}
        self.pipeline.scheduler = scheduler
        try:
            return self.arguments.call(
                self.pipeline, [prompt], num_steps, self.sides, guidance, self.negative, others
            ).float()
        finally:
            self.pipeline.scheduler = self._catcher

    def denoiser(
        self,
        conditioning: Texts,
        unconditional: Texts | None = None,
        guidance: Guidance = NO_GUIDANCE,
    ) -> Denoise:
        """Returns the function (x_t, timestep) -> x0, eps, in float32.

        Raises RunFailed where the network sees other rows than `rows_at` told.
        """
        negative = unconditional.prompts[0] if unconditional else self.negative
        self._check_guidance(guidance)

        def denoise(x_t: Tensor, t: Any) -> Prediction:
            stop_if_asked()
            reading, rows = self._read(conditioning, negative, x_t, t, guidance)
            expected = len(conditioning) * sum(self.rows_at(t, guidance))
            if rows != expected:
                raise RunFailed(
                    f"the pipeline evaluated {rows} rows of its network in a step that was "
                    f"counted with {expected}; arguments that act on some steps alone cannot be "
                    "planned for"
                )
            return reading

        return denoise

    def _read(
        self, texts: Texts, negative: str, x_t: Tensor, t: Any, guidance: Guidance
    ) -> tuple[Prediction, int]:
        """Evaluates the network at one timestep; returns its reading, and its rows."""
        steps = t.num_steps if isinstance(t, Place) else 1
        choose = partial(chosen, t)
        made = self.call(
            texts, steps, choose, None, guidance, negative, latents=x_t.to(self.latent_dtype)
        )
        if made.predicted is None:
            raise UserError(
                f"checkpoint={self.source}: the pipeline's loop does not step its scheduler, so "
                "its network's output cannot be had; give another checkpoint"
            )
        return self.process.reader()(made.predicted.float(), x_t, t), made.rows

    @torch.no_grad()
    def rows_at(self, t: Any, guidance: Guidance) -> tuple[int, int]:
        """Returns the rows of the network per sample and step, counted once; one is the prompt's.

        They are taken to be the same at every timestep, which `denoiser` watches.
        """
        if guidance not in self._known_rows:
            noise = self.noise([0], *self.sides).to(self.device)
            _, rows = self._read(Texts((self._none,)), self.negative, noise, t, guidance)
            self._known_rows[guidance] = rows
        return 1, self._known_rows[guidance] - 1

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes x0 to images (N, 3, H, W) in [0, 1], float32."""
        return self.decode_with_gradient(latents)

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """Decodes as `decode` does, and lets gradients through where they are wanted."""
        texts = Texts((self._none,) * len(latents))
        return self.call(
            texts, latents=latents.to(self.latent_dtype), output_type="pt"
        ).output.float()

    def grid_order(self, latents: Tensor) -> Tensor | None:
        """Returns where a packed latent's elements lie in the image, as FLUX and others unpack."""
        unpack = getattr(self.pipeline, "_unpack_latents", None)
        if latents.ndim != 3 or unpack is None or [*signature(unpack).parameters] != UNPACKED:
            return None
        places = torch.arange(latents[0].numel(), dtype=torch.float64).view(1, *latents.shape[1:])
        order: Tensor = unpack(places, *self.image_sides, self.pipeline.vae_scale_factor)[0]
        return order.long().to(latents.device)

    def prepare(
        self, attention: Attention = "auto", channels_last: bool = False, compiled: bool = False
    ) -> str | None:
        """Compiles the networks where that is asked for; raises UserError for the rest."""
        for name, is_set in (
            ("attention", attention == "xformers"),
            ("channels_last", channels_last),
        ):
            if is_set:
                raise UserError(
                    f"{name} goes with the UNets of Stable Diffusion 1.x, 2.x and XL; leave it out"
                )
        for network in self._networks() if compiled else ():
            network.compile()
        return None

    def load_encoders(self) -> None:
        """Does nothing: all is loaded."""

    def loaded_parts(self) -> list[Any]:
        """Returns the networks, the denoising ones first."""
        parts = [p for p in self.pipeline.components.values() if isinstance(p, torch.nn.Module)]
        networks = self._networks()
        return [*networks, *(part for part in parts if not any(part is n for n in networks))]

    def check_prompts(
        self, prompts: Sequence[str], clip_skip: int = 0, max_tokens: int | None = None
    ) -> None:
        """Raises UserError for settings of texts that pipelines take as call arguments."""
        self.encode_prompts(prompts, clip_skip, max_tokens)

    def count_rows(self, tell: Callable[[int], None]) -> None:
        """Has `tell` told, from here on, the rows of every evaluation of the networks."""
        self._tell = tell

    def digest(self, of_encoders: bool = True) -> str:
        """Returns the digest of all weights, the scheduler's settings and the class."""
        settings = repr(sorted(map(str, self.scheduler.config.items())))
        kind = type(self.pipeline).__name__
        return loaded_digest(f"{kind}{settings}".encode(), self.loaded_parts())

    def _check_guidance(self, guidance: Guidance) -> None:
        """Notes what the pipeline has not; raises UserError for what would act on some steps."""
        if guidance.interval is not None:
            raise UserError(
                "guidance_interval goes with Stable Diffusion 1.x, 2.x and XL; leave it out"
            )
        asked = {"guidance_scale": True, "guidance_rescale": guidance.rescale > 0}
        for name, is_set in asked.items():
            if guidance.scale != 1 and is_set and not self.arguments.takes(name) and first(name):
                kind = type(self.pipeline).__name__
                log.warning("note: %s takes no %s, which is left out", kind, name)


def chosen(t: Any, timesteps: Tensor) -> Tensor:
    """Returns the one timestep t of a scheduler's list."""
    if isinstance(t, Place):
        return timesteps[t.step : t.step + 1]
    return torch.tensor([t], device=timesteps.device, dtype=timesteps.dtype)


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
