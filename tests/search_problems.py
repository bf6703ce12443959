"""A model whose samples are known in closed form, and searches over it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blackpoint.sampling.conditioning import Conditioning
from blackpoint.sampling.grid import SampleState
from blackpoint.sampling.guidance import NO_GUIDANCE, Guidance
from blackpoint.sampling.noise import initial_noise
from blackpoint.sampling.options import SamplingOptions
from blackpoint.sampling.process import Process
from blackpoint.sampling.samplers import run
from blackpoint.sampling.search.driver import MakeSearch, PromptSearch, drive
from blackpoint.sampling.search.journal import Journal
from blackpoint.sampling.search.problem import Problem
from blackpoint.sampling.search.runner import TrialRunner
from tests.toy_denoisers import ZERO_SNR, ideal_gaussian

SHAPE = (1, 4, 4)


class GaussianModel:
    """Pixels are independent N(.8, .4^2); its denoiser is the ideal one, its decoder the identity.

    It counts the rows that it evaluates, as a forward hook of a UNet would.
    """

    def __init__(self, shape: tuple[int, int, int] = SHAPE) -> None:
        self.shape, self.rows, self.decoded = shape, 0, 0
        self.process, self.device = Process(ZERO_SNR), torch.device("cpu")

    one_prompt_per_batch = False

    def noise(self, seeds: Any, height: int | None = None, width: int | None = None) -> Tensor:
        return initial_noise(seeds, self.shape)

    def rows_at(self, t: int, guidance: Guidance) -> tuple[int, int]:
        return 1, int(guidance.is_on(t))

    def grid_order(self, latents: Tensor) -> None:
        return None

    def encode_prompts(self, prompts: list[str], *_: Any, **__: Any) -> Conditioning:
        return Conditioning(torch.zeros(len(prompts), 1, 1))

    def denoiser(
        self, condition: Conditioning, empty: Any = None, guidance: Guidance = NO_GUIDANCE
    ) -> Any:
        ideal = ideal_gaussian(self.process.schedule)

        def denoise(x: Tensor, t: int) -> Any:
            assert len(x) == len(condition)
            self.rows += len(x) * (2 if guidance.is_on(t) else 1)
            return ideal(x, t)

        return denoise

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded += len(latents)
        return latents


def linear(images: Tensor, prompts: Any, previews: Any = None) -> Tensor:
    """Scores an image by its first pixel."""
    return images[:, 0, 0, 0].double()


def scores_of(rows: Any) -> list[float]:
    """Ranks rows by their score."""
    return [row["score"] for row in rows]


def sometimes(images: Tensor, prompts: Any) -> Tensor:
    """Scores by the mean, and not the images whose mean is even in the third decimal."""
    scores = images.mean(dim=(1, 2, 3))
    return torch.where((1000 * scores).long() % 2 == 0, torch.nan, scores)


def never(images: Tensor, prompts: Any) -> Tensor:
    """Scores no image."""
    return torch.full((len(images),), torch.nan)


class Scored:
    """A verifier made of a function."""

    name, differentiable = "linear", False

    def __init__(self, function: Any = linear, preview_log_snr: float | None = None) -> None:
        self.score, self.preview_log_snr = function, preview_log_snr


def runner(
    num_prompts: int,
    model: GaussianModel | None = None,
    batch_size: int = 64,
    guidance: Guidance = NO_GUIDANCE,
    verifier: Any = linear,
    **sampling: Any,
) -> TrialRunner:
    """Returns a runner over the Gaussian model, 10 steps of DDIM unless told otherwise."""
    about = {"guidance_scale": guidance.scale, "guidance_rescale": guidance.rescale}
    settings = SamplingOptions(**({"num_steps": 10} | about | sampling))
    model = model or GaussianModel()
    return TrialRunner(
        model,  # type: ignore[arg-type]
        {number: f"prompt {number}" for number in range(num_prompts)},
        settings,
        [Scored(verifier)],
        {"linear": 1.0},
        batch_size,
    )


def search(
    one: TrialRunner, folder: Path, make: MakeSearch, budget_nfe: int, **told: Any
) -> list[PromptSearch]:
    """Searches every prompt of the runner with seed 0 and returns them by number."""
    journal = Journal(folder)
    try:
        problems = [
            Problem(index, 0, one.grid, one.cost, budget_nfe) for index in range(len(one.prompts))
        ]
        found = drive(one, journal, problems, make, **told)
    finally:
        journal.close()
    return sorted(found, key=lambda each: each.problem.prompt_index)


def pixel_law(one: TrialRunner) -> tuple[float, float]:
    """Returns mean and deviation of a pixel under deterministic DDIM, which is linear in noise."""
    ends = [
        run("ddim", ideal_gaussian(ZERO_SNR), one.grid, SampleState(torch.full((1, 1, 1, 1), x))).x
        for x in (0.0, 1.0)
    ]
    return ends[0].item(), (ends[1] - ends[0]).item()
