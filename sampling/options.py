"""The configuration of the verbs that need no more than a trained model: sample and export.

No import of torch at the top, so that their help is instant.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import MISSING

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import OutputText, PathText
from blackpoint.data.files.rules import require
from blackpoint.sampling.choices import (
    PLAIN,
    Attention,
    AutoDtype,
    LoraFile,
    Offload,
    Prompts,
    SingleFileConfig,
    Spacing,
    Tf32,
    Weights,
    check_seed,
)
from blackpoint.sampling.samplers import SamplerName, check_sampler

if TYPE_CHECKING:
    from blackpoint.sampling.guidance import Guidance
    from blackpoint.sampling.pipelines.painter import Painter

ROUNDING_KEYS = ("output", "batch_size", "device", "attention", "channels_last", "offload")
"""Keys that change images by rounding alone, or not at all, in every verb that samples."""


@dataclass
class SamplingOptions:
    """Checkpoint, sampler, guidance, device: keys that sample, search and evaluate share."""

    checkpoint: PathText = MISSING
    """Checkpoint to sample: a folder, hub id, run directory, .ckpt or single .safetensors file; or
    any text-to-image pipeline of diffusers, as a folder or hub id (docs/pipelines.md)."""
    prompts: Prompts = MISSING
    """A prompt, a list of them (["a cat", "a dog"]), or a file: .txt (one per line), .jsonl, .csv,
    .tsv or .parquet."""
    output: OutputText = MISSING
    """Folder to write; the same command there continues what was stopped."""
    seed: int = 0
    """Seed of the first image."""
    num_steps: int = 25
    """Sampling steps, from 1 to the number of training timesteps."""
    sampler: SamplerName = "ddim"
    """Sampling algorithm."""
    eta: float | None = None
    """Share of fresh noise in a step of ddim: 0 (also if not set) is deterministic, 1 ancestral."""
    guidance_scale: float = 7.5
    """Classifier-free guidance scale; 1 is off, and halves the NFE per step. 0, which is off in
    diffusers, generates without the prompt here."""
    guidance_rescale: float = 0.7
    """Strength of the rescale of the guided output's standard deviation, 0 to 1."""
    negative_prompt: str = ""
    """Text that guidance steers away from."""
    clip_skip: int = 0
    """Last layers of the text encoder to leave out for the prompts, as clip_skip of diffusers; the
    negative prompt has all. 1 is clip skip 2 of other tools."""
    max_tokens: int | None = None
    """Tokens of a text, beside those that begin and end it: 150 or 225 encode prompts and negative
    prompt in two or three chunks of 75; as much as the text encoder reads at once, 75, if not set.
    Longer texts are cut."""
    height: int | None = None
    """Height in px, a multiple of 8, for SDXL of 32; the model's own if not set."""
    width: int | None = None
    """Width in px, a multiple of 8, for SDXL of 32; the model's own if not set."""
    weights: Weights = "ema"
    """Which weights of a training checkpoint: their moving average or the last step's; of a single
    file with both: model_ema or model."""
    variant: str | None = None
    """Variant of the weight files in a folder or on the hub: fp16, bf16, non_ema; the plain files,
    or the only ones that are there, if not set."""
    single_file: SingleFileConfig = field(default_factory=SingleFileConfig)
    """What a checkpoint that is a single file lacks."""
    lora: list[LoraFile] | None = None
    """LoRA files to merge into the checkpoint: lora=FILE, or lora=[{path: FILE, scale: 0.8}]."""
    dtype: AutoDtype = "auto"
    """Number format of the model's weights; float16 and bfloat16 take half the memory. auto:
    bfloat16 on a GPU that computes in it, else float32."""
    tf32: Tf32 = "auto"
    """Compute float32 products and convolutions in TensorFloat-32 (10 bits of mantissa). auto: on a
    GPU of compute capability 8.0 or newer, and nowhere else."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, cuda, cuda:1, ..."""
    pipeline: dict[str, Any] = field(default_factory=dict)
    """Arguments of the call of a pipeline other than Stable Diffusion 1.x, 2.x and XL, such as
    pipeline.max_sequence_length=256 (docs/pipelines.md)."""
    offload: Offload = "none"
    """Keep the parts of such a pipeline in the CPU's memory and move them to the GPU as they are
    needed, part by part (model) or layer by layer (sequential)."""
    attention: Attention = "auto"
    """Attention kernel of the UNet: auto takes xformers where it runs, else sdpa (torch's own)."""
    channels_last: bool = False
    """Hold the convolutions' weights in channels-last order."""
    batch_size: int = 16
    """Images sampled at once; changes them only by rounding."""

    def sampling_options(self) -> dict[str, Any]:
        """Returns the arguments of DiffusionModel.sample that these fields are."""
        names = (
            *("num_steps", "guidance_scale", "guidance_rescale", "sampler", "eta", "height"),
            *("width", "negative_prompt", "batch_size", "clip_skip", "max_tokens"),
        )
        return {name: getattr(self, name) for name in names}

    def load_model(self, device: Any, dtype: Any, with_unet: bool = True) -> "Painter":
        """Loads the checkpoint by what these fields say of it: a DiffusionModel, or any other
        pipeline, which is always loaded whole. Raises UserError as their loaders do."""
        from blackpoint.sampling.model import DiffusionModel
        from blackpoint.sampling.pipelines.load import index_of, is_other_pipeline

        index = index_of(self.checkpoint)
        if index is not None and is_other_pipeline(index):
            return self._load_pipeline(index, device, dtype)
        for name, value in (("pipeline", self.pipeline), ("offload", self.offload)):
            if value not in ({}, "none"):
                raise UserError(
                    f"{name}={value} goes with pipelines other than Stable Diffusion 1.x, 2.x and "
                    f"XL, and checkpoint={self.checkpoint} is none; leave it out"
                )
        return DiffusionModel.load(
            self.checkpoint,
            device,
            dtype,
            self.weights,
            with_unet,
            variant=self.variant,
            single_file=self.single_file,
            loras=self.lora,
        )

    def _load_pipeline(self, index: dict[str, Any], device: Any, dtype: Any) -> "Painter":
        from blackpoint.sampling.guidance import Guidance
        from blackpoint.sampling.pipelines.load import load_pipeline

        for name, value in (("lora", self.lora), ("single_file", self.single_file != PLAIN)):
            if value:
                raise UserError(
                    f"{name} goes with Stable Diffusion 1.x, 2.x and XL, and checkpoint="
                    f"{self.checkpoint} is a {index['_class_name']}; leave it out"
                )
        return load_pipeline(
            self.checkpoint,
            index,
            device,
            dtype,
            self.variant,
            self.offload,
            self.num_steps,
            Guidance(self.guidance_scale, self.guidance_rescale),
            height=self.height,
            width=self.width,
            negative_prompt=self.negative_prompt,
            arguments=self.pipeline,
        )


