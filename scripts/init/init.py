"""`blackpoint init`: a commented config for these photos, this checkpoint and this card.

Nothing is trained or downloaded but the checkpoint; memory is that of the planner (train/plan/).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from omegaconf import MISSING

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.imports import uncollected
from blackpoint.data.files.paths import OutputText, PathText
from blackpoint.data.files.rules import check_ranges
from blackpoint.data.files.whole_file import write_new
from blackpoint.train.config.config import Precision, TrainConfig

if TYPE_CHECKING:
    from blackpoint.scripts.init.look import Photos
    from blackpoint.train.plan.plan import Plan, Planner

MAX_STEPS, IMAGES_PER_STEP = 5000, 32
"""Those of configs/*_zero_snr_24gb.yaml."""
WHOLE = ((32, False), (8, True), (2, True), (1, True))
ADAPTERS = ((8, True), (2, True), (1, True))
"""Images at a time, and whether activations are computed again: the fastest first."""
RANK = 16
MANY_EPOCHS = 50
PLANNED_SHARE = 0.9
"""Of a card's room that a first config takes: plans are good to a tenth (docs/memory.md)."""


@dataclass
class InitConfig:
    """Photos and a checkpoint, and the config that trains the one on the other."""

    source: PathText = MISSING
    """Folder of images with captions, as `data pack` takes it."""
    checkpoint: PathText = MISSING
    """Checkpoint to start from: a diffusers folder, hub id, run directory, .ckpt or single
    .safetensors file."""
    output: OutputText = "config.yaml"
    """The config to write; an existing file is never overwritten."""
    card_gib: float | None = None
    """Memory of the GPU that the run is for, in GiB; not set: that of the GPU here, or 24 without
    one."""

    def __post_init__(self) -> None:
        check_ranges(self, "", card_gib="> 0")

    @property
    def shards(self) -> str:
        """Where the config looks for the packed photos."""
        return f"shards/{Path(self.source).resolve().name}"


def config_class() -> type[InitConfig]:
    return InitConfig


def run(config: InitConfig) -> int:
    """Looks, plans, writes and tells; returns the exit status."""
    output = Path(config.output)
    if output.exists():
        raise UserError(f"output={output} is there already; name another file, or remove it")
    with uncollected():
        from blackpoint.sampling.runtime.precision import computes_in_bfloat16
        from blackpoint.scripts.doctor.machine import card_of
        from blackpoint.scripts.init.look import describe_base, look_at_photos, product_rate
        from blackpoint.train.cluster.device import COMPUTE_DTYPE, training_device
        from blackpoint.train.plan.plan import CARD_GIB, GB, disk_text, planner_of
        from blackpoint.train.records.checkpoint_size import checkpoint_size
    photos, device = look_at_photos(Path(config.source)), training_device()
    side = checkpoint_size(config.checkpoint, "data.resolution")
    card, total = f"none here: a card of {CARD_GIB:g} GiB is planned for", CARD_GIB
    precision: Precision = "bf16-mixed"
    if device.type == "cuda":
        card, _, size = card_of(device)
        total = size / 2**30
        precision = "bf16-mixed" if computes_in_bfloat16(device) else "16-mixed"
    if config.card_gib is not None and config.card_gib != total:
        card, total = f"a card of {config.card_gib:g} GiB, as card_gib says", config.card_gib
    base = TrainConfig(run_dir=f"runs/{output.stem}", checkpoint=config.checkpoint, card_gib=total)
    base.data.shards = config.shards
    base.data.resolution, base.trainer.precision = side, precision
    base.trainer.max_steps, base.preview.num_images = MAX_STEPS, 1
    planner = planner_of(base)
    if planner.model.is_xl:
        base.loss.weighting = "min_snr"
    print(f"photos      {config.source}: " + "\n            ".join(photos.lines(side)))
    about = describe_base(planner.model, side)
    print(f"checkpoint  {config.checkpoint}: {about}\ncard        {card}")
    print("            planning the memory of its steps, which may take a minute", flush=True)
    chosen, plan, operations = choose(base, planner, total)
    if chosen.lora.rank is not None:
        print(f"            too small for all weights: adapters (LoRA) of rank {RANK} are trained")
    peak = plan.peak
    parts = [f"{k} {size / GB:.1f}" for k, (size, _) in plan.parts.items() if size > peak / 50]
    told = [
        f"memory      {peak / GB:.1f} GB planned: {', '.join(parts)}",
        f"disk        {disk_text(chosen, plan)}",
        f"length      {length(photos.count)}",
    ]
    rate, work = product_rate(device, COMPUTE_DTYPE[precision]), MAX_STEPS * operations
    told += [
        f"time        from {work / rate / 3600:,.1f} h up on the {device.type.upper()} here: "
        f"{work / 1e15:,.1f} PFLOP at {rate / 1e12:.2f} TFLOP/s,",
        "            which its matrix products reach now; whole steps are slower. What they take,",
        f"            here or on another card: {MAX_STEPS * IMAGES_PER_STEP:,} images / "
        "train/images_per_s of metrics.csv",
    ]
    print("\n".join(told))
    about = f"{config.source}, on {config.checkpoint} ({about})"
    header = [about, f"Command:    blackpoint train {output}", *told]
    write_new(output, text_of(chosen, photos, header))
    print(f"\nwrote {output}")
    return 0


def length(num_images: int) -> str:
    """Says how many steps and epochs the run has."""
    epochs = MAX_STEPS * IMAGES_PER_STEP / num_images
    text = f"{MAX_STEPS:,} steps of {IMAGES_PER_STEP} images, {epochs:,.1f} epochs"
    if epochs <= MANY_EPOCHS:
        return text
    return f"{text}: few images, which so many learn by heart; add others or end sooner"


def choose(
    base: TrainConfig, planner: "Planner", card_gib: float
) -> tuple[TrainConfig, "Plan", int]:
    """Returns the fastest config that fits a card, of the whole UNet or else of adapters, its plan,
    and the operations of a step; raises UserError where none does."""
    from blackpoint.train.config.learning_rate import with_learning_rate
    from blackpoint.train.plan.plan import GB, RESERVED_GIB

    room, least = (card_gib - RESERVED_GIB) * 2**30 * PLANNED_SHARE, 0
    for rank, portions in ((None, WHOLE), (RANK, ADAPTERS)):
        for batch_size, recomputes in portions:
            trainer = replace(
                base.trainer,
                gradient_checkpointing=recomputes,
                accumulate_grad_batches=IMAGES_PER_STEP // batch_size,
            )
            lora = replace(base.lora, rank=rank)
            config = replace(base, batch_size=batch_size, trainer=trainer, lora=lora)
            config = with_learning_rate(config)
            plan = planner.plan(config)
            if plan.peak <= room:
                operations = planner.step(config).operations * trainer.accumulate_grad_batches
                return config, plan, operations
            least = plan.peak
    raise UserError(
        f"card_gib={card_gib:g}: adapters of rank {RANK} need {least / GB:.1f} GB, one image at a "
        "time; name a larger card, or a smaller checkpoint"
    )


def text_of(config: TrainConfig, photos: "Photos", header: Sequence[str]) -> str:
    """Returns the file: what was found, then what differs from the defaults."""
    trainer, side = config.trainer, config.data.resolution
    places = [config.run_dir, config.checkpoint, config.data.shards]
    run_dir, checkpoint, shards = (_quoted(place) for place in places)
    lines = [
        *(f"# {line}" for line in "\n".join(header).splitlines()),
        f"run_dir: {run_dir}  # the same command there continues the run",
        f"checkpoint: {checkpoint}",
        f"batch_size: {config.batch_size}  # images at a time; {IMAGES_PER_STEP} make a step",
        "data:",
        f"  shards: {shards}  # what `blackpoint data pack` makes",
        f"  # resolution: {side}  # the checkpoint's own; images are cut to squares of it",
        "  # buckets: {enabled: true}  # or keep their shapes",
    ]
    if below := photos.num_below(side):
        lines.append(f"  # max_upscale: 1  # leaves out about {below:,} that would be enlarged")
    if config.loss.weighting != "uniform":
        lines += ["loss:", f"  weighting: {config.loss.weighting}  # as in configs/sdxl_*.yaml"]
    if config.lora.rank is not None:
        lines += ["lora:", f"  rank: {config.lora.rank}  # adapters; without it the whole UNet"]
    lines += [
        "trainer:",
        f"  max_steps: {trainer.max_steps}  # or max_epochs",
        f"  precision: {trainer.precision}",
        f"  accumulate_grad_batches: {trainer.accumulate_grad_batches}",
        f"  gradient_checkpointing: {str(trainer.gradient_checkpointing).lower()}",
        "preview:",
        f"  num_images: {config.preview.num_images}  # of each of preview.prompts",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str | None) -> str:
    return str(yaml.safe_dump([text], default_flow_style=True, width=2**20)).strip()[1:-1]
