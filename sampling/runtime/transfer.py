"""Copies from the host to a device that let the host go on."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns `tensor` on `device`; where it is there already, itself.

    A GPU copies it when it comes to it. From pinned memory it does so by itself; from any other the
    host would have to wait, so what is not pinned yet (a loader pins its batches) is copied there.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available():
        tensor = tensor.pin_memory()  # itself, if it is pinned
    return tensor.to(device, non_blocking=True)
