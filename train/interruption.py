"""Ctrl-C and SIGTERM: the step under way is finished and saved, and the run can be continued.

With several processes a signal may reach one of them, or all at different steps: after each step
they agree, on the CPU, so that a GPU is not made to wait.
"""

import signal
import sys
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from train.watch import Watch

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(Callback):
    """Stops the trainer at the end of the optimizer step in which a signal came.

    Must come before the callback that saves checkpoints, which saves when the trainer stops.
    `stopped_step` tells where, or is None. A second Ctrl-C stops at once, unsaved.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.stopped_step: int | None = None
        self._received = False
        self._group: Any = None  # of all processes, over the CPU
        self._previous = {number: signal.getsignal(number) for number in SIGNALS}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")
        # Here and not earlier: Lightning has installed its own by now, and these replace them.
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.watch.at_step_end or trainer.global_step == trainer.max_steps:
            return
        if self._asked_to_stop():
            self.stopped_step = trainer.global_step
            trainer.should_stop = True

    def _asked_to_stop(self) -> bool:
        """Says whether a signal has reached any of the processes."""
        if self._group is None:
            return self._received
        received = torch.tensor(int(self._received))
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, self._group)
        return bool(received)

    def restore_handlers(self) -> None:
        """Puts back what was installed before the trainer was built."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        name = signal.Signals(number).name
        print(f"\n{name}: finishing this step, then saving", file=sys.stderr, flush=True)
