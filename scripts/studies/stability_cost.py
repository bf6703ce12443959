"""Peak memory of each method of a stability study: one prompt, one noise at a time, own processes.

On a GPU what PyTorch's allocator gave out; on a CPU the largest resident set, which counts what the
libraries map and the weights too.
"""

import hashlib
import json
import logging
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from blackpoint.data.files.errors import RunFailed
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.evaluation.stability import StabilityStudyConfig
from blackpoint.sampling.evaluation.stability_arms import (
    BEST_OF,
    Place,
    Prices,
    arms,
    stability_scores,
)
from blackpoint.sampling.evaluation.stability_findings import SELECTION
from blackpoint.sampling.runtime.memory import peak_bytes
from blackpoint.sampling.runtime.tasks import Task
from blackpoint.sampling.sample import find_device
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.sampling.verifiers.load import VerifierConfig
from blackpoint.scripts.config import load, to_yaml

log = logging.getLogger(__name__)

FREE = VerifierConfig(kind="luminance", target=0.0)
"""A verifier that needs no memory, where a search must have one."""
NUM_STEPS_MEASURED = 2
"""Noises, or gradient steps: the second shows what stays of the first."""


def measured_peaks(config: StabilityStudyConfig, path: Path) -> dict[str, dict[str, float]]:
    """Returns MB by place and method; kept in `path`. Checkpoints are taken to be of one size."""
    kept: dict[str, float] = {}
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, dict[str, float]] = {}
    first = next(iter(config.checkpoints))
    torch.cuda.empty_cache()  # of the searches in this process
    for number in config.num_steps:
        peaks = {}
        for name, search in probes(config, Place(first, number)).items():
            key = f"{number} steps, {name}, {hashlib.sha1(to_yaml(search).encode()).hexdigest()}"
            if key not in kept:
                print(f"measuring memory: {name}, {number} steps", flush=True)
                try:
                    kept[key] = peak_mb(search)
                except RunFailed as error:
                    log.warning("note: no memory of %s: %s", name, error)
                    continue
                write_whole(path, json.dumps(kept, indent=1) + "\n")
            peaks[name] = kept[key]
        found |= dict.fromkeys((Place(name, number).folder for name in config.checkpoints), peaks)
    return found


def probes(config: StabilityStudyConfig, place: Place) -> dict[str, SearchConfig]:
    """Returns a small search for each method."""
    prices = Prices(config, place.num_steps)
    searches = {arm.name: arm.config for arm in arms(config, place)}
    first = next(iter(stability_scores(config, place.num_steps).values()))
    image = searches.pop(BEST_OF)
    found = {
        "image": (replace(image, verifiers={"free": FREE}), prices.image()),
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
            held_out={},
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
        command = [sys.executable, "-m", "blackpoint.scripts.studies.stability_cost", str(yaml)]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RunFailed(f"memory could not be measured:\n{run.stderr}")
    return int(run.stdout.splitlines()[-1]) / 1e6


def _measure(yaml: str) -> int:
    """Searches and returns the peak of this process or its GPU, bytes."""
    search = load(SearchConfig, [yaml])
    device = find_device(search.device)
    search_to_folder(search, Task())
    return peak_bytes(device)


if __name__ == "__main__":
    print(_measure(sys.argv[1]))
