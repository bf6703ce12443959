"""One run, from its config to an exported pipeline; started again, it goes on where it stopped."""

import contextlib
import errno
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger

from blackpoint.data.files.errors import (
    FORBIDDEN,
    NOT_WRITABLE,
    NotExportable,
    Resumable,
    RunFailed,
    UserError,
)
from blackpoint.data.files.memory import give_back_memory
from blackpoint.data.module import CaptionedImages
from blackpoint.data.summary import bucket_rows, write_buckets
from blackpoint.sampling.choices import Weights
from blackpoint.sampling.export.export import export
from blackpoint.sampling.model import DiffusionModel
from blackpoint.train.callbacks.checkpoints import (
    checkpoint_steps,
    latest_valid_checkpoint,
    remove_old,
    remove_partial_files,
)
from blackpoint.train.callbacks.exports import (
    export_step,
    remove_partial_exports,
    write_adapters,
)
from blackpoint.train.callbacks.interruption import StopOnSignal, lost_process
from blackpoint.train.callbacks.metrics import CsvMetrics
from blackpoint.train.callbacks.trainer import build_callbacks, build_trainer
from blackpoint.train.cluster.cluster import (
    as_launched,
    cluster_environment,
    end_with_first_process,
    num_started,
)
from blackpoint.train.cluster.device import prepare_device
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.config.learning_rate import (
    settled_rate,
    warmup_note,
    with_learning_rate,
)
from blackpoint.train.config.lora_config import has_files
from blackpoint.train.lora import check_base
from blackpoint.train.module import FineTuner
from blackpoint.train.records.continuing import as_started, check_continues
from blackpoint.train.records.first_process import is_first_process, note, say
from blackpoint.train.records.run_directory import (
    RunRecord,
    describe_batch,
    write_config,
    write_identity,
    write_records,
)
from blackpoint.train.records.run_identity import check_renamed, checked_identity, unet_digest_in
from blackpoint.train.records.run_lock import RunLock
from blackpoint.train.records.sizes import sized, with_max_steps
from blackpoint.train.records.tracking import finish, send_artifacts, sent_rows, wandb_logger
from blackpoint.train.start import (
    check_sizes,
    hold_encoders,
    keep_base,
    load_encoders,
    programs_note,
    starting_model,
)


