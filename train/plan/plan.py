"""`blackpoint train CONFIG.yaml plan=true`: what the run will hold, and what makes it fit a card.

    peak = weights + states + average + encoders + max(step, encoding of a batch, previews)

in which the step is the peak of its two passes, gradients among it, or all gradients at its end.
The gradients of the step before are there while previews are sampled and decoded.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from blackpoint.data.files.dotted import flat
from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import shipped
from blackpoint.data.module import CaptionedImages
from blackpoint.sampling.checkpoints.encoders import images_per_call
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.sampling.statistics.table import Table
from blackpoint.train.cluster.device import training_device
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.config.learning_rate import warmup_note, with_learning_rate
from blackpoint.train.optimizer import state_bytes, update_bytes
from blackpoint.train.pixel_model import build_pixel_model
from blackpoint.train.plan.step_memory import (
    StepMemory,
    autoencoder_memory,
    preview_images,
    step_memory,
)
from blackpoint.train.records.checkpoint_size import checkpoint_size
from blackpoint.train.records.run_directory import RunRecord, describe_batch
from blackpoint.train.records.sizes import sized, steps_of_epochs

GB = 1e9
RESERVED_GIB = 1.5
"""Of a card: the driver's context, workspaces of kernels, gaps of the allocator."""
CARD_GIB = 24.0
ENCODERS = ("vae", "text_encoder", "text_encoder_2")
MEMORY_KEYS = (
    *("trainer.precision", "trainer.gradient_checkpointing", "trainer.devices", "batch_size"),
    *("optimizer.name", "optimizer.fused_backward", "ema.enabled", "ema.device", "lora.rank"),
)
"""What decides the memory, of which shipped configs are compared."""
ONE_BY_ONE: dict[str, Any] = {"batch_size": 1, "trainer.accumulate_grad_batches": 1}
"""Of one process, for one image per step."""
IN_BACKWARD: dict[str, Any] = {
    "optimizer.fused_backward": True,
    "trainer.gradient_clip": 0.0,
    "trainer.accumulate_grad_batches": 1,
}
REMEDIES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"trainer.gradient_checkpointing": True}, "the same bits, 1.3 times as long"),
    (ONE_BY_ONE, "one image per process at a time, and the same images per step"),
    ({"preview.every_steps": 0}, "no previews; with cached latents the encoders stay out"),
    ({"trainer.precision": "bf16-mixed"}, "products in bfloat16"),
    ({"ema.device": "cpu"}, "the average in the CPU's memory; ema.every_steps=10 spares copies"),
    ({"optimizer.name": "adamw_8bit"}, "states in 8 bits"),
    ({"trainer.precision": "bf16-true"}, "weights, gradients and states in bfloat16"),
    ({"optimizer.name": "adafactor"}, "hardly any states"),
    (IN_BACKWARD, "no gradients kept, so no clipping and fewer images per step"),
    ({"ema.enabled": False}, "no average; the export takes the last weights"),
    ({"lora.rank": 16}, "adapters in the place of a full fine-tune"),
)
"""Keys that save memory, the cheapest first, and what each costs."""


@dataclass(frozen=True)
class Plan:
    """The memory of one process, in bytes, and the length of the run."""

    parts: Mapping[str, tuple[int, str]]
    """Name -> bytes held at the peak, and what they are."""
    checkpoint: int
    images: int | None
    """In an epoch; None where the shards can't be read yet."""

    @property
    def peak(self) -> int:
        return sum(size for size, _ in self.parts.values())


