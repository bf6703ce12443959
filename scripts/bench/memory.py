"""Peak memory in the benchmark: each contestant alone in a process, its largest resident set.

The resident set counts what the libraries map as well as weights, activations and gradients; ours
carries Lightning and one more copy of the weights, the EMA.
"""

import json
import subprocess
import sys
from pathlib import Path

from blackpoint.data.files.errors import RunFailed
from blackpoint.sampling.runtime.memory import process_peak_bytes
from blackpoint.scripts.bench.inputs import Inputs, training_config
from blackpoint.scripts.bench.timing import Row, ratio_row, row

PARTS = ("train", "bare_train", "train_cached", "bare_train_cached", "sample", "unet_calls")
PAIRS = {
    "memory of training, encoders in the loop": ("train", "bare_train"),
    "memory of training, cached latents": ("train_cached", "bare_train_cached"),
    "memory of sampling": ("sample", "unet_calls"),
}
NAMES = {"train": "ours, with EMA", "sample": "our sample()", "unet_calls": "UNet calls alone"}


def measure_memory(
    yaml: str, inputs: Inputs, folder: Path, num_steps: int, num_images: int, repeats: int
) -> dict[str, list[int]]:
    """Returns the peak resident set of each part, bytes, one a repeat."""
    peaks: dict[str, list[int]] = {part: [] for part in PARTS}
    for repeat in range(repeats):
        for part in PARTS:
            task = {
                "part": part,
                "yaml": yaml,
                "run_dir": str(folder / f"{part}_{repeat}"),
                "inputs": {name: str(path) for name, path in vars(inputs).items()},
                "num_steps": num_steps,
                "num_images": num_images,
            }
            command = [sys.executable, "-m", "blackpoint.scripts.bench.memory", json.dumps(task)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise RunFailed(f"the memory of {part} could not be measured:\n{result.stderr}")
            peaks[part].append(int(result.stdout.splitlines()[-1]))
    return peaks


def memory_rows(peaks: dict[str, list[int]]) -> list[Row]:
    """Returns megabytes of each part and ours over bare."""
    rows = []
    for group, (ours, bare) in PAIRS.items():
        for part in (ours, bare):
            name = NAMES.get(part, "ours, with EMA" if part == ours else "bare loop")
            rows.append(row(group, name, "MB", [peak / 1e6 for peak in peaks[part]]))
        rows.append(ratio_row(group, "ours / bare", peaks[ours], peaks[bare]))
    return rows


def _run(task: dict) -> None:
    """Runs one part in this process; what a part does not need is not imported."""
    part, inputs = task["part"], {name: Path(path) for name, path in task["inputs"].items()}
    cached = part.endswith("_cached")
    changes = {"data.shards": inputs["encoded_shards"]} if cached else {}
    run_dir = Path(task["run_dir"])
    config = training_config(task["yaml"], run_dir, task["num_steps"], **changes)
    if part.startswith("train"):
        from blackpoint.train.run import train

        train(config, run_dir, 0)
    elif part.startswith("bare"):
        from blackpoint.scripts.bench.bare import bare_loop

        bare_loop(config, inputs["encoded" if cached else "images"], cached)(task["num_steps"])
    else:
        from blackpoint.scripts.bench.sampling import contestants

        contestants(config, task["num_images"], task["num_steps"])[part]()


if __name__ == "__main__":
    _run(json.loads(sys.argv[1]))
    print(process_peak_bytes())
