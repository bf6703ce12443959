"""GPUs that are not there, and devices on which `auto` takes what a GPU would."""

import contextlib
from typing import Any

import pytest
import torch

from blackpoint.sampling.runtime import precision

OLD, NEW = (6, 1), (8, 0)


def fake_gpus(
    patch: pytest.MonkeyPatch, capability: tuple[int, int] = NEW, count: int = 1
) -> list[torch.device]:
    """Makes torch tell of GPUs; returns the list of those that were made current."""
    current: list[torch.device] = []

    def make_current(device: Any) -> contextlib.AbstractContextManager[None]:
        current.append(torch.device(device))
        return contextlib.nullcontext()

    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: count)
    patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    patch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce GTX 1080")
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= NEW)
    patch.setattr(torch.cuda, "device", make_current)
    patch.setattr(torch.cuda, "set_device", make_current)
    return current


def auto_takes_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Makes `auto` take bfloat16 on the CPU, which computes in it too."""
    patch.setattr(
        precision, "_automatic", lambda name, device: False if name == "tf32" else "bfloat16"
    )
