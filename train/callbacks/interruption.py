"""SIGUSR1, SIGTERM and Ctrl-C: the step under way is finished and saved, and the run can continue.

With several processes a signal may reach one of them, or all at different steps: after each step
they agree, on the CPU, so that a GPU is not made to wait. Nothing is saved or sent to another
process inside a handler: a process that waits for this one would wait for ever.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from blackpoint.data.files import signals
from blackpoint.data.files.errors import Resumable, RunFailed, Unreachable
from blackpoint.train.callbacks.watch import Watch

# What gloo, of whatever its wire says, and NCCL say of a process that is gone.
LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe|ncclRemoteError|gloo/transport")


class StopOnSignal(Callback):
    """Stops the trainer at the end of the optimizer step in which a signal came.

    Must come before the callback that saves checkpoints, which saves when the trainer stops.
    `stopped_step` tells where, or is None. A second Ctrl-C stops at once, unsaved.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.stopped_step: int | None = None
        self._group: Any = None  # of all processes, over the CPU
        self._signals = contextlib.ExitStack()

    def listen(self, trainer: Trainer) -> None:
        """Takes the signals over, before `trainer` starts: from then on they only set a flag."""
        # Lightning's handler for SIGTERM broadcasts to the other processes inside the handler.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        # It would also ask for that signal before each batch, with an answer that a GPU waits for.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self._signals.enter_context(signals.deferred("this step, then saving"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")
            self._check_same_step(trainer)
        if self._asked_to_stop():
            self._stop(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.watch.at_step_end or trainer.global_step == trainer.max_steps:
            return
        if self._asked_to_stop():
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        self.stopped_step = trainer.global_step
        trainer.should_stop = True

    def _asked_to_stop(self) -> bool:
        """Says whether a signal has reached any of the processes."""
        if self._group is None:
            return bool(signals.received())
        received = torch.tensor(int(bool(signals.received())))
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, self._group)
        return bool(received)

    def _check_same_step(self, trainer: Trainer) -> None:
        """Raises RunFailed where the processes found different checkpoints, as on a slow disk."""
        steps = [torch.tensor(0) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(steps, torch.tensor(trainer.global_step), self._group)
        newest = sorted({int(step) for step in steps})
        if len(newest) > 1:
            raise RunFailed(
                f"the processes found different newest checkpoints, of steps {newest}: does every "
                "machine see the same run_dir? Put it on a shared file system and start again"
            )

    def restore_handlers(self) -> None:
        """Puts back the handlers from before `listen`."""
        self._signals.close()


@contextlib.contextmanager
def lost_process(trainer: Trainer) -> Iterator[None]:
    """Turns the error that the end of another process causes here into Resumable."""
    try:
        yield
    except Unreachable:  # whose reason may read like one of LOST
        raise
    except RuntimeError as error:
        if trainer.world_size == 1 or not LOST.search(str(error)):
            raise
        raise Resumable(
            f"another process of this run ended (this is process {trainer.global_rank} of "
            f"{trainer.world_size}); the same command continues from the last checkpoint"
        ) from error
