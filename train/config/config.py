"""The configuration of a fine-tune: one dataclass for each part, composed by TrainConfig.

No import of torch at the top, so that the help is instant.
"""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from blackpoint.data.config import DataConfig
from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import OutputText, PathText
from blackpoint.data.files.rules import check_ranges
from blackpoint.sampling.choices import (
    Attention,
    AutoDtype,
    CompileMode,
    SingleFileConfig,
    Tf32,
    check_seed,
)
from blackpoint.sampling.runtime.tracking import WandbConfig
from blackpoint.train.config.combinations import check_combinations
from blackpoint.train.config.export_config import StepExportConfig
from blackpoint.train.config.lora_config import LoraConfig, has_files
from blackpoint.train.config.model_config import DropoutConfig, ModelConfig
from blackpoint.train.config.schedule_config import ScheduleConfig
from blackpoint.train.loss_config import LossConfig

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"]


@dataclass
class OptimizerConfig:
    """The optimizer, with a linear warm-up of the learning rate and, if wanted, its decay."""

    name: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    """adamw is fused; adamw_8bit keeps its state in 8 bits (needs the extra eight-bit); adafactor
    keeps means over rows and columns, and has neither beta1, beta2 nor epsilon."""
    learning_rate: float | None = None
    """Learning rate after the warm-up; not set: 1e-5, and 1e-4 for adapters (lora.rank)."""
    warmup_steps: int = 500
    """Optimizer steps over which the learning rate rises linearly from near 0."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the learning rate falls after the warm-up, to 0 at trainer.max_steps; none: it stays."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.999
    """Decay of the squared gradient's running mean."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    epsilon: float = 1e-8
    """Added to the denominator of the update."""
    fused_backward: bool = False
    """Update each weight within the backward pass and drop its gradient at once, so that gradients
    take next to no memory. Needs trainer.gradient_clip=0, no accumulation and one process."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How updated weights and states are rounded to bfloat16 (trainer.precision=bf16-true): up or
    down at random, so that the mean is exact; or to the nearest, which loses small updates."""

    def __post_init__(self) -> None:
        check_ranges(self, "optimizer.", learning_rate="> 0", warmup_steps=">= 0", epsilon="> 0")
        check_ranges(self, "optimizer.", beta1=">= 0 and < 1", beta2=">= 0 and < 1")
        check_ranges(self, "optimizer.", weight_decay=">= 0")


@dataclass
class EmaConfig:
    """The exponential moving average of the weights, which is what gets exported."""

    enabled: bool = True
    """Keep an average beside what is trained (of a UNet, one more copy of it in memory)."""
    decay: float = 0.9999
    """Final decay per step; early on it is (1 + n) / (10 + n) after n steps, if that is less."""
    every_steps: int = 1
    """Optimizer steps between updates of the average, which then decays by as many steps at once;
    of a step in between, the average is that of the update before."""
    device: Literal["same", "cpu"] = "same"
    """Memory that holds the average, always in float32: that of the weights, or the CPU's."""

    def __post_init__(self) -> None:
        check_ranges(self, "ema.", decay=">= 0 and < 1", every_steps=">= 1")


