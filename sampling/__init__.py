"""The library in two names: `from blackpoint.sampling import DiffusionModel, NoiseSchedule`."""

import importlib
from typing import Any

EXPORTS = {"DiffusionModel": "model", "NoiseSchedule": "schedule", "Conditioning": "model"}
"""Name and its module, imported when the name is asked for: help must not wait for torch."""


def __getattr__(name: str) -> Any:
    if name in EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