@dataclass
class Planner:
    """Plans of one model under several configs; what is measured once is kept."""

    model: DiffusionModel
    on_gpu: bool
    encoded: bool
    """Whether the data are latents and embeddings, so that encoders serve previews alone."""
    images: int | None

    def __post_init__(self) -> None:
        self._steps: dict[str, StepMemory] = {}

    def plan(self, config: TrainConfig) -> Plan:
        """Returns the plan of a config of this model and these data."""
        batch, step = describe_batch(config)["images_per_process"], self.step(config)
        optimizer, trained = config.optimizer, sum(p.numel() for p in step.parameters)
        gradients = 0 if optimizer.fused_backward else step.trained
        states = sum(state_bytes(optimizer, p) for p in step.parameters)
        average = 4 * trained if config.ema.enabled else 0
        encoders, encoding, previews = self._encoders(config, batch, step.sampling)
        waiting = gradients if config.trainer.accumulate_grad_batches > 1 else 0
        update = update_bytes(optimizer, step.parameters)
        passes = step.peak + update if optimizer.fused_backward else step.peak
        passes = max(passes, gradients + update, encoding + waiting, gradients + previews)
        name = "the UNet" if config.lora.rank is None else "adapters"
        on_card = not self.on_gpu or config.ema.device == "same"
        is_sharded = config.trainer.strategy == "fsdp"
        share = describe_batch(config)["num_processes"] if is_sharded else 1
        name += f", 1/{share} in each process" if share > 1 else ""
        parts = {
            "frozen weights": (step.frozen, "the UNet below adapters"),
            "trained weights": (step.trained // share, name),
            "gradients": (gradients // share, name),
            "optimizer states": (states // share, optimizer.name),
            "average": (average // share if on_card else 0, "ema, float32"),
            "encoders": (encoders, "VAE and text encoders"),
            "activations": (passes - gradients, f"{batch} images per process, temporaries"),
        }
        held = {name: part for name, part in parts.items() if part[0]}
        return Plan(held, step.trained + average + states, self.images)

    def step(self, config: TrainConfig) -> StepMemory:
        sections = (config.data, config.lora, config.trainer, config.loss, config.optimizer)
        deciding = (config.batch_size, config.dropout, config.preview, *sections)
        key = repr(deciding)
        if key not in self._steps:
            batch = describe_batch(config)["images_per_process"]
            self._steps[key] = step_memory(config, self.model, batch, self.on_gpu)
        return self._steps[key]

    def _encoders(self, config: TrainConfig, batch: int, sampling: int) -> tuple[int, int, int]:
        """Returns the bytes of the encoders that stay, of encoding a batch, and of previews, of
        which the UNet takes `sampling`."""
        model, shown = self.model, preview_images(config.preview)
        if self.encoded and not shown:
            return 0, 0, sampling
        chosen = config.trainer.encoder_dtype
        name = ("bfloat16" if self.on_gpu else "float32") if chosen == "auto" else chosen
        dtypes = {part: getattr(torch, name) for part in ENCODERS}
        if model.vae_is_float32:
            dtypes["vae"] = torch.float32
        parts = ENCODERS[model.pixels is not None : 1 + len(model.tokenizers)]
        size, files = 0, model.pipeline
        for part in parts:
            held = files.tensors(part) if files else getattr(model, part).parameters()
            size += dtypes[part].itemsize * sum(tensor.numel() for tensor in held)
        if model.pixels is not None:
            return size, 0, sampling
        side, dtype = config.data.resolution, dtypes["vae"]
        at_once = images_per_call(side, side)
        if shown:
            decoding = autoencoder_memory(model, min(shown, at_once), side, dtype, decodes=True)
            sampling = max(sampling, decoding)
        if self.encoded:  # on a GPU they wait on the CPU between previews
            return (0, 0, size + sampling) if self.on_gpu else (size, 0, sampling)
        return size, autoencoder_memory(model, min(batch, at_once), side, dtype), sampling


def planner_of(config: TrainConfig) -> Planner:
    """Reads configs of the model and the index of the data; UserError as at a run's start."""
    if config.checkpoint is None:
        process = Process(NoiseSchedule.scaled_linear())
        model = build_pixel_model(config.model, config.data.resolution, process, config.single_file)
    else:
        model = DiffusionModel.load(
            config.checkpoint,
            with_unet=False,
            single_file=config.single_file,
            undecided=config.loss.prediction_type,
        )
    images = CaptionedImages(config.data, config.seed, config.batch_size)
    on_gpu = config.card_gib is not None or training_device().type == "cuda"
    encoded, count = False, None
    with contextlib.suppress(UserError):  # a plan may come before the data
        encoded = all(encoding is not None for _, encoding in images.encodings())
        images.setup("fit")
        count = images.num_training_images
    return Planner(model, on_gpu, encoded, count)


def planned_peak(config: TrainConfig) -> int:
    """Returns the bytes that each process of a run is planned to hold."""
    config = _sized(with_learning_rate(config))
    return planner_of(config).plan(config).peak


def show_plan(config: TrainConfig) -> int:
    """Prints the plan of a run, and the keys that bring it under a card; returns exit status 0."""
    config = _sized(with_learning_rate(config))
    planner = planner_of(config)
    print("\n".join(_lines(config, planner)))
    return 0


def _sized(config: TrainConfig) -> TrainConfig:
    """Returns the config with the size of images that a run would take."""
    try:
        return sized(config, RunRecord.read(Path(config.run_dir)))
    except UserError:  # a plan may come before the data
        if config.checkpoint is None:
            raise
        side = checkpoint_size(config.checkpoint, "data.resolution", config.single_file)
        return with_values(config, {"data.resolution": side})


def disk_text(config: TrainConfig, plan: Plan) -> str:
    """Tells what the checkpoints of a run take; a new one is whole before an old one goes."""
    trainer = config.trainer
    has_best = trainer.keep_best and trainer.validate_every_steps and config.data.validation_shards
    most = trainer.keep_checkpoints + bool(has_best) + 1
    best, size = "the best, " if has_best else "", plan.checkpoint / GB
    what = f"{trainer.keep_checkpoints} kept, {best}the one being written"
    return f"{size:.1f} GB per checkpoint, {most * size:.1f} GB at most ({what})"


def _lines(config: TrainConfig, planner: Planner) -> Iterator[str]:
    plan = planner.plan(config)
    processes = config.trainer.devices * config.trainer.num_nodes
    each = f"each of {processes} processes" if processes > 1 else "the process"
    yield f"memory of {each} on a {'GPU' if planner.on_gpu else 'CPU'}:\n"
    rows = [(name, size / GB, what) for name, (size, what) in plan.parts.items()]
    columns = {"part": "", "GB": ".2f", "of": ""}
    yield Table.of(columns, [*rows, ("peak", plan.peak / GB, "the largest sum")]).text()
    yield f"disk: {disk_text(config, plan)}"
    if config.trainer.strategy == "fsdp":
        yield "not counted: the blocks whose weights are gathered while they are computed"
    per_step, most = describe_batch(config)["images_per_step"], config.trainer.max_steps
    if plan.images is None:
        kind = "latents" if planner.encoded else "images"
        yield f"data.shards can't be read yet and count as {kind}; a step takes {per_step}"
    else:
        steps = plan.images / per_step
        if config.trainer.max_epochs is not None:
            most = steps_of_epochs(config, plan.images)
        yield (
            f"an epoch: {plan.images} images, {steps:.1f} steps of {per_step}; "
            f"{most} steps are {most / steps:.1f} epochs"
        )
    if note := warmup_note(config.optimizer, most):
        yield f"note: {note}"
    if planner.on_gpu:
        yield from _fitting(config, planner, config.card_gib or CARD_GIB)


def _fitting(config: TrainConfig, planner: Planner, card_gib: float) -> Iterator[str]:
    """Yields the keys that bring the run under a card, cheapest first, one by one."""
    room = (card_gib - RESERVED_GIB) * 2**30
    peak = planner.plan(config).peak
    card = f"a card of {card_gib:g} GiB ({room / GB:.1f} GB beside the driver's and the gaps)"
    if peak <= room:
        yield f"it fits {card}{_like(config, planner.model)}"
        return
    keys: list[str] = []
    yield f"it does not fit {card}; what saves memory, the cheapest first:"
    for values, cost in REMEDIES:
        if values is ONE_BY_ONE:
            batch = describe_batch(config)
            portions = batch["images_per_step"] // batch["num_processes"]
            numbers = (batch["num_processes"], portions)
            values = dict(zip(values, numbers, strict=True))
        try:
            changed = with_values(config, values)
            smaller = planner.plan(changed).peak
        except UserError:  # does not combine with what is chosen already
            continue
        if smaller >= peak:
            continue
        config, peak = changed, smaller
        words = " ".join(f"{key}={_text(value)}" for key, value in values.items())
        keys.append(words)
        yield f"  {words}: {peak / GB:.2f} GB ({cost})"
        if peak <= room:
            yield f"together: {' '.join(keys)}{_like(config, planner.model)}"
            return
    yield "nothing brings it under that card; take a larger one, or a smaller data.resolution"


def with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """Returns a config with other values of dotted keys; raises as the config does."""
    for key, value in values.items():
        name, _, rest = key.partition(".")
        value = with_values(getattr(config, name), {rest: value}) if rest else value
        config = replace(config, **{name: value})
    return config


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _like(config: TrainConfig, model: DiffusionModel) -> str:
    """Names the shipped configs with the same values of what decides the memory."""
    names = []
    defaults = flat(asdict(TrainConfig(run_dir="", checkpoint="")))
    chosen = flat(asdict(config))
    for path in sorted(Path(shipped("configs/sd15_zero_snr.yaml")).parent.glob("*.yaml")):
        loaded: Any = OmegaConf.to_container(OmegaConf.load(path))
        values = flat(loaded)
        own = [values.get(key, defaults[key]) for key in MEMORY_KEYS]
        is_xl = "xl" in str(values.get("checkpoint")).lower()
        is_alike = own == [chosen[key] for key in MEMORY_KEYS] and is_xl == model.is_xl
        if "checkpoint" in values and is_alike:
            names.append(str(path))
    return f"; as {', '.join(names)}" if names else ""