@dataclass
class TrainerConfig:
    """How long, on what, and how often to look."""

    max_steps: int = 10_000
    """Optimizer steps of the whole run."""
    max_epochs: float | None = None
    """Passes over the training images, from which max_steps is worked out once they are counted; a
    part of one, such as .5, will do. Not set: max_steps says it."""
    devices: int = 1
    """Processes on each node, one per GPU (or CPU). Left at 1, torchrun says both."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """What several processes hold: ddp, each the whole model; fsdp, each its share of weights,
    gradients, optimizer states and average (docs/sharding.md). auto is ddp."""
    precision: Precision = "32-true"
    """Precision of the UNet's forward and backward pass. What is trained and the loss stay in
    float32; weights that adapters leave frozen (lora.rank) are held in it, to the same bits. With
    bf16-true what is trained, its gradients and the optimizer's state are bfloat16 as well."""
    encoder_dtype: AutoDtype = "auto"
    """Number format of the frozen VAE and text encoder; latents and embeddings are float32 in every
    case. auto: bfloat16 on a GPU that computes in it, else float32. With float16 a VAE goes on in
    float32 once it overflows, so a resumed run need not repeat every bit."""
    tf32: Tf32 = "auto"
    """Compute float32 products and convolutions in TensorFloat-32 (10 bits of mantissa). auto: on a
    GPU of compute capability 8.0 or newer, and nowhere else."""
    attention: Attention = "auto"
    """Attention kernel of the UNet: auto takes xformers where it runs, else sdpa (torch's own)."""
    channels_last: bool = False
    """Hold the convolutions' weights in channels-last order."""
    compile: bool = False
    """Compile the UNet with torch.compile, at the first step of each batch shape."""
    compile_mode: CompileMode = "default"
    """What torch.compile may do more, where all batches are of one size: reduce-overhead records
    CUDA graphs; max-autotune also times kernels and takes the fastest, at the first step of each
    start, so a resumed run need not repeat every bit."""
    accumulate_grad_batches: int = 1
    """Batches whose gradients are averaged into one optimizer step."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient; 0 switches clipping off."""
    gradient_checkpointing: bool = False
    """Recompute the UNet's activations in the backward pass: less memory, about 1.3x the time."""
    gradient_checkpointing_levels: list[int] = field(default_factory=list)
    """Levels of the UNet that are recomputed, 0 the one of the highest resolution, where most of
    the memory goes; an empty list: all of them."""
    log_every_steps: int = 10
    """Optimizer steps between rows of metrics."""
    validate_every_steps: int = 500
    """Optimizer steps between validation losses, of v whatever the network predicts; 0 switches
    them off."""
    checkpoint_every_steps: int = 500
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: bool = True
    """Keep the checkpoint of the lowest validation loss too, that of the network's own output (v,
    epsilon or sample); checkpoints/best.json names it."""

    def __post_init__(self) -> None:
        check_ranges(self, "trainer.", max_steps=">= 1", max_epochs="> 0")
        check_ranges(self, "trainer.", devices=">= 1", num_nodes=">= 1")
        check_ranges(self, "trainer.", accumulate_grad_batches=">= 1", log_every_steps=">= 1")
        check_ranges(self, "trainer.", checkpoint_every_steps=">= 1", keep_checkpoints=">= 1")
        check_ranges(self, "trainer.", validate_every_steps=">= 0", gradient_clip=">= 0")


@dataclass
class PreviewConfig:
    """Images of the training model, at fixed prompts and seeds, with the averaged weights."""

    prompts: list[str] = field(
        default_factory=lambda: [
            "a solid black background",
            "a solid white background",
            "a photo of a forest at night",
            "a photo of a bird on snow",
        ]
    )
    """Prompts, one row of the grid each; an empty list switches previews off."""
    every_steps: int = 500
    """Optimizer steps between grids; 0 switches them off, and with cached latents the encoders
    then stay out of memory."""
    num_images: int = 4
    """Columns of the grid: seeds 0, 1, 2, ..."""
    num_steps: int = 25
    """Sampling steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance; 1 is off."""
    guidance_rescale: float = 0.7
    """Rescale of the guided output towards the conditional's standard deviation, 0 to 1."""

    def __post_init__(self) -> None:
        check_ranges(self, "preview.", every_steps=">= 0", num_images=">= 1", num_steps=">= 1")
        check_ranges(self, "preview.", guidance_rescale=">= 0 and <= 1")


@dataclass
class WatchConfig:
    """What is measured beside the losses."""

    weights_every_steps: int = 100
    """Optimizer steps between norms of the weights, and their distance to the average; 0 switches
    them off."""

    def __post_init__(self) -> None:
        check_ranges(self, "watch.", weights_every_steps=">= 0")


