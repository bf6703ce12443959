"""The batch size that is found: the smallest that is about as fast as any that fits.

One step and a decode are timed at 1, 2, 4, ... until memory ends or a doubling gains nothing. It
moves what a search chooses only among near-ties (docs/search.md).
"""

import time

import torch

from blackpoint.sampling.search.runner import TrialRunner
from blackpoint.sampling.search.trial import Seeded, Trial

LARGEST, LEAST_GAIN = 128, 1.05


def find_batch_size(runner: TrialRunner, prompt_index: int) -> int:
    """Returns how many candidates to run at once; leaves the runner's ledger as it was."""
    best, best_rate, size = 1, 0.0, 1
    while size <= LARGEST:
        try:
            seconds = min(_seconds(runner, prompt_index, size) for _ in range(2))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return max(1, size // 4)  # half of what fitted: verifiers need room, too
        rate = size / seconds
        if rate < LEAST_GAIN * best_rate:
            return best
        best, best_rate, size = size, rate, 2 * size
    return best


def _seconds(runner: TrialRunner, prompt_index: int, size: int) -> float:
    trials = [Trial(0, number, Seeded(number), 1, "preview", number) for number in range(size)]
    started_s = time.perf_counter()
    runner.rehearse([(prompt_index, trial) for trial in trials])
    if runner.model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started_s
