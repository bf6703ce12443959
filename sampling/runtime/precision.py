"""Number formats: the choice of `auto` on a device, and whether a result may go on in it.

On a GPU that computes in bfloat16 a dtype of `auto` is bfloat16, and on one of compute capability
8.0 or newer tf32=auto is true; everywhere else they are float32 and false. What is computed differs
by rounding between formats, so the formats taken are recorded with what is computed, and what was
begun in one is not continued in another.
"""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.plain import json_object
from blackpoint.sampling.choices import PLAIN_FORMATS, recorded_formats

TF32_CAPABILITY = (8, 0)
Formats = dict[str, Any]
"""Field (dtype, encoder_dtype, tf32) -> its value."""
FORMATS = ("dtype", "tf32")
"""Keys whose `auto` is settled on the device."""


def settle(
    where: str,
    asked: Mapping[str, Any],
    device: torch.device,
    say: Callable[[str], None],
    kept: Mapping[str, Any] | None = None,
    is_recorded: bool = True,
    prefix: str = "",
) -> Formats:
    """Returns the requested formats, `auto` replaced by its choice on `device`.

    `kept` are the formats of what is continued, named `where` in messages; where it holds no record
    of them (`is_recorded`), `auto` takes those. `say` is told what `auto` took, if that is not
    float32. `prefix` stands before the fields in the config. Raises UserError for what the device
    lacks, and for formats other than the kept ones.
    """
    adopts = kept is not None and not is_recorded
    chosen = [name for name, value in asked.items() if value == "auto"]
    _check({name: value for name, value in asked.items() if value != "auto"}, device, prefix)
    formats = dict(asked)
    for name in chosen:
        formats[name] = kept[name] if kept and adopts else _automatic(name, device)
    if kept is not None:
        _check_same(where, asked, formats, kept, device, prefix)
    if adopts and chosen:
        taken = ", ".join(f"{prefix}{name}={_text(formats[name])}" for name in chosen)
        say(f"{where} was begun without a record of number formats; it goes on with {taken}")
    else:
        taken = ", ".join(
            f"{prefix}{name}=auto took {_text(formats[name])}"
            for name in chosen
            if formats[name] != PLAIN_FORMATS[name]
        )
        if taken:
            say(f"{taken} on this GPU")
    return formats


def set_tf32(enabled: bool) -> None:
    """Lets float32 products and convolutions on a GPU use TensorFloat-32, or forbids it.

    Torch forbids it for products and allows it for convolutions until told: both are set. These
    are the calls that sampling/export/verify.py reads; torch refuses to mix them with
    `fp32_precision`.
    """
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.allow_tf32 = enabled


def check_dtype(device: torch.device, dtype: str, field: str = "dtype") -> None:
    """Raises UserError where the device cannot compute in `dtype`."""
    if dtype == "bfloat16" and device.type == "cuda" and not computes_in_bfloat16(device):
        raise UserError(
            f"{field}=bfloat16 needs a GPU that computes in it, and "
            f"{torch.cuda.get_device_name(device)} does not; use float16 or float32"
        )


def check_tf32(device: torch.device, field: str = "tf32") -> None:
    """Raises UserError where the device has no TensorFloat-32."""
    if device.type != "cuda":
        raise UserError(
            f"{field}=true needs a GPU (CUDA), and this process computes on the {device.type}; "
            "leave it at auto"
        )
    if not _has_tf32(device):
        raise UserError(
            f"{field}=true needs compute capability 8.0 or newer, and "
            f"{torch.cuda.get_device_name(device)} is older; leave it at auto"
        )


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether a GPU has bfloat16 itself, not emulated."""
    with current(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one inside the block: calls there leave others alone."""
    if device.type == "cuda" and device.index is not None:
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def _automatic(name: str, device: torch.device) -> Any:
    if name == "tf32":
        return _has_tf32(device)
    is_able = device.type == "cuda" and computes_in_bfloat16(device)
    return "bfloat16" if is_able else "float32"


def _has_tf32(device: torch.device) -> bool:
    is_gpu = device.type == "cuda"
    return is_gpu and torch.cuda.get_device_capability(device) >= TF32_CAPABILITY


def _check(formats: Mapping[str, Any], device: torch.device, prefix: str = "") -> None:
    for name, value in formats.items():
        if name == "tf32" and value:
            check_tf32(device, f"{prefix}{name}")
        elif name != "tf32":
            check_dtype(device, value, f"{prefix}{name}")


def _check_same(
    where: str,
    asked: Mapping[str, Any],
    formats: Mapping[str, Any],
    kept: Mapping[str, Any],
    device: torch.device,
    prefix: str,
) -> None:
    differing = [name for name in asked if formats[name] != kept[name]]
    if not differing:
        return
    rows = [
        f"{prefix}{name} was {_text(kept[name])} there, and "
        f"{'auto takes ' if asked[name] == 'auto' else ''}{_text(formats[name])} on this "
        f"{device.type} device"
        for name in differing
    ]
    values = " ".join(f"{prefix}{name}={_text(kept[name])}" for name in differing)
    remedy = f"set {values} to continue it here"
    try:
        _check({name: kept[name] for name in differing}, device)
    except UserError:
        remedy = f"continue it on a device that computes with {values}"
    raise UserError(f"{where}: {'; '.join(rows)}; number formats are not mixed: {remedy}")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def settled_formats(
    asked: Mapping[str, Any], settings: Path, device: torch.device, say: Callable[[str], None]
) -> dict[str, Any]:
    """Returns the formats of a search or evaluation; raises UserError where it began in others.

    `asked` are dtype and tf32 of its config, `settings` the file that keeps its settings.
    """
    kept, is_recorded = kept_formats(settings)
    return settle(f"output={settings.parent}", asked, device, say, kept, is_recorded)


def kept_formats(settings: Path) -> tuple[dict[str, Any] | None, bool]:
    """Returns the formats in a file of settings, None without it, and whether it recorded them."""
    if not settings.is_file():
        return None, False
    return recorded_formats(json_object(settings.read_bytes(), settings), FORMATS)
