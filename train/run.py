"""One run, from its config to an exported pipeline; started again, it goes on where it stopped."""

import gc
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from data.module import CaptionedImages
from data.summary import bucket_rows, write_buckets
from sampling.errors import Resumable, UserError
from sampling.export import export
from sampling.model import DiffusionModel
from sampling.speed import prepare_unet
from train.checkpoints import AtomicCheckpointIO, SaveCheckpoints, checkpoint_steps
from train.config import TrainConfig
from train.device import COMPUTE_DTYPE, check_device, set_tf32, training_device
from train.ema import Ema
from train.encoders import ready_encoders
from train.interruption import StopOnSignal
from train.metrics import CsvMetrics, is_first_process
from train.module import FineTuner
from train.previews import Previews
from train.process import fine_tuned_process
from train.progress import Progress
from train.run_directory import check_continues, write_records
from train.tracking import wandb_logger
from train.validation import ValidationLoss
from train.watch import Watch
from train.weights_watch import WeightsWatch

# What Lightning warns of and what is meant here.
LIGHTNING_NOTES = (
    ".*does not have many workers.*",
    ".*have no `validation_step`.*",
    ".*You have overridden `transfer_batch_to_device`.*",
    ".*`isinstance\\(treespec, LeafSpec\\)`.*",
)


def fit(config: TrainConfig) -> int:
    """Trains, resumes or finishes the run in config.run_dir; returns the exit status 0.

    Raises UserError for wrong input, before anything is written; RunFailed where the loss is not
    finite; Resumable where a signal stopped the run after saving it.
    """
    run_dir = Path(config.run_dir)
    check_continues(run_dir, config)
    last_step = max(checkpoint_steps(run_dir / "checkpoints"), default=0)
    if (run_dir / "export").exists():
        say(f"{run_dir} is finished: {last_step} steps, exported to {run_dir / 'export'}")
        return 0
    if last_step < config.trainer.max_steps:
        train(config, run_dir, last_step)
        # Trainer, module and callbacks hold each other: only this frees weights, moments and
        # average, before the export loads the model anew.
        gc.collect()
    if is_first_process():
        say(f"exporting to {run_dir / 'export'} and checking it against diffusers")
        newest = list(checkpoint_steps(run_dir / "checkpoints").values())[-1]
        export(newest, run_dir / "export", weights="ema" if config.ema.enabled else "raw")
        say(f"done: {run_dir / 'export'}")
    return 0


def train(
    config: TrainConfig, run_dir: Path, resume_step: int, watchers: Sequence[Callback] = ()
) -> None:
    """Trains from the checkpoint of `resume_step` (0: from config.checkpoint) to max_steps.

    `watchers` are called after the run's own callbacks, such as a benchmark's clock.
    """
    device = training_device()
    check_device(config, device)
    set_tf32(config.trainer.tf32)
    model = DiffusionModel.load(config.checkpoint)
    model.process = fine_tuned_process(config, model.process)
    model.latent_shape(config.data.resolution, config.data.resolution)
    choice = prepare_unet(
        model.unet,
        config.trainer.attention,
        config.trainer.channels_last,
        config.trainer.compile,
        device=device,
        dtype=COMPUTE_DTYPE[config.trainer.precision],
        training=True,
    )
    if choice:
        say(f"note: {choice}")
    images = CaptionedImages(config.data, config.seed, config.batch_size)
    if is_first_process():
        images.prepare_data()
        images.setup("fit")
        check_sizes(model, images)
        for line in images.summary():
            say(line)
    previews = bool(config.preview.every_steps and config.preview.prompts)
    note = ready_encoders(model, images.encodings(), previews)
    if note:
        say(f"note: {note}")
    if is_first_process():
        write_records(run_dir, config)
        rows = list(bucket_rows(images.readers()))
        if rows:
            write_buckets(run_dir / "buckets.csv", rows)
    loggers: list[Logger] = [CsvMetrics(run_dir / "metrics.csv", resume_step)]
    if config.wandb.enabled and is_first_process():
        loggers.append(wandb_logger(config, run_dir))
    stop, callbacks = build_callbacks(config, run_dir)
    trainer = build_trainer(config, run_dir, loggers, [*callbacks, *watchers])
    if resume_step:
        say(f"resuming {run_dir} at step {resume_step}")
    checkpoint = checkpoint_steps(run_dir / "checkpoints").get(resume_step)
    try:
        trainer.fit(FineTuner(model, config), datamodule=images, ckpt_path=checkpoint)
    finally:
        stop.restore_handlers()
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish()
    if stop.stopped_step is not None:
        raise Resumable(
            f"stopped at step {stop.stopped_step} of {config.trainer.max_steps}, saved in "
            f"{run_dir / 'checkpoints'}; the same command continues"
        )


def check_sizes(model: DiffusionModel, images: CaptionedImages) -> None:
    """Raises UserError for a bucket whose size the UNet cannot halve evenly."""
    for width, height in images.sizes():
        try:
            model.latent_shape(height, width)
        except UserError as error:
            raise UserError(
                f"data.buckets.step_px={images.config.buckets.step_px} makes images of {width} x "
                f"{height} px, but {error}; set step_px to that"
            ) from None


def build_callbacks(config: TrainConfig, run_dir: Path) -> tuple[StopOnSignal, list[Callback]]:
    """Builds the callbacks in the order that they must run in after a step.

    The average is updated first; then the step is checked and logged, and shown; measurements
    follow; the checkpoint comes last, so that whatever a saved step has to log is logged before.
    """
    ema = Ema(config.ema.decay) if config.ema.enabled else None
    watch = Watch(config.trainer.log_every_steps, config.batch_size)
    stop = StopOnSignal(watch)
    callbacks: list[Callback] = [ema] if ema else []
    callbacks += [watch, Progress(watch)]
    if config.watch.weights_every_steps:
        callbacks.append(WeightsWatch(config.watch.weights_every_steps, watch, ema))
    if config.trainer.validate_every_steps and config.data.validation_shards:
        callbacks.append(ValidationLoss(config.trainer.validate_every_steps, watch, ema))
    if config.preview.every_steps and config.preview.prompts:
        callbacks.append(Previews(run_dir / "previews", config.preview, watch, ema))
    checkpoints = run_dir / "checkpoints"
    every, keep = config.trainer.checkpoint_every_steps, config.trainer.keep_checkpoints
    return stop, [*callbacks, stop, SaveCheckpoints(checkpoints, every, keep, watch)]


def build_trainer(
    config: TrainConfig, run_dir: Path, loggers: list[Logger], callbacks: list[Callback]
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
        precision=config.trainer.precision,
        accumulate_grad_batches=config.trainer.accumulate_grad_batches,
        gradient_clip_val=config.trainer.gradient_clip or None,
        logger=loggers,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        limit_val_batches=0,  # the validation callback does it, before the checkpoint is saved
        num_sanity_val_steps=0,
        log_every_n_steps=config.trainer.log_every_steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=True,
    )


@rank_zero_only
def say(text: str) -> None:
    """Tells the user where the run stands, on stderr."""
    print(text, file=sys.stderr, flush=True)
