"""Options of a UNet that keep its results: attention, memory order, compilation, recomputation.

Attention is softmax(q k^T / sqrt(d)) v in every case. `sdpa` is torch's own kernel, `xformers` that
of the optional package, whose operators exist for some devices, number formats and widths only: it
is run once, on the widths of this UNet, before anything depends on it. Results agree to rounding.
"""

import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.choices import Attention, CompileMode
from blackpoint.sampling.runtime.precision import current

if TYPE_CHECKING:  # importing it takes seconds
    from diffusers import UNet2DConditionModel

PROBE_TOKENS = 16
MAX_PROGRAMS = 1024
NOT_INSTALLED = "xformers is not installed"
"""No word where auto meets it: nothing was to be chosen."""


def prepare_unet(
    unet: "UNet2DConditionModel",
    attention: Attention = "auto",
    channels_last: bool = False,
    compile: bool = False,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    training: bool = False,
    compile_mode: CompileMode = "default",
) -> str | None:
    """Sets the UNet up in place; returns the choice of `auto` and its reason, None without one.

    `device` and `dtype` are what the UNet will compute on and in (mixed precision: the lower
    format), its own if not given; `training` asks for the backward pass too. Weights, their names
    and their values stay as they are. Compilation happens at the first call of each batch shape.
    Raises UserError where xformers or the compiler is asked for and cannot run.
    """
    device = unet.device if device is None else device
    dtype = unet.dtype if dtype is None else dtype
    if compile:
        check_compiler(device)
    choice = _set_attention(unet, attention, device, dtype, training)
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    if compile:
        # One program a shape: what a shape computes must not depend on the shapes before it,
        # or a resumed run, which meets them in another order, would not repeat every bit.
        # After 8 programs torch would go on uncompiled, and buckets have more shapes than that.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, MAX_PROGRAMS)
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, MAX_PROGRAMS)
        unet.compile(dynamic=False, mode=compile_mode)
    return choice


def _set_attention(
    unet: "UNet2DConditionModel",
    attention: Attention,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
) -> str | None:
    """Sets the attention kernel; returns the choice of `auto` and its reason."""
    from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

    problem = None if attention == "sdpa" else xformers_problem(unet, device, dtype, training)
    if attention == "xformers" and problem:
        raise UserError(
            f"attention=xformers cannot run here: {problem}; use attention=sdpa or auto, or "
            "install a build for this device (pip install -e '.[xformers]')"
        )
    takes_xformers = attention != "sdpa" and problem is None
    unet.set_attn_processor(XFormersAttnProcessor() if takes_xformers else AttnProcessor2_0())
    if attention != "auto" or problem == NOT_INSTALLED:
        return None
    if takes_xformers:
        return f"attention=auto took xformers: its operators run on {device.type} in {_name(dtype)}"
    return f"attention=auto took sdpa (torch's own): {problem}"


def xformers_problem(
    unet: "UNet2DConditionModel", device: torch.device, dtype: torch.dtype, training: bool
) -> str | None:
    """Runs xformers' operator once for each head width of `unet`; returns why it fails, or None."""
    if importlib.util.find_spec("xformers") is None:
        return NOT_INSTALLED
    try:
        from xformers.ops import memory_efficient_attention
    except Exception as error:  # a build for another torch fails in its own ways
        return f"xformers cannot be imported ({_first_line(error)})"
    for width in head_widths(unet):
        shape = (2, PROBE_TOKENS, width)  # (batch * heads, tokens, width), as diffusers calls it
        query = torch.ones(shape, device=device, dtype=dtype, requires_grad=training)
        off = torch.autocast(device.type, enabled=False)
        try:
            with current(device), torch.set_grad_enabled(training), off:
                out = memory_efficient_attention(query, query, query)
                if training:
                    out.sum().backward()
        except Exception as error:  # NotImplementedError, or whatever its kernel throws
            return (
                f"xformers has no operator that runs on {device.type} in {_name(dtype)} with heads "
                f"of width {width}{' and a backward pass' if training else ''} "
                f"({_first_line(error)})"
            )
    return None


def head_widths(unet: "UNet2DConditionModel") -> list[int]:
    """Returns the distinct widths of the UNet's attention heads, ascending."""
    from diffusers.models.attention_processor import Attention as AttentionLayer

    layers = [module for module in unet.modules() if isinstance(module, AttentionLayer)]
    return sorted({layer.to_q.out_features // layer.heads for layer in layers})


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile lacks the compiler for `device`."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"compile=true needs a C++ compiler, and there is no {compiler} here; install g++, "
            "name another in the environment variable CXX, or set compile=false"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError(
            "compile=true needs triton on a GPU, and it is not installed; pip install triton, or "
            "set compile=false"
        )


def blocks_by_level(unet: "UNet2DConditionModel") -> Iterator[tuple[int, Any]]:
    """Yields every block with its level, 0 the one of the highest resolution."""
    last = len(unet.down_blocks) - 1
    yield from enumerate(unet.down_blocks)
    yield last, unet.mid_block
    for step, block in enumerate(unet.up_blocks):
        yield last - step, block


def check_levels(unet: "UNet2DConditionModel", levels: Sequence[int]) -> None:
    """Raises UserError for a level that the UNet lacks."""
    last = len(unet.down_blocks) - 1
    if any(not 0 <= level <= last for level in levels):
        raise UserError(
            f"trainer.gradient_checkpointing_levels={list(levels)}: this UNet has the levels 0 to "
            f"{last}; name some of those, or leave it out for all"
        )


def checkpoint_gradients(unet: "UNet2DConditionModel", levels: Sequence[int] = ()) -> None:
    """Recomputes activations in the backward pass, of all levels or of those given."""
    unet.enable_gradient_checkpointing()
    for level, block in blocks_by_level(unet) if levels else ():
        for module in block.modules() if block is not None and level not in levels else ():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip(':')}" if lines else type(error).__name__
