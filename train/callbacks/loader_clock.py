"""How long training waits for its batches: the time inside the loader's next().

Lightning brackets exactly that call for its profiler, so a profiler is where it is measured. It is
the waiting of the host: on a GPU that still has work queued, less of it is lost.
"""

import time

from lightning.pytorch.profilers import Profiler

FETCH = ".train_dataloader_next"


class LoaderClock(Profiler):
    """Adds up the seconds that the training loop spends waiting for the next batch."""

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
