"""Peak memory of one gradient of noise optimisation against sampling steps, on a CPU.

python -m blackpoint.scripts.measurements.optimisation_memory [key=value ...] takes each with
gradient checkpointing, as `algorithm=noise_optimisation` has it, and without. Peak memory is that
of the tensors that the gradient allocates, as torch's profiler records every allocation: the
resident set also holds what the C library keeps of freed memory. It writes
docs/optimisation_memory.json.
"""

import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.options import SamplingOptions
from blackpoint.sampling.search import gradients
from blackpoint.sampling.search.problem import Seeded, Trial
from blackpoint.sampling.search.runner import TrialRunner
from blackpoint.sampling.verifiers.load import VerifierConfig, load_verifier
from blackpoint.scripts.config import load
from blackpoint.scripts.stand_alone import describe_machine, run_script

PROMPT = "a white three on a black background"
SCORES = {
    "stability": VerifierConfig(kind="stability"),
    "reward": VerifierConfig(kind="luminance", target=0.0),
}


@dataclass
class MemoryConfig:
    """What is measured, and where it goes."""

    checkpoint: str = "assets/tiny_sd"
    """The model."""
    side_px: int = 64
    """Height and width."""
    num_steps: list[int] = field(default_factory=lambda: [4, 10, 25, 50])
    """Sampling steps."""
    scores: list[str] = field(default_factory=lambda: list(SCORES))
    """What is differentiated: stability (through run and inversion), reward (through the run)."""
    not_checkpointed: list[int] = field(default_factory=lambda: [4, 10])
    """Sampling steps that are also measured without checkpointing."""
    output: str = "docs/optimisation_memory.json"
    """File of the figures."""


def measure(config: MemoryConfig) -> None:
    """Measures every combination and writes them."""
    rows = []
    for score in config.scores:
        for steps, keeps in (
            *((steps, False) for steps in config.num_steps),
            *((steps, True) for steps in config.not_checkpointed),
        ):
            task = {
                "checkpoint": config.checkpoint,
                "side_px": config.side_px,
                "score": score,
                "num_steps": steps,
                "keeps_activations": keeps,
            }
            rows.append(task | {"peak_mb": peak_mb(task)})
            print(rows[-1], flush=True)
    content = {
        "command": "python -m blackpoint.scripts.measurements.optimisation_memory",
        **describe_machine(),
    }
    write_whole(Path(config.output), json.dumps(content | {"rows": rows}, indent=1) + "\n")


def peak_mb(task: dict[str, Any]) -> float:
    """Takes one gradient; returns the most memory that its tensors had at once, MB."""
    model = DiffusionModel.load(task["checkpoint"])
    sampling = SamplingOptions(
        num_steps=task["num_steps"],
        guidance_scale=1.0,
        guidance_rescale=0.0,
        height=task["side_px"],
        width=task["side_px"],
    )
    verifier = load_verifier(SCORES[task["score"]], torch.device("cpu"))
    runner = TrialRunner(model, {0: PROMPT}, sampling, [verifier], {verifier.name: 1.0}, 1)
    trial = Trial(0, 0, Seeded(0), task["num_steps"], "gradient", 0)
    checkpointed = gradients.checkpointed
    try:
        if task["keeps_activations"]:
            gradients.checkpointed = lambda denoise: denoise
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            list(runner.run([(0, trial)]))
    finally:
        gradients.checkpointed = checkpointed
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = recorded.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    memory.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in memory)) / 1e6


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("optimisation_memory", lambda: measure(load(MemoryConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
