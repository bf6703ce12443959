"""Watches every step: the loss (which must stay finite), its gradient, and the time.

Numbers stay on the device until a row is due or weights are saved, so that neither the host nor a
GPU waits for the other; the names of the samples stay on the host meanwhile. A step that is not
finite changes no weight (train/module.py), so all later ones are still those of good weights.
METRICS lists the numbers of a row.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from torch import Tensor
from torch.optim import Optimizer

from blackpoint.data.files.errors import RunFailed
from blackpoint.train.callbacks.metrics import log_metrics
from blackpoint.train.callbacks.step_metrics import (
    Steps,
    gradient_and_rate,
    gradient_norm,
    losses,
    losses_by_snr,
    memory,
    speed,
)
from blackpoint.train.module import FineTuner

REMEDY = (
    "no checkpoint was written after it, so the last one is good; remedies: look at these samples, "
    "lower optimizer.learning_rate, or use trainer.precision=bf16-mixed or 32-true"
)
FETCH = ".train_dataloader_next"
METRICS = (losses, gradient_and_rate, speed, losses_by_snr, memory)
"""Metrics of a row, in this order: functions of the steps since the row before."""


class Watch(Callback):
    """Logs a row of metrics every so many steps; stops on a loss that is not finite.

    Must come after the callback that averages the weights and before all others, which ask it
    whether an optimizer step has just ended (`at_step_end`) and let its clock rest while they work
    (`paused`).
    """

    def __init__(self, log_every_steps: int, batch_size: int) -> None:
        self.log_every_steps = log_every_steps
        self.batch_size = batch_size
        self.at_step_end = False
        self.metrics: dict[str, float] = {}
        """The latest row."""
        self._step = 0
        self._learning_rate = 0.0
        # Step, sample keys, their losses and, of the last batch of a step, its gradient's norm.
        self._pending: list[tuple[int, list[str], Tensor, Tensor | None]] = []
        self._outputs: list[dict[str, Tensor]] = []  # since the last row
        self._clock = LoaderClock()
        self._started_s = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        trainer.profiler = self._clock  # type: ignore[attr-defined]
        self._started_s = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._learning_rate = optimizer.param_groups[0]["lr"]  # the scheduler is about to move it

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self.at_step_end = step != self._step
        assert isinstance(pl_module, FineTuner)
        # A loss scaler leaves out steps whose gradient is not finite, and goes on.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        norm = gradient_norm(pl_module) if self.at_step_end and not scaled else None
        self._pending.append((self._step + 1, batch["key"], outputs["losses"], norm))
        self._outputs.append(outputs)
        self._step = step
        due = step % self.log_every_steps == 0 or step == trainer.max_steps
        if self.at_step_end and due:
            self._log(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuses to save weights after a loss that is not finite."""
        self.check_finite(trainer, pl_module)

    def check_finite(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises `RunFailed` for the first loss or gradient since the last check that is not
        finite."""
        pending, self._pending = self._pending, []
        checked = [values.sum() for _, _, values, _ in pending]
        checked += [norm for *_, norm in pending if norm is not None]
        if not checked or math.isfinite(torch.stack(checked).sum().item()):
            return
        for step, keys, values, norm in pending:
            pairs = zip(keys, values.tolist(), strict=True)
            bad = [key for key, loss in pairs if not math.isfinite(loss)]
            if bad:
                raise RunFailed(
                    f"the loss of step {step} is not finite for {len(bad)} of {len(keys)} samples "
                    f"of the batch: {', '.join(bad[:16])}; {REMEDY}"
                )
            if norm is not None and not math.isfinite(norm.item()):
                names = [key for other, keys, *_ in pending if other == step for key in keys]
                raise RunFailed(
                    f"the gradient of step {step} is not finite, though its loss is; samples of "
                    f"the batch: {', '.join(names[:16])}; {REMEDY}"
                )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps the time of a `with` block out of images/s."""
        begun_s = time.perf_counter()
        yield
        self._started_s += time.perf_counter() - begun_s

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check_finite(trainer, pl_module)  # which waits for the device: the time is true
        assert isinstance(pl_module, FineTuner)
        now_s = time.perf_counter()
        elapsed_s, self._started_s = now_s - self._started_s, now_s
        images_per_s = len(self._outputs) * self.batch_size / elapsed_s
        wait_share = min(1.0, self._clock.take() / elapsed_s)
        outputs, self._outputs = self._outputs, []
        rates = (self._learning_rate, images_per_s, wait_share)
        steps = Steps(trainer, pl_module, outputs, *rates)
        self.metrics = {k: value for metric in METRICS for k, value in metric(steps).items()}
        log_metrics(trainer, self.metrics)


class EverySteps(Callback):
    """Does `at_step` after every so many optimizer steps and after the last, in its own time."""

    def __init__(self, every_steps: int, watch: Watch) -> None:
        self.every_steps, self.watch = every_steps, watch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % self.every_steps == 0 or step == trainer.max_steps
        if due and self.watch.at_step_end:
            assert isinstance(pl_module, FineTuner)
            with self.watch.paused():
                self.at_step(trainer, pl_module, step)

    def at_step(self, trainer: Trainer, module: FineTuner, step: int) -> None:
        """Is called in every process."""
        raise NotImplementedError


class LoaderClock(Profiler):
    """Adds up the seconds that the training loop waits for the next batch.

    Lightning brackets exactly the loader's next() for its profiler, so a profiler measures it. It
    is the waiting of the host: on a GPU that still has work queued, less of it is lost.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waited_s = 0.0
        self._begun_s = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith(FETCH):
            self._begun_s = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(FETCH):
            self._waited_s += time.perf_counter() - self._begun_s

    def take(self) -> float:
        """Returns the seconds waited since the last call."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s
