"""The images of an evaluation: which there are to be, and the model that generates them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.choices import check_seed
from blackpoint.sampling.evaluation.config import MAX_STORED_SEED, MetricsConfig
from blackpoint.sampling.evaluation.metric import Pixels, Row
from blackpoint.sampling.evaluation.rows import SETTINGS, Key
from blackpoint.sampling.pipelines.painter import Painter
from blackpoint.sampling.prompts.prompt_set import Prompt
from blackpoint.sampling.runtime.pictures import eight_bit


@dataclass(frozen=True)
class Job:
    """One image to generate: image `image` of a prompt."""

    number: int
    prompt: Prompt
    image: int
    seed: int

    @property
    def key(self) -> Key:
        return self.prompt.index, self.image

    @property
    def file(self) -> str:
        return f"images/{self.prompt.index:05d}_{self.image:03d}.png"

    @property
    def columns(self) -> Row:
        """The columns of its row that are known beforehand."""
        prompt, image, seed = self.prompt, self.image, self.seed
        row: Row = {"prompt_index": prompt.index, "image": image, "prompt": prompt.text}
        return row | {"category": prompt.category, "seed": seed, "file": None}


def jobs_of(prompts: Sequence[Prompt], num_images: int, first_seed: int) -> list[Job]:
    """Lists every image; its seed does not depend on which part of the prompts is taken.

    Raises UserError where a seed would be too large to be kept.
    """
    last = max((prompt.index for prompt in prompts), default=0)
    check_seed("seed", first_seed, (last + 1) * num_images, MAX_STORED_SEED)
    return [
        Job(
            number * num_images + image,
            prompt,
            image,
            first_seed + prompt.index * num_images + image,
        )
        for number, prompt in enumerate(prompts)
        for image in range(num_images)
    ]


class ImageGenerator:
    """Generates batches with `model`."""

    def __init__(
        self,
        config: MetricsConfig,
        settings: dict[str, Any],
        prompts: Sequence[Prompt],
        device: torch.device,
    ) -> None:
        self._config, self._settings, self.device = config, settings, device
        self._texts = [prompt.text for prompt in prompts]
        self.formats = {"device": device.type, "dtype": config.dtype, "tf32": config.tf32}
        """Columns that each image has of it."""
        self._model: Painter | None = None
        self.notes: tuple[str, ...] = ()
        self.num_rows = 0
        """Rows of the network evaluated so far."""
        dtype = getattr(torch, config.dtype, torch.float32)  # auto, where nothing is computed
        self._looked_at = config.load_model(device, dtype, with_unet=False)
        self._process_notes(self._looked_at)

    def _process_notes(self, model: Painter) -> None:
        """Notes an unusual process; raises UserError for an unsound one."""
        config, trained = self._config, model.process
        process = trained.respaced(config.timestep_spacing)
        process.check_sound(config.allow_unsound)
        respaced = trained.respacing_note(config.timestep_spacing)
        notes = [respaced] if respaced else []
        if process.incompatibility():
            notes.append(
                f"unsound, and sampled all the same (allow_unsound): {process.incompatibility()}"
            )
        self.notes = tuple(notes)
        own_height, own_width = model.image_sides
        self.size = (config.height or own_height, config.width or own_width)
        model.noise([0], config.height, config.width)  # says what sizes are possible
        process.grid(config.num_steps, config.sampler)  # says how many steps there are
        texts = [config.negative_prompt, *self._texts]
        model.check_prompts(texts, config.clip_skip, config.max_tokens)

    @property
    def model(self) -> Painter:
        """The model, loaded when it is first needed; refused where it is not the one that the
        folder's images are of."""
        if self._model is None:
            config = self._config
            model = self._looked_at
            if model.loaded_parts()[0].device.type == "meta":
                model = config.load_model(self.device, getattr(torch, config.dtype))
            # A LoRA may be of the text encoder, which an evaluation's digest else leaves out.
            digest = model.digest(of_encoders=bool(config.lora))
            if self._settings.get("weights_digest") not in (None, digest):
                raise UserError(
                    f"checkpoint={config.checkpoint} has other weights, or another process, than "
                    f"output={config.output} was sampled with; choose another output"
                )
            self._settings["weights_digest"] = digest
            model.process = model.process.respaced(config.timestep_spacing)
            model.prepare(config.attention, config.channels_last)
            model.count_rows(self._count)
            self._model = model
        return self._model

    def _count(self, rows: int) -> None:
        self.num_rows += rows

    def generate(self, jobs: Sequence[Job]) -> Pixels:
        """Generates the images of a batch, (N, 3, H, W) uint8; after the first, evaluation.json is
        there."""
        config = self._config
        options = config.sampling_options() | {"allow_unsound": config.allow_unsound}
        texts, seeds = [job.prompt.text for job in jobs], [job.seed for job in jobs]
        images = self.model.sample(texts, seeds, **options)
        pixels = eight_bit(images).contiguous()
        path = Path(config.output) / SETTINGS
        if not path.is_file():  # by which a later start knows whether it may go on here
            write_whole(path, json.dumps(self._settings, indent=1) + "\n")
        return pixels
