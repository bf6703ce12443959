"""One run, from its config to an exported pipeline; started again, it goes on where it stopped."""

import contextlib
import errno
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from blackpoint.data.files.errors import (
    FORBIDDEN,
    NOT_WRITABLE,
    NotExportable,
    Resumable,
    RunFailed,
    UserError,
)
from blackpoint.data.module import CaptionedImages
from blackpoint.data.summary import bucket_rows, write_buckets
from blackpoint.sampling.export.export import export
from blackpoint.sampling.runtime.precision import set_tf32
from blackpoint.sampling.runtime.speed import prepare_unet
from blackpoint.train.callbacks.checkpoints import checkpoint_steps, newest_whole, remove_torn
from blackpoint.train.callbacks.interruption import lost_process
from blackpoint.train.callbacks.metrics import CsvMetrics, is_first_process
from blackpoint.train.callbacks.trainer import build_callbacks, build_trainer
from blackpoint.train.cluster.cluster import as_launched, cluster_environment, num_started
from blackpoint.train.cluster.device import (
    COMPUTE_DTYPE,
    check_count,
    check_device,
    settled,
    take_device,
    training_device,
)
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.dropout import dropout_levels
from blackpoint.train.encode.encoders import ready_encoders
from blackpoint.train.module import FineTuner
from blackpoint.train.optimizer import warmup_note
from blackpoint.train.records.checkpoint_size import check_side
from blackpoint.train.records.run_checks import (
    check_renamed,
    checked_identity,
    is_finished,
    keep_earlier_export,
)
from blackpoint.train.records.run_directory import (
    as_started,
    check_continues,
    describe_batch,
    steps_done,
    write_config,
    write_records,
)
from blackpoint.train.records.run_identity import begun_decoder, write_identity
from blackpoint.train.records.run_lock import RunLock
from blackpoint.train.records.sizes import check_sizes, sized
from blackpoint.train.records.tracking import finish, sent_rows, wandb_logger
from blackpoint.train.start import hold_encoders, keep_base, starting_model


def fit(config: TrainConfig) -> int:
    """Trains, resumes or finishes the run in config.run_dir; returns the exit status 0.

    Raises UserError for wrong input, before anything is written; RunFailed where the loss is not
    finite or the disk takes no more; Resumable where a signal stopped the run after saving it.
    """
    config = as_launched(config)
    run_dir = Path(config.run_dir)
    with at_the_start(run_dir):
        check_continues(run_dir, config)
        if is_finished(run_dir, config.trainer.max_steps):
            if is_first_process():
                check_renamed(config, run_dir)
            say_finished(run_dir)
            return 0
        config, notes = as_started(run_dir, config)
        for note in notes:
            say(f"note: {note}")
    lock = RunLock(run_dir)
    try:
        if run_dir.exists() and is_first_process():
            with at_the_start(run_dir):
                lock.acquire()
            if is_finished(run_dir, config.trainer.max_steps):  # by the process that held the lock
                say_finished(run_dir)
                return 0
        last_step = newest_whole(run_dir / "checkpoints")
        if last_step < config.trainer.max_steps:
            train(config, run_dir, last_step, lock=lock)
            # Trainer, module and callbacks hold each other: only this frees weights, moments and
            # average, before the export loads the model anew.
            gc.collect()
        elif is_first_process():
            check_renamed(config, run_dir)
        if is_first_process():
            write_config(run_dir, config)  # of a run that ends sooner than it was to
            newest = checkpoint_steps(run_dir / "checkpoints")[config.trainer.max_steps]
            say(f"exporting to {run_dir / 'export'} and checking it against diffusers")
            try:
                export(newest, run_dir / "export", weights="ema" if config.ema.enabled else "raw")
                say(f"done: {run_dir / 'export'}")
            except NotExportable as error:
                say(f"done, without an export: {error}")
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise RunFailed(
            f"{error.filename or run_dir}: {error.strerror}. What was saved is kept; make room or "
            "restore the rights, and the same command continues"
        ) from error
    finally:
        lock.release()
    return 0


