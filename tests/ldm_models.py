"""Pipeline folders that a single file can carry: the blocks of SD 1.5 and 2.1, a tenth as wide."""

import json
from pathlib import Path

from blackpoint.sampling.checkpoints.saving import write_json
from blackpoint.sampling.process import Process
from blackpoint.scripts.measurements.make_random_base import RandomBaseConfig, make
from tests.toy_denoisers import SD, ZERO_SNR

V, ZERO = Process(SD), Process(ZERO_SNR)
PUBLISHED = Process(SD, "epsilon", "leading", set_alpha_to_one=False)
NAMES = ("small", "small_21")


def make_ldm_model(folder: Path, name: str, process: Process = ZERO) -> Path:
    """Writes a folder with random weights in float32, of that process, and returns it."""
    make(RandomBaseConfig(name, str(folder), "float32"))
    write_json(folder / "scheduler" / "scheduler_config.json", process.to_diffusers())
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    write_json(folder / "model_index.json", index | {"scheduler": ["diffusers", "DDIMScheduler"]})
    return folder
