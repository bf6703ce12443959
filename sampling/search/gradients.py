"""Trials that want the gradient of their score at the noise, for noise optimisation.

The run is differentiated as a whole, with gradient checkpointing at every network evaluation: what
is kept of a step is its latent, and memory does not grow with the steps by more than that (Chen et
al. 2016). With the re-inverted noise e' held fixed the gradient of the cosine is known in closed
form and nothing is differentiated:

    grad cos(e, e') = (e' / |e'| - cos e / |e|) / |e|
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from blackpoint.sampling.conditioning import Conditioning
from blackpoint.sampling.grid import Denoise, Prediction, SampleState
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.samplers import run
from blackpoint.sampling.search.problem import Outcome, Result, Trial
from blackpoint.sampling.verifiers.stability import Stability
from blackpoint.sampling.verifiers.verifier import TrajectoryVerifier

if TYPE_CHECKING:
    from blackpoint.sampling.search.runner import TrialRunner


def gradient_batch(runner: "TrialRunner", batch: Sequence[tuple[int, Trial]]) -> list[Result]:
    """Runs, scores and differentiates; a state has the gradient as x and the noise as x0."""
    started_s, before = runner.now_s(), replace(runner.ledger)
    trials, indices = [trial for _, trial in batch], [prompt for prompt, _ in batch]
    with torch.no_grad():
        conditions = runner.conditions(indices)
    [verifier] = runner.scoring.verifiers
    noise = runner.noise(trials).to(runner.model.device)
    if runner.holds_inverse_fixed:
        assert isinstance(verifier, Stability)
        values, gradient, x = fixed_inverse(runner, verifier, noise, conditions)
    else:
        prompts = [runner.prompts[index] for index in indices]
        values, gradient, x = through_the_run(runner, noise, conditions, prompts)
    images = runner.decode(x)
    runner.ledger.verifier_calls += len(batch)
    outcomes = []
    for row, trial in enumerate(trials):
        scores, rows = {verifier.name: float(values[row])}, slice(row, row + 1)
        state = SampleState(gradient[rows].cpu(), 0, noise[rows].cpu())
        total = runner.scoring.total(scores)
        outcomes.append(Outcome(trial, total, runner.gradient_cost(), state, scores))
    return runner.results(outcomes, images, started_s, before)


def through_the_run(
    runner: "TrialRunner", noise: Tensor, conditions: Conditioning, prompts: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns scores, their gradient at the noise, and the generated latents."""
    [verifier] = runner.scoring.verifiers
    num_steps, started_s = runner.grid.num_steps, runner.now_s()
    with torch.enable_grad():
        noise = noise.detach().requires_grad_()
        denoise = checkpointed(runner.denoiser(conditions, runner.guidance))
        x = run(runner.sampling.sampler, denoise, runner.grid, SampleState(noise)).x
        if isinstance(verifier, TrajectoryVerifier):
            again = checkpointed(runner.denoiser(conditions, Guidance(verifier.guidance_scale)))
            measured = verifier.measure(x, num_steps, again, runner.grid)
            scores = verifier.score_measured(noise, measured)
        else:
            decode = partial(checkpoint, runner.model.decode_with_gradient, use_reentrant=False)
            images = torch.cat([decode(row) for row in x.split(1)])  # kept: the latents alone
            scores = verifier.score(images, prompts).to(noise.device)
        [gradient] = torch.autograd.grad(scores.sum(), noise)
    _count(runner, len(noise), started_s, backward=True)
    return scores.detach(), gradient, x.detach()


@torch.no_grad()
def fixed_inverse(
    runner: "TrialRunner", verifier: Stability, noise: Tensor, conditions: Conditioning
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the cosines, their gradient with e' held fixed, and the generated latents."""
    started_s, grid = runner.now_s(), runner.grid
    denoise = runner.denoiser(conditions, runner.guidance)
    x = run(runner.sampling.sampler, denoise, grid, SampleState(noise)).x
    inverse = runner.denoiser(conditions, Guidance(verifier.guidance_scale))
    back = verifier.measure(x, grid.num_steps, inverse, grid).x
    e, e_back = noise.flatten(1), back.to(noise).flatten(1)
    cosine = torch.cosine_similarity(e, e_back, dim=1)
    norm = e.norm(dim=1, keepdim=True)
    gradient = (e_back / e_back.norm(dim=1, keepdim=True) - cosine[:, None] * e / norm) / norm
    _count(runner, len(noise), started_s, backward=False)
    return cosine, gradient.view_as(noise), x


def _count(runner: "TrialRunner", samples: int, started_s: float, backward: bool) -> None:
    """Counts whole runs, their scores, and the way back."""
    stop = runner.grid.num_steps
    for rows in (runner.costs.run_rows(0, stop), runner.costs.score_rows(stop)):
        runner.ledger.count(samples, rows, backward)
    runner.ledger.denoising_s += runner.now_s() - started_s


def checkpointed(denoise: Denoise) -> Denoise:
    """Returns a denoiser that keeps its inputs alone for the backward pass."""

    def recomputed(x: Tensor, t: int) -> Prediction:
        # A model that samples draws nothing, so no state of the generator is kept for each step.
        x0, eps = checkpoint(
            lambda y: tuple(denoise(y, t)), x, use_reentrant=False, preserve_rng_state=False
        )
        return Prediction(x0, eps)

    return recomputed
