"""Peak memory of each method of a stability study: one prompt, one noise at a time, own processes.

On a GPU what PyTorch's allocator gave out; on a CPU the largest resident set, which counts what the
libraries map and the weights too.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from sampling.errors import RunFailed
from sampling.evaluation.stability import StabilityStudyConfig
from sampling.evaluation.stability_arms import BEST_OF, Place, Prices, arms, stability_scores
from sampling.evaluation.stability_findings import SELECTION
from sampling.search.config import SearchConfig
from sampling.whole_file import write_whole
from scripts.config import load, to_yaml

NUM_STEPS_MEASURED = 2
"""Noises, or gradient steps: the second shows what stays of the first."""


def measured_peaks(config: StabilityStudyConfig, path: Path) -> dict[str, dict[str, float]]:
    """Returns MB by place and method; kept in `path`. Checkpoints are taken to be of one size."""
    found: dict[str, dict[str, float]] = {}
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
    first = next(iter(config.checkpoints))
    for number in config.num_steps:
        names = [Place(name, number).folder for name in config.checkpoints]
        if all(name in found for name in names):
            continue
        print(f"measuring memory at {number} steps", flush=True)
        peaks = {
            name: peak_mb(search) for name, search in probes(config, Place(first, number)).items()
        }
        found |= dict.fromkeys(names, peaks)
        write_whole(path, json.dumps(found, indent=1) + "\n")
    return found


def probes(config: StabilityStudyConfig, place: Place) -> dict[str, SearchConfig]:
    """Returns a small search for each method."""
    prices = Prices(config, place.num_steps)
    searches = {arm.name: arm.config for arm in arms(config, place)}
    first = next(iter(stability_scores(config, place.num_steps).values()))
    image = searches.pop(BEST_OF)
    found = {
        "image": (image, prices.image()),
        SELECTION: (
            replace(image, verifiers={"stability": first}),
            prices.selection(num_noises=1),
        ),
    }
    for name, search in searches.items():
        if search.algorithm == "noise_optimisation":
            price = search.budget_nfe // config.num_optimisation_steps
            found[name] = (search, price)
    return {
        name: replace(
            search,
            budget_nfe=NUM_STEPS_MEASURED * price,
            limit=1,
            batch_size=1,
        )
        for name, (search, price) in found.items()
    }


def peak_mb(search: SearchConfig) -> float:
    """Runs a search in a process of its own and returns its peak memory, MB."""
    with tempfile.TemporaryDirectory() as folder:
        yaml = Path(folder) / "search.yaml"
        yaml.write_text(to_yaml(replace(search, output=f"{folder}/out")), encoding="utf-8")
        command = [sys.executable, "-m", "scripts.stability_cost", str(yaml)]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RunFailed(f"memory could not be measured:\n{run.stderr}")
    return int(run.stdout.splitlines()[-1]) / 1e6


def _measure(yaml: str) -> int:
    """Searches and returns the peak of this process or its GPU, bytes."""
    import torch

    from sampling.search.run import search_to_folder
    from sampling.tasks import Task
    from train.memory import process_peak_bytes

    search_to_folder(load(SearchConfig, [yaml]), Task())
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return process_peak_bytes()


if __name__ == "__main__":
    print(_measure(sys.argv[1]))