def fit(config: TrainConfig) -> int:
    """Trains, resumes or finishes the run in config.run_dir; returns the exit status 0.

    Raises UserError for wrong input, before anything is written; RunFailed where the loss is not
    finite or the disk takes no more; Resumable where a signal stopped the run after saving it.
    """
    end_with_first_process()
    config = with_learning_rate(as_launched(config))
    run_dir = Path(config.run_dir)
    with at_the_start(run_dir):
        config = with_max_steps(config, run_dir, num_started(config))
        max_steps = config.trainer.max_steps
        record = check_continues(run_dir, config)
        if record.is_finished(max_steps):
            if is_first_process():
                check_renamed(record, config)
            return say_finished(record)
        config, notes = as_started(record, config)
        for text in notes:
            note(text)
    lock = RunLock(run_dir)
    try:
        if run_dir.exists() and is_first_process():
            with at_the_start(run_dir):
                lock.acquire()
                remove_partial_exports(run_dir)
                remove_partial_files(run_dir / "checkpoints")
            record = RunRecord.read(run_dir)
            if record.is_finished(max_steps):  # by the process that held the lock
                return say_finished(record)
        last_step = latest_valid_checkpoint(run_dir / "checkpoints")
        if last_step < max_steps:
            train(config, run_dir, last_step, lock=lock)
            # Trainer, module and callbacks hold each other: only this frees weights, moments and
            # average, before the export loads the model anew.
            give_back_memory()
        elif is_first_process():  # of a run that ends sooner than it was to, or was killed here
            remove_old(run_dir / "checkpoints", last_step, config.trainer.keep_checkpoints)
            check_renamed(record, config)
            write_config(record, config)
        if is_first_process():
            export_run(config, run_dir)
            send_artifacts(config, run_dir)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise RunFailed(
            f"{error.filename or run_dir}: {error.strerror}; the last checkpoint is kept; make "
            "room or restore the rights, and the same command continues"
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


def say_finished(record: RunRecord) -> int:
    """Says that there is nothing left to do; returns the exit status 0."""
    folder = record.run_dir
    say(f"{folder} is finished: {record.steps_done} steps, exported to {folder / 'export'}")
    return 0


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
    record = RunRecord.read(run_dir)
    config, device = prepare_device(with_learning_rate(config), record)
    config = sized(config, record)
    environment = cluster_environment(config)
    model = starting_model(config, device)
    images = CaptionedImages(config.data, config.seed, config.batch_size, decoder=record.decoder)
    images.require_index(num_started(config))
    checkpoint = checkpoint_steps(run_dir / "checkpoints").get(resume_step)
    identity = {}
    if is_first_process():
        identity = check_input(config, record, model, images, checkpoint)
    encodes = load_encoders(model, images, config.preview)
    with at_the_start(run_dir):
        if is_first_process():
            open_records(config, record, resume_step, images, identity, lock, device)
            keep_base(model, config)
        loggers = open_loggers(config, run_dir, resume_step)
    hold_encoders(model, config)
    say(batches_note(config))
    note(warmup_note(config.optimizer, config.trainer.max_steps))
    stop, callbacks = build_callbacks(config, run_dir, resume_step)
    trainer = build_trainer(config, run_dir, loggers, [*callbacks, *watchers], environment)
    if resume_step:
        say(f"resuming {run_dir} at step {resume_step}")
    module = FineTuner(model, config)
    module.base_digest, module.encodes = unet_digest_in(identity), encodes
    images.draw = module.draw
    run_trainer(trainer, stop, module, images, checkpoint)


def check_input(
    config: TrainConfig,
    record: RunRecord,
    model: DiffusionModel,
    images: CaptionedImages,
    checkpoint: Path | None,
) -> dict[str, Any]:
    """Opens the data; returns the sections of identity.json, or raises UserError.

    `checkpoint` is the one that the run goes on from.
    """
    images.prepare_data()
    images.setup("fit")
    identity = checked_identity(record, config, model, images)
    if checkpoint is not None:
        check_base(checkpoint, model.source, unet_digest_in(identity))
    check_sizes(model, images, config.loss.pool_factors)
    note(programs_note(images) if config.trainer.compile else None)
    for line in images.summary():
        say(line)
    return identity


def open_records(
    config: TrainConfig,
    record: RunRecord,
    resume_step: int,
    images: CaptionedImages,
    identity: Mapping[str, Any],
    lock: RunLock | None,
    device: torch.device,
) -> None:
    """Writes the files of a run directory before the first step."""
    if lock is not None:
        lock.acquire()
    run_dir = record.run_dir
    keep_earlier_export(record)
    write_identity(run_dir, **identity)
    write_records(record, config, resume_step, device.type)
    if rows := list(bucket_rows(images.readers())):
        write_buckets(run_dir / "buckets.csv", rows)


def open_loggers(config: TrainConfig, run_dir: Path, resume_step: int) -> list[Logger]:
    """Returns the run's loggers; metrics.csv is cut back to `resume_step`."""
    is_first = is_first_process()
    sent = sent_rows(run_dir, resume_step) if is_first else set()  # before it is cut back
    loggers: list[Logger] = [CsvMetrics(run_dir / "metrics.csv", resume_step)]
    if is_first and config.wandb.enabled:
        # Before the other: a row that is in metrics.csv has reached wandb.
        loggers.insert(0, wandb_logger(config, run_dir, sent))
    return loggers


def run_trainer(
    trainer: Trainer,
    stop: StopOnSignal,
    module: FineTuner,
    images: CaptionedImages,
    checkpoint: Path | None,
) -> None:
    """Trains to the end; raises Resumable, in the first process, where a signal stopped it."""
    loggers = list(trainer.loggers)  # one that fails is taken out on the way
    stop.listen(trainer)
    try:
        with lost_process(trainer):
            trainer.fit(module, datamodule=images, ckpt_path=checkpoint)
    finally:
        stop.restore_handlers()
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                finish(logger)
    # The other processes have ended well: whoever started them would take another status for a
    # failure, and end this one while it still finishes its records.
    if stop.stopped_step is not None and is_first_process():
        folder = Path(module.config.run_dir) / "checkpoints"
        saved = f"saved in {folder}" if stop.stopped_step else "nothing to save"
        raise Resumable(
            f"stopped at step {stop.stopped_step} of {trainer.max_steps}, {saved}; the same "
            "command continues"
        )


def batches_note(config: TrainConfig) -> str:
    """Says how a step's images are shared among processes; the learning rate is never scaled."""
    batch = describe_batch(config)
    return (
        f"global batch: {batch['images_per_step']} images per step = {batch['num_processes']} "
        f"processes x {batch['images_per_process']} images x {batch['accumulate_grad_batches']} "
        f"accumulated; learning rate {settled_rate(config.optimizer):g}"
    )


def keep_earlier_export(record: RunRecord) -> None:
    """Puts the exports of a run that goes on aside, for others follow."""
    steps = record.steps_done
    for export_dir in (record.run_dir / name for name in ("export", "export_lora")):
        if not export_dir.exists():
            continue
        name = f"{export_dir.name}_step_{steps:08d}"
        names = (name if number == 1 else f"{name}_{number}" for number in count(1))
        earlier = next(p for name in names if not (p := record.run_dir / name).exists())
        export_dir.rename(earlier)
        note(
            f"{record.run_dir} was finished and goes on; its export of step {steps} is kept in "
            f"{earlier}"
        )


def export_run(config: TrainConfig, run_dir: Path) -> None:
    """Writes the run's last checkpoint to run_dir/export, where an export can hold it.

    First that of its step, and the files of adapters, to run_dir/export_lora: what makes a run
    finished is run_dir/export.
    """
    last = checkpoint_steps(run_dir / "checkpoints")[config.trainer.max_steps]
    weights: Weights = "ema" if config.ema.enabled else "raw"
    say(f"exporting to {run_dir / 'export'} and checking it against diffusers")
    try:
        export_step(config, run_dir, config.trainer.max_steps)
        if has_files(config.lora):
            write_adapters(last, run_dir / "export_lora", weights)
        export(last, run_dir / "export", weights=weights)
        say(f"done: {run_dir / 'export'}")
    except NotExportable as error:
        say(f"done, without an export: {error}")
