"""The most memory that this process, or the GPU that it computes on, has held so far.

On a CPU the operating system's figure, without the processes that decode images; on a GPU what
PyTorch's allocator has given out and, beside it, what it has taken from the device.
"""

import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

GB = 1e9


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Returns name -> GB of 10^9 bytes, without waiting for the device."""
    metrics = {"memory/process_peak_gb": process_peak_bytes() / GB}
    if device.type == "cuda":
        metrics["memory/gpu_allocated_peak_gb"] = peak_bytes(device) / GB
        metrics["memory/gpu_reserved_peak_gb"] = torch.cuda.max_memory_reserved(device) / GB
    return metrics


def peak_bytes(device: torch.device) -> int:
    """Returns the peak of memory: allocated on a GPU, or this process's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return process_peak_bytes()


def process_peak_bytes() -> int:
    """Returns the largest resident set of this process so far.

    On Linux ru_maxrss starts at the peak of the process that started this one; VmHWM does not.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def memory_line(parts: Iterable[Any], device: torch.device, batch_size: int) -> str:
    """Estimates the memory of a batch: weights, and on a GPU what one image took so far."""
    tensors = [t for part in parts for t in (*part.parameters(), *part.buffers())]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    text = f"{weights / GB:.3g} GB of weights"
    if device.type != "cuda" or batch_size == 0:
        return text
    held = torch.cuda.memory_allocated(device)
    image = torch.cuda.max_memory_allocated(device) - held
    total = (held + batch_size * image) / GB
    return f"{text}; about {total:.3g} GB with batch_size={batch_size}, {image / GB:.2g} per image"
