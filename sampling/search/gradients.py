"""Gradients of scores: at the noise of a whole run, and at every step of one, which tilt its noise.

For noise optimisation the run is differentiated as a whole, with gradient checkpointing at every
network evaluation: what is kept of a step is its latent, and memory does not grow with the steps by
more than that (Chen et al. 2016). With the re-inverted noise e' held fixed the gradient of the
cosine is known in closed form and nothing is differentiated:

    grad cos(e, e') = (e' / |e'| - cos e / |e|) / |e|

A tilted step (NTRK / NoiseTilt 2026, arXiv 2606.18066) replaces the fresh noise z of a stochastic
sampler, with g the gradient of the score at the step's x0-prediction, or through the network at
x_t, of d elements:

    w = IFFT(FFT(g) / |FFT(g)|), |w| = sqrt(d);    z' = sqrt(1 - c^2) z + c w

The transform is over rows and columns, so that every channel of w is white. Frequencies
that g lacks are left out: F / |F| is taken as F |F| / (|F|^2 + delta^2), delta = 1e-5 max |F|,
which does not turn a gradient's rounding into noise.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from blackpoint.sampling.grid import Denoise, Prediction, SampleState, StepNoise
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.pipelines.painter import Conditions
from blackpoint.sampling.samplers import run
from blackpoint.sampling.search.problem import Outcome, Result, Tilt, Trial
from blackpoint.sampling.verifiers.stability import Stability
from blackpoint.sampling.verifiers.verifier import TrajectoryVerifier, takes_latents

LEAST_SHARE = 1e-5
"""Share of a gradient's largest frequency below which another one counts as absent."""

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
    runner: "TrialRunner", noise: Tensor, conditions: Conditions, prompts: Sequence[str]
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
            given = x if takes_latents(verifier) else checkpointed_decode(runner, x)
            scores = verifier.score(given, prompts).to(noise.device)
        [gradient] = torch.autograd.grad(scores.sum(), noise)
    runner.ledger.verifier_gradients += len(noise)
    _count(runner, len(noise), started_s, backward=True)
    return scores.detach(), gradient, x.detach()


