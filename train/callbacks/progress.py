"""The progress bar of a run; on a terminal a bar, in a log file a line now and then."""

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from blackpoint.train.callbacks.watch import Watch

LINE_EVERY_S = 30.0
SLOW_DATA = 0.1  # a share of waiting worth a word: more data.num_workers would help


class Progress(Callback):
    """Shows optimizer steps done, the latest loss and images/s; on the first process only."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._bar: tqdm | None = None
        self._line_s = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._bar = tqdm(
                initial=trainer.global_step,
                total=trainer.max_steps,
                desc="fine-tuning",
                unit="step",
                dynamic_ncols=True,
                disable=not sys.stderr.isatty(),
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is None or not self.watch.at_step_end:
            return
        numbers = self._numbers()
        self._bar.set_postfix_str(numbers, refresh=False)
        self._bar.update()
        step, last = trainer.global_step, trainer.global_step == trainer.max_steps
        now_s = time.monotonic()
        if self._bar.disable and (last or now_s - self._line_s > LINE_EVERY_S):
            print(
                f"step {step}/{trainer.max_steps} {numbers}".rstrip(), file=sys.stderr, flush=True
            )
            self._line_s = now_s

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()

    def _numbers(self) -> str:
        metrics = self.watch.metrics
        if not metrics:
            return ""
        waiting = metrics["train/data_wait_share"]
        numbers = f"loss {metrics['train/loss']:.4f}, {metrics['train/images_per_s']:.1f} images/s"
        return numbers + (f", {waiting:.0%} waiting for data" if waiting >= SLOW_DATA else "")
