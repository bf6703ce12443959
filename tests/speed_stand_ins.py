"""Stand-ins for packages that need a GPU: xformers' attention, bitsandbytes' AdamW8bit."""

import importlib.machinery
import sys
import types
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention


def install(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """Puts a module called `name` (package.submodule) where the import system finds it."""
    package_name, _, child = name.partition(".")
    package = types.ModuleType(package_name)
    package.__spec__ = importlib.machinery.ModuleSpec(package_name, None)
    submodule = types.ModuleType(name)
    for key, value in attributes.items():
        setattr(submodule, key, value)
    setattr(package, child, submodule)
    monkeypatch.setitem(sys.modules, package_name, package)
    monkeypatch.setitem(sys.modules, name, submodule)
    if package_name == "xformers":  # diffusers imports it only where it is installed
        processors = "diffusers.models.attention_processor.xformers"
        monkeypatch.setattr(processors, package, raising=False)


def attention_stand_in(query: Any, key: Any, value: Any, attn_bias: Any = None, **_: Any) -> Any:
    calls.append(query.shape)
    return scaled_dot_product_attention(query, key, value, attn_bias)


calls: list[torch.Size] = []


class EightBitStandIn(torch.optim.AdamW):
    """Takes what AdamW8bit takes and, like it, is not fused."""
