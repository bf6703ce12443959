"""Probes of the machine: Python and packages, torch and its GPUs, one step of the embedded model,
and the kernels of xformers and bitsandbytes, which are run, not looked up."""

import importlib.metadata
import platform
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from blackpoint.data.files.imports import uncollected
from blackpoint.scripts.doctor.row import Row, Status, one_line

if TYPE_CHECKING:
    import torch

GPU_FOLDER = "/proc/driver/nvidia/gpus"
MOST_SHOWN = 6


def packages() -> Iterator[Row]:
    """Compares Python and the installed packages with what this version asks for."""
    ours, found = importlib.metadata.metadata("blackpoint"), platform.python_version()
    asked = ours["Requires-Python"]
    if SpecifierSet(asked).contains(found, prereleases=True):
        yield Row("python", "green", f"{found}, {platform.system()} {platform.machine()}")
    else:
        remedy = f"make .venv anew with a Python {asked}"
        yield Row("python", "red", f"{found}, and blackpoint needs {asked}", remedy)
    wrong, count = [], 0
    for text in importlib.metadata.requires("blackpoint") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        if not version or not requirement.specifier.contains(version, prereleases=True):
            wrong.append((requirement, version or "not installed"))
    if not wrong:
        yield Row("packages", "green", f"{ours['Version']}; all {count} that it needs are there")
        return
    finding = "; ".join(f"{needed.name} {is_there}" for needed, is_there in wrong[:MOST_SHOWN])
    needed = " ".join(f"'{needed}'" for needed, _ in wrong[:MOST_SHOWN])
    yield Row("packages", "red", f"{finding} ({len(wrong)} of {count})", f"pip install {needed}")


def torch_and_step() -> Iterator[Row | str]:
    """Imports torch, lists its GPUs, repeats the recorded step on the CPU and on each GPU, and runs
    the optional kernels."""
    with uncollected():
        import torch
    cards = sorted(Path(GPU_FOLDER).glob("*"))
    built = torch.version.cuda
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_available = torch.cuda.is_available()
    version = f"{torch.__version__}, CUDA {built}" if built else f"{torch.__version__}, no CUDA"
    if is_available:
        yield Row("torch", "green", version)
    elif cards and not built:
        finding = f"{version}, but this machine has {len(cards)} NVIDIA GPUs"
        yield Row("torch", "red", finding, "install a build of torch with CUDA")
    elif cards:
        reason = "torch.cuda.is_available() is false"
        if caught:
            reason = f"{caught[-1].category.__name__}: {caught[-1].message}"[:300]
        remedy = "CUDA_VISIBLE_DEVICES hides them, or the driver is older than this build asks for"
        yield Row("torch", "red", f"{version}; the NVIDIA GPUs are not usable: {reason}", remedy)
    else:
        remedy = "the miniature runs on CPUs; on a cluster, run this in a job with a GPU"
        yield Row("torch", "yellow", f"{version}; no NVIDIA GPU here", remedy)
    devices = [torch.device("cpu")]
    for number in range(torch.cuda.device_count() if is_available else 0):
        device = torch.device("cuda", number)
        devices.append(device)
        text, free, total = card_of(device)
        if free < 0.9 * total:
            remedy = "nvidia-smi names the processes that hold the rest"
            yield Row(f"gpu {number}", "yellow", f"{text}, {free / 2**30:.1f} GiB free", remedy)
        else:
            yield Row(f"gpu {number}", "green", text)
    yield "diffusers"
    with uncollected():
        from blackpoint.scripts.doctor.one_step import compare
    for device in devices:
        yield f"step on {device}"
        try:
            yield compare(device)
        except Exception as error:
            remedy = "install a build of torch (and diffusers) for this device"
            yield Row(f"step on {device}", "red", one_line(error), remedy)
    for name, extra, key, run in (
        ("xformers", "xformers", "attention=sdpa", _attention_problem),
        ("bitsandbytes", "eight-bit", "optimizer.name=adamw", _eight_bit_problem),
    ):
        yield name
        if find_spec(name) is None:
            finding = f"not installed: pip install -e '.[{extra}]', or {key} does without"
            yield Row(name, "green", finding)
            continue
        finding, problem = importlib.metadata.version(name), run(devices[-1])
        finding += f" on {devices[-1]}: {problem or 'runs'}"
        # Without a GPU there may be no kernel, and nothing is wrong with the package.
        status: Status = "green" if problem is None else "red" if is_available else "yellow"
        remedy = f"{key} does without; or install the build for this torch and device"
        yield Row(name, status, finding, remedy if problem else "")


def card_of(device: "torch.device") -> tuple[str, int, int]:
    """Returns a GPU in words, and its free and whole memory in bytes."""
    import torch

    card = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    text = f"{card.name}, {total / 2**30:.1f} GiB, capability {card.major}.{card.minor}"
    return f"{text}, bfloat16 {'yes' if card.major >= 8 else 'emulated'}", free, total


def _attention_problem(device: "torch.device") -> str | None:
    import torch

    from blackpoint.sampling.runtime.speed import xformers_problem
    from blackpoint.scripts.doctor.one_step import load_unet

    return xformers_problem(load_unet(device), device, torch.float32, training=True)


def _eight_bit_problem(device: "torch.device") -> str | None:
    from blackpoint.train.optimizer import eight_bit_problem

    return eight_bit_problem(device)
