"""What sampling, search and evaluation ask of a model: the protocol that they know alone.

`DiffusionModel` (sampling/model.py) fulfils it for Stable Diffusion 1.x, 2.x and XL and for our own
models in pixel space, `PipelineModel` (sampling/pipelines/) for any other text-to-image pipeline of
diffusers. A model owns the layout of its latents: noise is drawn by it, and nothing outside looks
at more than their first dimension, the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.choices import SAMPLED_AT_ONCE, Attention, Spacing
from blackpoint.sampling.grid import Denoise, SampleState, SamplingGrid
from blackpoint.sampling.guidance import NO_GUIDANCE, Guidance
from blackpoint.sampling.noise import step_seeds
from blackpoint.sampling.samplers import check_sampler, run

Draw = Callable[[Sequence[int]], Tensor]
"""Seeds -> unit noise in the model's layout, (N, ...) float32 on the CPU, a row per seed."""


class Conditions(Protocol):
    """What a model is conditioned on, a row per image."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | Tensor) -> Any: ...

    def followed_by(self, others: Sequence[Any]) -> Any:
        """Returns these rows and then those of the others."""


class Levels(Protocol):
    """The process that a model was trained for, as far as samplers ask for it."""

    @property
    def prediction_type(self) -> str: ...

    def grid(self, num_steps: int, sampler: str = "ddim") -> SamplingGrid:
        """Returns the noise levels that a sampler walks."""

    @property
    def noisiest(self) -> Any:
        """The timestep of noise alone, or as near to it as there is."""

    def incompatibility(self) -> str | None:
        """Names what makes it unsound, with the remedy; None where nothing does."""

    def check_sound(self, allow_unsound: bool = False) -> None:
        """Raises UserError for an unsound process unless it is allowed."""

    def respaced(self, spacing: Spacing | None) -> Any:
        """Returns it with other sampling timesteps; None: its own."""

    def respacing_note(self, spacing: Spacing | None) -> str | None:
        """Says that `respaced` gives other timesteps; None where it does not."""


class Painter(Protocol):
    """A loaded model that turns noise and prompts into images."""

    process: Levels
    one_prompt_per_batch: bool = False
    """Whether images of several prompts in a batch would depend on each other."""

    @property
    def device(self) -> torch.device: ...

    @property
    def is_unconditional(self) -> bool:
        """Whether guidance has no effect."""
        return False

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of its images where none are asked for, in px."""

    def noise(
        self, seeds: Sequence[int], height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Draws unit noise in the model's layout, a row per seed: float32 on the CPU.

        Raises UserError for sides that it cannot have.
        """

    def encode_prompts(
        self, prompts: Sequence[str], clip_skip: int = 0, max_tokens: int | None = None
    ) -> Any:
        """Returns the `Conditions` of texts; "" stands for no condition."""

    def denoiser(
        self, conditioning: Any, unconditional: Any = None, guidance: Guidance = NO_GUIDANCE
    ) -> Denoise:
        """Returns the function (x_t, timestep of one of its grids) -> x0, eps, in float32."""

    def rows_at(self, t: Any, guidance: Guidance) -> tuple[int, int]:
        """Returns the rows of the network that a sample takes at t: of the prompt, and beside."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes x0 to images (N, 3, H, W) in [0, 1], float32."""

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """Decodes as `decode` does, and lets gradients through."""

    def grid_order(self, latents: Tensor) -> Tensor | None:
        """Returns the places of a flattened latent as the decoder lays them out, (C, H, W) int64;
        None where latents lie so already."""
        return None

    def prepare(
        self, attention: Attention = "auto", channels_last: bool = False, compiled: bool = False
    ) -> str | None:
        """Sets speed options; returns what there is to say of them."""

    def load_encoders(self) -> None:
        """Loads what is loaded on first use."""

    def loaded_parts(self) -> list[Any]:
        """Returns the networks in memory, the denoising one first."""

    def check_prompts(
        self, prompts: Sequence[str], clip_skip: int = 0, max_tokens: int | None = None
    ) -> None:
        """Raises UserError for prompts and settings of theirs that it cannot take."""

    def count_rows(self, tell: Callable[[int], None]) -> None:
        """Has `tell` told, from here on, the rows of every evaluation of the network."""

    def digest(self, of_encoders: bool = True) -> str:
        """Returns the digest of all that decides its images, or of that but the encoders."""

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
        batch_size: int = SAMPLED_AT_ONCE,
        allow_unsound: bool = False,
        clip_skip: int = 0,
        max_tokens: int | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "n 3 h w"]:
        """Samples one image a (prompt, seed) pair; returns (N, 3, H, W) float32 in [0, 1] on CPU.

        One prompt goes with any number of seeds. Seed N starts from the latent that
        `torch.Generator("cpu").manual_seed(N)` draws in diffusers. `clip_skip` is of the prompts,
        as in diffusers, `max_tokens` of the negative one too (text_encoding.py). `on_batch` is told
        the number of images that each batch finished.
        """
        prompts = [prompts] * len(seeds) if isinstance(prompts, str) else list(prompts)
        if len(prompts) != len(seeds):
            raise UserError(f"{len(prompts)} prompts and {len(seeds)} seeds do not pair up")
        check_sampler(sampler, eta)
        self.process.check_sound(allow_unsound)
        grid = self.process.grid(num_steps, sampler)
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval)
        if self.is_unconditional:
            guidance = NO_GUIDANCE  # both branches would be the same
        empty = self.encode_prompts([negative_prompt], max_tokens=max_tokens)
        conditioning = self.encode_prompts(prompts, clip_skip, max_tokens)

        def sample_batch(rows: slice) -> Tensor:
            batch_seeds = list(seeds[rows])
            state = SampleState(self.noise(batch_seeds, height, width).to(self.device))
            unconditional = empty[torch.zeros(len(batch_seeds), dtype=torch.long)]
            denoise = self.denoiser(conditioning[rows], unconditional, guidance)

            def noise(step: int) -> Tensor:
                return self.noise(step_seeds(batch_seeds, step), height, width)

            final = run(sampler, denoise, grid, state, eta=eta, noise=noise)
            if on_batch is not None:
                on_batch(len(batch_seeds))
            return self.decode(final.x).cpu()

        batches = _batches(prompts, batch_size, self.one_prompt_per_batch)
        images = [sample_batch(rows) for rows in batches]
        sides = height or self.image_sides[0], width or self.image_sides[1]
        return torch.cat(images) if images else torch.empty(0, 3, *sides)


def _batches(prompts: Sequence[str], size: int, by_prompt: bool) -> list[slice]:
    """Cuts rows into batches, `by_prompt` also where the prompt changes."""
    ends, start = [], 0
    for row in range(1, len(prompts) + 1):
        is_end = row == len(prompts) or (by_prompt and prompts[row] != prompts[row - 1])
        if is_end or row - start == size:
            ends.append(slice(start, row))
            start = row
    return ends
