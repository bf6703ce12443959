"""The most memory that this process has held so far, in GB of 10^9 bytes.

On a CPU the operating system's own figure, without the processes that decode images; on a GPU
also what PyTorch's allocator has given out and what it has taken from the device.
"""

import resource
import sys

import torch

GB = 1e9


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Returns name -> GB, without waiting for the device."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    metrics = {"memory/process_peak_gb": peak_bytes / GB}
    if device.type == "cuda":
        metrics["memory/gpu_allocated_peak_gb"] = torch.cuda.max_memory_allocated(device) / GB
        metrics["memory/gpu_reserved_peak_gb"] = torch.cuda.max_memory_reserved(device) / GB
    return metrics
