"""Ranges of log SNR, by which training and validation losses are told apart.

The last timestep is a range of its own: at zero terminal SNR the fine-tune is won or lost there.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from blackpoint.sampling.schedule import NoiseSchedule

LOG_SNR_EDGES = (6, 4, 2, 0, -2, -4, -6)  # natural logarithm; falls as t rises


def snr_bins(schedule: NoiseSchedule) -> dict[str, tuple[int, int]]:
    """Returns name -> [low, high) of timesteps, low noise first; empty ranges are left out.

    `terminal` is t = T - 1 alone, whatever its SNR.
    """
    last = schedule.num_steps - 1
    bins = {}
    low = 0
    upper = "inf"
    for edge in LOG_SNR_EDGES:
        high = min(int((schedule.log_snr >= edge).sum()), last)
        if high > low:
            bins[f"log_snr_{edge}_{upper}"] = (low, high)
        low, upper = max(low, high), str(edge)
    if last > low:
        bins[f"log_snr_-inf_{upper}"] = (low, last)
    bins["terminal"] = (last, last + 1)
    return bins


def totals_by_bin(
    schedule: NoiseSchedule, t: Int[Tensor, " n"], losses: Float[Tensor, " n"]
) -> Float[Tensor, "2 bins"]:
    """Returns each range's sum of losses and number of samples, float64 on the CPU."""
    starts = torch.tensor([low for low, _ in snr_bins(schedule).values()])
    which = torch.searchsorted(starts, t.cpu(), right=True) - 1
    values = losses.detach().cpu().double()
    totals = torch.zeros(2, len(starts), dtype=torch.float64)
    return totals.index_add_(1, which, torch.stack([values, torch.ones_like(values)]))
