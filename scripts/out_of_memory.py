"""What a verb says when memory ends: the peak, what is kept, and cheap settings that need less.

A remedy is named only where the config does not have it yet, the cheapest first: with those that
change results by rounding at most the same command goes on in the same folder.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from blackpoint.data.files.dotted import flat
from blackpoint.data.files.paths import is_remote
from blackpoint.data.shards.listing import is_encoded
from blackpoint.sampling.runtime.memory import GB, peak_bytes
from blackpoint.sampling.runtime.precision import computes_in_bfloat16

MOST_REMEDIES = 3
HOST = "DefaultCPUAllocator"
NO_MEMORY = re.compile(rf"out of memory|{HOST}|STATUS_ALLOC_FAILED")
LOST_WORKER = "DataLoader worker (pid"
ASKED = re.compile(r"ried to allocate ([\d.]+ \w+)")
OTHER_RUN, OTHER_OUTPUT = "in another run_dir", "in another output"


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the host or the device has no memory left."""
    return isinstance(error, MemoryError) or bool(NO_MEMORY.search(str(error)))


def out_of_memory(config: Any, error: Exception) -> str:
    """Returns the message for the user: peak, last checkpoint, at most three remedies."""
    asked = ASKED.search(str(error))
    wanted = f", and {asked[1]} more were asked for" if asked else ""
    ways = [f"{settings} ({note})" for settings, note in remedies(config)][:MOST_REMEDIES]
    remedy = "; or ".join(ways) or "take a device with more"
    is_on_host = isinstance(error, MemoryError) or HOST in str(error)
    held = f"{_peak(is_on_host)}{wanted}{_planned(config)}"
    return f"out of memory: {held}; {_kept(config)}to need less: {remedy}"


def explained(config: Any, error: Exception) -> str | None:
    """Returns the message for an end of memory, or of a process that loads data; else None."""
    if is_out_of_memory(error):
        return out_of_memory(config, error)
    link: BaseException | None = error
    while link is not None and LOST_WORKER not in str(link):
        link = link.__cause__ or link.__context__  # what follows from it hides it
    if link is None:
        return None
    key = next((key for key in flat(asdict(config)) if key.endswith("num_workers")), "num_workers")
    return (
        "a process that loads data was killed, as a system does whose memory ends; "
        f"{_kept(config)}the same command continues; fewer {key} need less memory"
    )


def _planned(config: Any) -> str:
    """Says what a training was planned to hold, as far as there is memory left to plan in."""
    if not hasattr(config, "trainer"):
        return ""
    try:
        from blackpoint.train.plan.plan import planned_peak  # Lightning, which sampling lacks

        return f"; plan=true plans {planned_peak(config) / GB:.1f} GB"
    except Exception:  # what has failed is reported all the same
        return ""


def remedies(config: Any) -> Iterator[tuple[str, str]]:
    """Yields settings that need less memory, `key=value ...`, and a note; the cheapest first."""
    values = flat(asdict(config))
    if "trainer.precision" in values:
        yield from _for_training(values)
    elif "batch_size" in values:
        yield from _for_sampling(values)


def _for_training(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if not values["trainer.gradient_checkpointing"]:
        yield "trainer.gradient_checkpointing=true", "the same result in more time"
    images, batches = values["batch_size"], values["trainer.accumulate_grad_batches"]
    if images % (2 * values["trainer.devices"] * values["trainer.num_nodes"]) == 0:
        settings = f"batch_size={images // 2} trainer.accumulate_grad_batches={2 * batches}"
        note = "the same images per step"
        yield settings, f"{note}, {OTHER_RUN}" if values["data.buckets.enabled"] else note
    shards = values["data.shards"] or ""
    folder = Path(shards) if Path(shards).is_dir() else Path(shards).parent
    if shards and not is_remote(shards) and not is_encoded(folder):
        yield "latents of `blackpoint data encode`", f"no encoders in memory, {OTHER_RUN}"
    if values["trainer.precision"] == "32-true" and torch.cuda.is_available():
        yield f"trainer.precision={'bf16' if _has_bfloat16() else '16'}-mixed", OTHER_RUN
    if values["lora.rank"] is None:  # else both are small
        if values["optimizer.name"] == "adamw" and not values["trainer.channels_last"]:
            yield "optimizer.name=adamw_8bit", f"pip install -e '.[eight-bit]', {OTHER_RUN}"
        is_here = values["ema.device"] == "same" and values["trainer.strategy"] != "fsdp"
        if values["ema.enabled"] and is_here and torch.cuda.is_available():
            yield "ema.device=cpu", f"the average in the machine's memory, {OTHER_RUN}"
        if values["ema.enabled"]:
            yield "ema.enabled=false", f"the last weights are exported, {OTHER_RUN}"


def _for_sampling(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if values["batch_size"] > 1:
        yield f"batch_size={values['batch_size'] // 2}", "the same results to rounding"
    key = "encoder_dtype" if "encoder_dtype" in values else "dtype"  # else that of what is stored
    half = "bfloat16" if _has_bfloat16() else "float16"
    takes_float32 = not torch.cuda.is_available() or half == "float16"
    is_float32 = values[key] == "float32" or (values[key] == "auto" and takes_float32)
    if is_float32 and (key, half) != ("encoder_dtype", "float16"):  # `data encode` has none
        yield f"{key}={half}", OTHER_OUTPUT


def _has_bfloat16() -> bool:
    """Whether the device computes in it; every CPU does."""
    return not torch.cuda.is_available() or computes_in_bfloat16(torch.device("cuda"))


def _peak(is_on_host: bool) -> str:
    if is_on_host or not torch.cuda.is_available():
        peak = peak_bytes(torch.device("cpu"))
        return f"this process has held up to {peak / GB:.1f} GB of the machine's memory"
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    device = max(devices, key=peak_bytes)
    total = torch.cuda.get_device_properties(device).total_memory
    held = f"{peak_bytes(device) / GB:.1f} GB of the {total / GB:.1f} GB"
    return f"PyTorch has held up to {held} of {torch.cuda.get_device_name(device)}"


def _kept(config: Any) -> str:
    """Names the last checkpoint of a training."""
    if not hasattr(config, "trainer"):
        return ""
    saved = sorted((Path(config.run_dir) / "checkpoints").glob("step_*"))
    return f"{saved[-1]} is kept; " if saved else "no checkpoint was written yet; "