@dataclass
class SampleConfig(SamplingOptions):
    """From prompts to images."""

    output: OutputText = MISSING
    """Folder to write; the same command there generates the missing images."""
    seed: int = 0
    """First seed; the images of each prompt use seed, seed + 1, ... (ignored if seeds is set)."""
    num_images: int = 1
    """Images per prompt (ignored if seeds is set)."""
    seeds: list[int] = field(default_factory=list)
    """Seeds of each prompt's images. Seed N is diffusers' torch.Generator("cpu") at N."""
    guidance_interval: list[int] | None = None
    """Timesteps [low, high], both included, at which guidance is on; all if not set."""
    timestep_spacing: Spacing | None = None
    """Timestep spacing other than the checkpoint's: trailing, leading or linspace."""
    allow_unsound: bool = False
    """Sample a checkpoint with an unsound process, for a comparison."""
    compile: bool = False
    """Compile the UNet with torch.compile, at the first step of each batch size."""

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size", "num_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check_seed("seed", self.seed, 1 if self.seeds else self.num_images)
        for seed in self.seeds:
            check_seed("seeds", seed)
        check_sampler(self.sampler, self.eta)
        interval = self.guidance_interval
        is_pair = interval is None or len(interval) == 2
        require(is_pair, "guidance_interval", interval, "two timesteps, [low, high]")
        self.guidance()

    def sampling_options(self) -> dict[str, Any]:
        """Returns the arguments of DiffusionModel.sample beside prompts and seeds."""
        own = {"allow_unsound": self.allow_unsound, "guidance_interval": self.guidance().interval}
        return super().sampling_options() | own

    def guidance(self) -> "Guidance":
        """Returns the guidance that these fields ask for; raises UserError where they cannot be."""
        from blackpoint.sampling.guidance import Guidance

        low_high = self.guidance_interval
        interval = None if low_high is None else (low_high[0], low_high[1])
        return Guidance(self.guidance_scale, self.guidance_rescale, interval)


@dataclass
class ExportConfig:
    """From a checkpoint to a diffusers folder or a single file; also from the one to the other."""

    checkpoint: PathText = MISSING
    """Checkpoint to export: a run directory, a Lightning .ckpt, a diffusers folder, a hub id or
    a single .safetensors file."""
    output: OutputText = MISSING
    """Folder to write, empty or absent; or a single file, NAME.safetensors, for ComfyUI, Forge,
    A1111 and others, with NAME.txt (what to set in each) and, of a v-prediction model, NAME.yaml
    beside it. Nothing is overwritten."""
    weights: Weights = "ema"
    """Which weights of a training checkpoint: their moving average or the last step's; of a single
    file with both: model_ema or model."""
    variant: str | None = None
    """Variant of the weight files in a folder or on the hub: fp16, bf16, non_ema; the plain files,
    or the only ones that are there, if not set."""
    single_file: SingleFileConfig = field(default_factory=SingleFileConfig)
    """What a checkpoint that is a single file lacks."""
    lora: list[LoraFile] | None = None
    """LoRA files to merge into the checkpoint: lora=FILE, or lora=[{path: FILE, scale: 0.8}]."""
    format: Literal["merged", "lora"] = "merged"
    """merged: a whole model. lora: the adapters of a run with lora.rank, in a folder: a file for
    diffusers, another for ComfyUI, Forge and A1111."""
    dtype: AutoDtype = "auto"
    """Number format of the written weights. auto: float16 in a single file, float32 in a folder."""
    verify: bool = True
    """Read what is written back with stock diffusers, a single file also with blackpoint, and
    compare latents with our own samplers; of a single file every weight too."""

    def __post_init__(self) -> None:
        if self.format == "merged":
            return
        if self.lora:
            raise UserError(
                f"format={self.format} writes the adapters of a run alone, and lora is set; leave "
                "lora out, or leave format out for the merged model"
            )
        if self.output.endswith(".safetensors"):
            raise UserError(
                f"output={self.output}: format={self.format} writes a folder, with one file for "
                "diffusers and another for other clients; name a folder"
            )