@contextlib.contextmanager
def at_the_start(run_dir: Path) -> Iterator[None]:
    """Turns a run directory that can't be written to into UserError: nothing is lost yet."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*FORBIDDEN, errno.ENOTDIR):
            raise
        raise UserError(
            f"run_dir={run_dir} can't be used ({error.filename or run_dir}: {error.strerror}); get "
            "the right to write there, or choose another run_dir"
        ) from error


def say_finished(run_dir: Path) -> None:
    """Says that there is nothing left to do."""
    say(f"{run_dir} is finished: {steps_done(run_dir)} steps, exported to {run_dir / 'export'}")


def train(
    config: TrainConfig,
    run_dir: Path,
    resume_step: int,
    watchers: Sequence[Callback] = (),
    lock: RunLock | None = None,
) -> None:
    """Trains from the checkpoint of `resume_step` (0: from config.checkpoint) to max_steps.

    `watchers` are called after the run's own callbacks, such as a benchmark's clock. `lock` is
    taken, if it is not held yet, when the input has proved right and the run is about to write.
    """
    device = training_device()
    check_count(config, device)
    take_device(device)
    config = settled(config, run_dir, device, lambda text: say(f"note: {text}"))
    config = sized(config, run_dir, lambda text: say(f"note: {text}"))
    check_device(config, device)
    environment = cluster_environment(config)
    set_tf32(config.trainer.tf32 is True)
    model = starting_model(config)
    if reason := model.process.not_exported():
        say(f"note: {reason}; sample the checkpoints of {run_dir} with allow_unsound=true")
    check_side(model, "data.resolution", config.data.resolution)
    dropout_levels(model.unet, config.dropout, config.data.resolution // model.factor)
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
    images = CaptionedImages(
        config.data, config.seed, config.batch_size, decoder=begun_decoder(run_dir)
    )
    images.require_index(num_started(config))
    identity: dict[str, Any] = {}
    if is_first_process():
        images.prepare_data()
        images.setup("fit")
        identity = checked_identity(
            config, run_dir, model, images, lambda text: say(f"note: {text}")
        )
        check_sizes(model, images, config.loss.pool_factors)
        for line in images.summary():
            say(line)
    previews = bool(config.preview.every_steps and config.preview.prompts)
    if previews and model.tokenizer is None:
        model.encode_prompts(config.preview.prompts)  # refuses what it does not know
    note = ready_encoders(model, images.encodings(), previews)
    if note:
        say(f"note: {note}")
    with at_the_start(run_dir):
        loggers = start_records(config, run_dir, resume_step, images, identity, lock, device.type)
        if is_first_process():
            keep_base(model, config)
    hold_encoders(model, config)
    say(batches_note(config))
    if note := warmup_note(config.optimizer, config.trainer.max_steps):
        say(f"note: {note}")
    stop, callbacks = build_callbacks(config, run_dir, resume_step)
    trainer = build_trainer(config, run_dir, loggers, [*callbacks, *watchers], environment)
    if resume_step:
        say(f"resuming {run_dir} at step {resume_step}")
    checkpoint = checkpoint_steps(run_dir / "checkpoints").get(resume_step)
    stop.listen(trainer)
    try:
        with lost_process(trainer):
            trainer.fit(FineTuner(model, config), datamodule=images, ckpt_path=checkpoint)
    finally:
        stop.restore_handlers()
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                finish(logger)
    # The other processes have ended well: whoever started them would take another status for a
    # failure, and end this one while it still finishes its records.
    if stop.stopped_step is not None and is_first_process():
        saved = f"saved in {run_dir / 'checkpoints'}" if stop.stopped_step else "nothing to save"
        raise Resumable(
            f"stopped at step {stop.stopped_step} of {config.trainer.max_steps}, {saved}; the same "
            "command continues"
        )


def start_records(
    config: TrainConfig,
    run_dir: Path,
    resume_step: int,
    images: CaptionedImages,
    identity: Mapping[str, Any],
    lock: RunLock | None,
    device: str,
) -> list[Logger]:
    """Writes what a run directory holds before the first step, and returns the run's loggers."""
    if not is_first_process():
        return [CsvMetrics(run_dir / "metrics.csv", resume_step)]
    if lock is not None:
        lock.acquire()
    remove_torn(run_dir / "checkpoints")
    if note := keep_earlier_export(run_dir):
        say(f"note: {note}")
    write_identity(run_dir, **identity)
    write_records(run_dir, config, resume_step, device)
    rows = list(bucket_rows(images.readers()))
    if rows:
        write_buckets(run_dir / "buckets.csv", rows)
    sent = sent_rows(run_dir, resume_step)
    loggers: list[Logger] = [CsvMetrics(run_dir / "metrics.csv", resume_step)]
    if config.wandb.enabled:
        # Before the other: a row that is in metrics.csv has reached wandb.
        loggers.insert(0, wandb_logger(config, run_dir, sent))
    return loggers


def batches_note(config: TrainConfig) -> str:
    """Says how many images a step takes, and who takes them; the learning rate is never scaled."""
    batch = describe_batch(config)
    return (
        f"global batch: {batch['images_per_step']} images a step = {batch['num_processes']} "
        f"processes x {batch['images_per_process']} images x {batch['accumulate_grad_batches']} "
        f"accumulated; learning rate {config.optimizer.learning_rate:g}"
    )


@rank_zero_only
def say(text: str) -> None:
    """Tells the user where the run stands, on stderr."""
    print(text, file=sys.stderr, flush=True)
