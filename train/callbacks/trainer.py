"""A run's parts of Lightning: its callbacks, in the order that they need, and a bare Trainer."""

import logging
import warnings
from pathlib import Path

from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy

from blackpoint.train.callbacks.checkpoints import AtomicCheckpointIO, SaveCheckpoints
from blackpoint.train.callbacks.exports import StepExports
from blackpoint.train.callbacks.interruption import StopOnSignal
from blackpoint.train.callbacks.previews import Previews
from blackpoint.train.callbacks.progress import Progress
from blackpoint.train.callbacks.validation import ValidationLoss
from blackpoint.train.callbacks.watch import Watch
from blackpoint.train.callbacks.weights_watch import WeightsWatch
from blackpoint.train.cluster.sharding import ShardedStrategy
from blackpoint.train.config.config import Precision, TrainConfig
from blackpoint.train.ema import Ema
from blackpoint.train.records.first_process import note

# What Lightning warns of and what is meant here.
LIGHTNING_NOTES = (
    ".*does not have many workers.*",
    ".*have no `validation_step`.*",
    ".*You have overridden `transfer_batch_to_device`.*",
    ".*`isinstance\\(treespec, LeafSpec\\)`.*",
    ".*The `srun` command is available on your system but is not used.*",
)


def build_callbacks(
    config: TrainConfig, run_dir: Path, resume_step: int
) -> tuple[StopOnSignal, list[Callback]]:
    """Builds the callbacks in the order that they must run in after a step.

    The average is updated first; then the step is checked and logged, and shown; measurements
    follow; the checkpoint comes last, so that whatever a saved step has to log is logged before.
    """
    average = config.ema
    ema = None
    if average.enabled:
        ema = Ema(average.decay, average.every_steps, on_cpu=average.device == "cpu")
    watch = Watch(config.trainer.log_every_steps, config.batch_size)
    stop = StopOnSignal(watch)
    callbacks: list[Callback] = [ema] if ema else []
    callbacks += [watch, Progress(watch)]
    if config.watch.weights_every_steps:
        callbacks.append(WeightsWatch(config.watch.weights_every_steps, watch, ema))
    validation = None
    if config.trainer.validate_every_steps and config.data.validation_shards:
        validation = ValidationLoss(config.trainer.validate_every_steps, watch, ema)
        callbacks.append(validation)
    if config.preview.every_steps and config.preview.prompts:
        callbacks.append(Previews(run_dir / "previews", config.preview, watch, ema))
    save = SaveCheckpoints(
        run_dir / "checkpoints",
        (config.trainer.checkpoint_every_steps, config.export.every_steps),
        config.trainer.keep_checkpoints,
        watch,
        validation if config.trainer.keep_best else None,
        resume_step,
    )
    callbacks += [stop, save]
    if config.export.every_steps:
        callbacks.append(StepExports(config, run_dir, watch))
    return stop, callbacks


def lightning_precision(precision: Precision) -> Precision:
    """Returns Lightning's part of a precision: none of bf16-true, which the module itself holds.

    Lightning's own makes bfloat16 the default of every tensor in the training step, draws and
    schedules among them.
    """
    return "32-true" if precision == "bf16-true" else precision


def strategy(config: TrainConfig) -> Strategy | str:
    """Returns what shares a model among processes: DDP, or shares of it (trainer.strategy=fsdp).

    DDP's gradients lie in its buckets, not a second time beside them. The graph of a step is always
    the same, and DDP need not look for it. But of a static graph it exchanges the first batch even
    where that is only accumulated, and torch.compile, which cuts the graph along the buckets, takes
    none.
    """
    trainer = config.trainer
    if trainer.devices * trainer.num_nodes == 1:
        if trainer.strategy == "fsdp":
            note("trainer.strategy=fsdp: one process holds the whole model, nothing is sharded")
        return "auto"
    if trainer.strategy == "fsdp":
        return ShardedStrategy()
    is_static = trainer.accumulate_grad_batches == 1 and not trainer.compile
    return DDPStrategy(
        gradient_as_bucket_view=True, static_graph=is_static, broadcast_buffers=False
    )


def build_trainer(
    config: TrainConfig,
    run_dir: Path,
    loggers: list[Logger],
    callbacks: list[Callback],
    environment: ClusterEnvironment | None = None,
) -> Trainer:
    """Builds a Lightning Trainer that adds as little as it can to a bare loop."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in LIGHTNING_NOTES:
        warnings.filterwarnings("ignore", message=message)
    return Trainer(
        default_root_dir=run_dir,
        max_steps=config.trainer.max_steps,
        max_epochs=-1,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=strategy(config),
        precision=lightning_precision(config.trainer.precision),
        accumulate_grad_batches=config.trainer.accumulate_grad_batches,
        gradient_clip_val=config.trainer.gradient_clip or None,
        logger=loggers,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), *([environment] if environment else [])],
        use_distributed_sampler=False,
        limit_val_batches=0,  # the validation callback does it, before the checkpoint is saved
        num_sanity_val_steps=0,
        log_every_n_steps=config.trainer.log_every_steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=True,
    )