@torch.no_grad()
def fixed_inverse(
    runner: "TrialRunner", verifier: Stability, noise: Tensor, conditions: Conditions
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

    def recomputed(x: Tensor, t: Any) -> Prediction:
        # A model that samples draws nothing, so no state of the generator is kept for each step.
        x0, eps = checkpoint(
            lambda y: tuple(denoise(y, t)), x, use_reentrant=False, preserve_rng_state=False
        )
        return Prediction(x0, eps)

    return recomputed


def checkpointed_decode(runner: "TrialRunner", latents: Tensor) -> Tensor:
    """Decodes one by one for a backward pass that keeps the latents alone."""
    decode = partial(checkpoint, runner.model.decode_with_gradient, use_reentrant=False)
    return torch.cat([decode(row) for row in latents.split(1)])


class TiltedSteps:
    """The denoiser and the step noise of a batch of runs, for a sampler that reads the network once
    a step: the noise is tilted by the gradient of the score of what was read last.

    A run whose gradient is 0 or not finite keeps the noise as it is drawn.
    """

    def __init__(
        self,
        runner: "TrialRunner",
        tilt: Tilt,
        denoise: Denoise,
        noise: StepNoise,
        prompts: Sequence[str],
    ) -> None:
        self._runner, self._tilt, self._prompts = runner, tilt, prompts
        self._denoise, self._noise = denoise, noise
        self.seconds = 0.0
        """Seconds in decoder, verifiers and the way back."""

    def denoise(self, x: Tensor, t: int) -> Prediction:
        """Evaluates the network, for a backward pass where the tilt goes through it."""
        through = self._tilt.gradient == "x_t" and t != self._runner.grid.timesteps[-1]
        with torch.set_grad_enabled(through):
            self._x = x.detach().requires_grad_(through)
            self._read = self._denoise(self._x, t)
        return Prediction(*(part.detach() for part in self._read))

    def noise(self, step: int) -> Tensor:
        """Returns the tilted noise of a step; the last one's is as it is drawn."""
        if not self._runner.costs.tilted_steps(step, step + 1):
            return self._noise(step)
        started_s, x0 = self._runner.now_s(), self._read.x0
        sums = self._tilt.sums_scores
        gradient = score_gradient(self._runner, x0.detach(), self._prompts, step + 1, sums)
        if self._tilt.gradient == "x_t":
            [gradient] = torch.autograd.grad(x0, self._x, gradient)
        order = self._runner.model.grid_order(x0)
        tilted = tilted_noise(self._noise(step).to(x0), gradient, self._tilt.strength, order)
        self.seconds += self._runner.now_s() - started_s
        return tilted


def score_gradient(
    runner: "TrialRunner",
    x0: Tensor,
    prompts: Sequence[str],
    level: int,
    sums_scores: bool = True,
) -> Tensor:
    """Returns the gradient of each sample's score at its x0-prediction, and counts it; of the
    verifiers that score a look at `level`.

    Of several verifiers with a weight: of their weighted sum, or, unless sums_scores, the weighted
    sum of their gradients, each of norm 1.
    """
    ledger, weights = runner.ledger, runner.scoring.weights
    guides = [verifier for verifier in runner.scoring.at(level) if weights[verifier.name]]
    decodes = not all(map(takes_latents, guides))
    started_s = runner.now_s()
    with torch.enable_grad():
        x0 = x0.detach().requires_grad_()
        images = checkpointed_decode(runner, x0) if decodes else x0
        decoded_s = runner.now_s()
        terms = []
        for verifier in guides:
            assert not isinstance(verifier, TrajectoryVerifier)
            scores = verifier.score(x0 if takes_latents(verifier) else images, prompts).to(x0)
            terms.append(weights[verifier.name] * scores.sum())
        if terms and (sums_scores or len(terms) == 1):
            terms = [torch.stack(terms).sum()]
        parts = [_gradient(term, x0) for term in terms]
    if len(parts) > 1:
        shares = [weights[verifier.name] for verifier in guides]
        parts = [share * _unit(part) for share, part in zip(shares, parts, strict=True)]
    ledger.decoded_images += decodes * len(x0)
    ledger.verifier_calls += len(guides) * len(x0)
    ledger.verifier_gradients += len(guides) * len(x0)
    ledger.decoding_s += decoded_s - started_s
    ledger.verifying_s += runner.now_s() - decoded_s
    return torch.stack([torch.zeros_like(x0), *parts]).sum(dim=0)


def _gradient(score: Tensor, x0: Tensor) -> Tensor:
    [gradient] = torch.autograd.grad(score, x0, retain_graph=True, materialize_grads=True)
    return gradient


def _unit(gradient: Tensor) -> Tensor:
    """Scales each sample's gradient to norm 1; one of norm 0 stays 0."""
    norms = _each(gradient.flatten(1).norm(dim=1), gradient)
    return gradient / torch.where(norms > 0, norms, 1.0)


def _each(values: Tensor, samples: Tensor) -> Tensor:
    """Shapes a value per sample to go with the samples."""
    return values.view(-1, *[1] * (samples.ndim - 1))


def tilted_noise(
    noise: Tensor, gradient: Tensor, strength: float, order: Tensor | None = None
) -> Tensor:
    """Returns sqrt(1 - c^2) z + c w of each sample, (B, ...); z where g is of no use."""
    flat = gradient.flatten(1)
    usable = _each(flat.isfinite().all(dim=1) & (flat != 0).any(dim=1), gradient)
    direction = white(torch.where(usable, gradient, noise), order).to(noise)
    tilted = math.sqrt(1 - strength**2) * noise + strength * direction
    return torch.where(usable, tilted, noise)


def white(gradient: Tensor, order: Tensor | None = None) -> Tensor:
    """Returns, in float64, what has the phases of each sample's gradient, a flat spectrum and the
    norm sqrt(d) of unit noise with d elements. `order` holds the places of a packed latent,
    (C, H, W): its spectrum is that of the unpacked one."""
    if order is not None:
        packed = gradient.flatten(1).double()
        packed[:, order] = white(packed[:, order])
        return packed.view_as(gradient)
    spectrum = torch.fft.fft2(gradient.double())
    size = spectrum.abs()
    least = _each(LEAST_SHARE * size.flatten(1).amax(dim=1), size)
    flat = torch.fft.ifft2(spectrum * size / (size.square() + least.square())).real
    return math.sqrt(gradient[0].numel()) * _unit(flat)
