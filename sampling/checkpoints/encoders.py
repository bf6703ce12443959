"""The autoencoder and the text encoder of a model: read on first use, in a format of their own.

They run in the format of their own weights, also under the autocast of a run in mixed precision:
its previews come here as its training does, and in fp16 autocast would overflow unseen.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from blackpoint.sampling.checkpoints.loading import Part

log = logging.getLogger(__name__)

VAE_SLICE_IMAGES = 8


class Encoders:
    """Encoders and decoder beside the UNet, by name: `vae`, `text_encoder`; frozen."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self._parts = {name: part for name, part in parts.items() if part is not None}
        self._files = {name: p for name, p in self._parts.items() if isinstance(p, Part)}
        for part in self.loaded():
            part.requires_grad_(False).eval()

    def get(self, name: str, device: torch.device) -> Any:
        """Returns a part, which is read where it is not in memory yet."""
        part = self._parts[name]
        if isinstance(part, Part):
            part = part.load().requires_grad_(False).eval().to(device)
            self._parts[name] = part
        return part

    def load(self, device: torch.device) -> None:
        """Reads lazy parts now, so that their faults show now."""
        for name in self._parts:
            self.get(name, device)

    def loaded(self) -> list[Any]:
        """Returns the parts that are in memory."""
        return [part for part in self._parts.values() if not isinstance(part, Part)]

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Holds all parts in `dtype` from here on, those not yet read when they are."""
        for name, part in self._parts.items():
            if isinstance(part, Part):
                self._parts[name] = replace(part, dtype=dtype)
            elif dtype_of(part) != dtype:
                part.to(dtype)

    def run_vae(
        self, function: Callable[[Any, Tensor], Tensor], batch: Tensor, device: torch.device
    ) -> Tensor:
        """Returns function(vae, rows) of a few images at a time, float32.

        In fp16, what overflows is computed again in float32; bfloat16 has the range of float32.
        """
        results = []
        vae = self.get("vae", device)
        dtype = dtype_of(vae)
        with torch.autocast(device.type, enabled=False):
            for rows in batch.split(VAE_SLICE_IMAGES):
                result = function(vae, rows.to(device, dtype)).float()
                if dtype == torch.float16 and _overflowed(rows, result):
                    log.warning(
                        "note: the autoencoder overflows in float16; from here on it runs in "
                        "float32"
                    )
                    del vae
                    vae, dtype = self._vae_in_float32(device), torch.float32
                    result = function(vae, rows.to(device, dtype))
                results.append(result)
        return torch.cat(results)

    def _vae_in_float32(self, device: torch.device) -> Any:
        """Returns it for good, since what overflowed once will again.

        It is read again: its weights in fp16 are rounded, and large ones infinite.
        """
        if "vae" not in self._files:
            return self.get("vae", device).float()
        self._parts["vae"] = replace(self._files["vae"], dtype=torch.float32)
        return self.get("vae", device)


def dtype_of(part: nn.Module) -> torch.dtype:
    """Returns the format of a part's weights.

    Part.dtype and part.device of diffusers look for hooks in all modules: milliseconds per call.
    """
    return next(part.parameters()).dtype


def _overflowed(given: Tensor, result: Tensor) -> bool:
    """Whether the result is not finite although its input is."""
    return not torch.isfinite(result).all() and bool(torch.isfinite(given).all())