@dataclass
class TrainConfig:
    """A fine-tune of a Stable Diffusion UNet, from its checkpoint to an exported pipeline.

    Or the training of a pixel-space model, from random weights.
    """

    run_dir: OutputText = MISSING
    """Directory of the run; the same command there continues an interrupted run."""
    checkpoint: PathText | None = None
    """Checkpoint to start from: a diffusers folder, hub id, run directory, .ckpt or single
    .safetensors file. Not set: random weights of the pixel-space architecture of `model`."""
    seed: int = 0
    """Decides every draw of the run, together with the epoch and the sample's index."""
    batch_size: int = 16
    """Images per batch, over all processes together; an optimizer step takes
    accumulate_grad_batches of them."""
    plan: bool = False
    """Print what each process will hold in memory, the size of a checkpoint and the steps of an
    epoch, and train nothing."""
    card_gib: float | None = None
    """Memory of the GPU that plan=true plans for, in GiB as its name says: 24 of an RTX 4090. Not
    set: 24 where a GPU is here; else the plan is for this machine's CPU."""
    allow_unsound: bool = False
    """Allow pairs that cannot work, for study: epsilon, leading timesteps, offset noise or a weight
    of 0 at the last timestep with zero SNR."""
    single_file: SingleFileConfig = field(default_factory=SingleFileConfig)
    """What a checkpoint that is a single file lacks."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """A pixel-space model to make, where there is no checkpoint."""
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    """Dropout in the UNet."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters to train in the place of the UNet's weights."""
    data: DataConfig = field(default_factory=DataConfig)
    """Shards and how images are read."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The noise schedule."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The training target, the weight of each timestep, and the draws of t and eps."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer and its warm-up."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Average of the weights."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Length, devices, intervals."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    """Preview grids."""
    export: StepExportConfig = field(default_factory=StepExportConfig)
    """Exports while the run goes on."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """Measurements of the weights."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Tracking."""

    def __post_init__(self) -> None:
        check_ranges(self, "", batch_size=">= 1", card_gib="> 0")
        check_seed("seed", self.seed)
        world_size = self.trainer.devices * self.trainer.num_nodes
        if self.batch_size % world_size:
            raise UserError(
                f"batch_size={self.batch_size} cannot be divided among {world_size} processes "
                "(trainer.devices * trainer.num_nodes); choose a multiple"
            )
        self._check_start()
        check_combinations(self)
        if self.export.format == "lora" and not has_files(self.lora):
            raise UserError(
                "export.format=lora needs adapters, lora.rank, and none of DoRA, whose files "
                "clients read in different ways; use export.format=folder or file"
            )
        if self.schedule.zero_terminal_snr:
            # torch: for a config, not for its help
            from blackpoint.sampling.process import Process
            from blackpoint.sampling.schedule import NoiseSchedule
            from blackpoint.train.weighting import check_sound

            zero_snr = NoiseSchedule.scaled_linear().zero_terminal_snr()
            process = Process(zero_snr, self.loss.prediction_type, self.schedule.timestep_spacing)
            process.check_sound(self.allow_unsound)
            check_sound(self.loss, zero_snr, self.allow_unsound)

    def _check_start(self) -> None:
        if self.checkpoint is not None:
            if self.model.channels:
                raise UserError(
                    f"checkpoint={self.checkpoint} and model.channels={self.model.channels}: a run "
                    "starts from a checkpoint or makes its own model; set checkpoint=null for the "
                    "latter"
                )
            return
        if self.lora.rank is not None:
            raise UserError(
                f"lora.rank={self.lora.rank}, but checkpoint is not set: adapters are of a model "
                "that is trained already; name it, or leave lora.rank out"
            )
        if not self.model.channels:
            raise UserError(
                "checkpoint is not set: name what to start from (a diffusers folder, hub id, run "
                "directory or .ckpt), or describe a pixel-space model to train from random "
                "weights: model.channels, model.blocks, model.transformer_blocks"
            )
        if self.schedule.betas == "checkpoint":
            raise UserError(
                "schedule.betas=checkpoint, but the run starts from random weights: choose "
                "cosine_continuous (with schedule.log_snr_min and log_snr_max), cosine_discrete, "
                "linear or scaled_linear"
            )
