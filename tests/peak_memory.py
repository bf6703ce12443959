"""`python -m tests.peak_memory FOLDER ACTION`: how far memory rises above that of the imports.

In units of the weights of a UNet of 305 MB. Actions: load (prints three peaks: loading, touching
every weight, saving), fit, resume, export.
"""

import dataclasses
import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blackpoint.sampling.export.export import export
from blackpoint.sampling.model import DiffusionModel
from blackpoint.scripts.measurements import make_random_base as bases
from blackpoint.train.run import fit
from tests.tiny_run import make_tiny_shards, tiny_config


def resident_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def main(work: Path, action: str) -> list[float]:
    """Does the action and returns its peaks."""
    found: list[float] = []

    def peak_over(act: Callable[[], Any]) -> Any:
        gc.collect()
        before = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        result = act()
        found.append((resident_bytes("VmHWM") - before) / weights)
        return result

    if not (work / "base").exists():
        wide = bases.UNET | {"block_out_channels": (96, 192, 384, 384), "cross_attention_dim": 64}
        small = bases.ARCHITECTURES["small"]
        bases.ARCHITECTURES["small"] = dataclasses.replace(small, unet=wide)
        bases.make(bases.RandomBaseConfig("small", str(work / "base"), "float32"))
        make_tiny_shards(work)
    weights = (work / "base/unet/diffusion_pytorch_model.safetensors").stat().st_size
    values: dict[str, Any] = {"batch_size": 1, "data.resolution": 64, "trainer.max_steps": 2}
    values |= {"trainer.checkpoint_every_steps": 1, "trainer.gradient_checkpointing": True}
    config = tiny_config(work / "run", work / "base", work / "shards", **values)
    newest = work / "run/checkpoints/step_00000002.ckpt"
    match action:
        case "load":
            model = peak_over(lambda: DiffusionModel.load(work / "base"))
            peak_over(lambda: sum(weight.sum() for weight in model.unet.parameters()))
            peak_over(lambda: model.save(work / "saved"))
        case "fit":
            peak_over(lambda: fit(config))
        case "resume":
            shutil.rmtree(work / "run/export")
            newest.unlink()
            peak_over(lambda: fit(config))
        case "export":
            peak_over(lambda: export(newest, work / "out"))
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
