"""Runs trials of any number of prompts in batches: denoise, preview or decode, verify.

Trials that go from the same level to the same level share a batch, whatever their prompts. What
becomes of a trial depends on its batch by rounding alone; the ledger counts rows as forward hooks
would.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from blackpoint.sampling.conditioning import Conditioning, joined
from blackpoint.sampling.grid import Denoise, SampleState, renoise
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.noise import step_noise
from blackpoint.sampling.options import SamplingOptions
from blackpoint.sampling.samplers import run
from blackpoint.sampling.search.costs import BACKWARD_NFE, Costs, Ledger
from blackpoint.sampling.search.gradients import gradient_batch
from blackpoint.sampling.search.problem import Noise, Outcome, Renoised, Result, Seeded, Trial
from blackpoint.sampling.search.scoring import AnyVerifier, Scoring, Trace


class TrialRunner:
    """Runs trials of `prompts`, which are named by their index, on one model.

    Prompts are encoded when their first trial comes, once, until `forget`. Every one of `verifiers`
    scores every image; `weights` names those whose weighted sum is an outcome's score.
    """

    def __init__(
        self,
        model: DiffusionModel,
        prompts: Mapping[int, str],
        sampling: SamplingOptions,
        verifiers: Sequence[AnyVerifier],
        weights: Mapping[str, float],
        batch_size: int,
    ) -> None:
        self.model, self.prompts, self.sampling = model, prompts, sampling
        self.batch_size = batch_size
        self.shape = model.latent_shape(sampling.height, sampling.width)
        self.grid = model.process.grid(sampling.num_steps, sampling.sampler)
        self.scoring = Scoring(verifiers, weights, model.process, self.grid)
        self.guidance = Guidance(sampling.guidance_scale, sampling.guidance_rescale)
        self.costs = Costs(sampling.sampler, self.grid, self.guidance, self.scoring.measured)
        self.cost = self.costs.nfe
        self._empty = model.encode_prompts(
            [sampling.negative_prompt], max_tokens=sampling.max_tokens
        )
        if sampling.clip_skip:
            model.encode_prompts([""], sampling.clip_skip)  # says how many layers there are
        self._encoded: dict[int, Conditioning] = {}
        self.ledger = Ledger()
        self.holds_inverse_fixed = False
        """Noise optimisation: whether e' counts as constant in the gradient of stability."""

    def gradient_cost(self) -> int:
        """Returns the NFE of a whole run with the gradient of its score."""
        whole = self.cost(0, self.grid.num_steps)
        return whole if self.holds_inverse_fixed else (1 + BACKWARD_NFE) * whole

    def run(self, trials: Sequence[tuple[int, Trial]]) -> Iterator[tuple[int, Result]]:
        """Runs (prompt index, trial) pairs; yields positions and results as a batch ends."""
        groups: dict[tuple[int, int, str], list[int]] = {}
        for position, (_, trial) in enumerate(trials):
            key = (trial.first_step, trial.stop, trial.goal)
            groups.setdefault(key, []).append(position)
        for (_, _, goal), positions in sorted(groups.items()):
            for start in range(0, len(positions), self.batch_size):
                chunk = positions[start : start + self.batch_size]
                batch = [trials[position] for position in chunk]
                run_batch = gradient_batch if goal == "gradient" else TrialRunner._run_batch
                yield from zip(chunk, run_batch(self, batch), strict=True)

    @torch.no_grad()
    def rehearse(self, batch: Sequence[tuple[int, Trial]]) -> None:
        """Denoises and decodes without verifying or counting, for its time and memory alone."""
        before = replace(self.ledger)
        conditions = self.conditions([prompt for prompt, _ in batch])
        state = self._denoise([trial for _, trial in batch], conditions, Trace())
        self.decode(state.x0)
        self.ledger = before

    def forget(self, prompt_index: int) -> None:
        """Drops the embedding of a prompt that is finished."""
        self._encoded.pop(prompt_index, None)

    def conditions(self, indices: Sequence[int]) -> Conditioning:
        """Returns the conditions of prompts, one row per index; encodes those that are new."""
        new = [index for index in dict.fromkeys(indices) if index not in self._encoded]
        if new:
            texts = [self.prompts[index] for index in new]
            sampling = self.sampling
            encoded = self.model.encode_prompts(texts, sampling.clip_skip, sampling.max_tokens)
            for row, index in enumerate(new):
                self._encoded[index] = encoded[row : row + 1]
        return joined([self._encoded[index] for index in indices])

    def denoiser(self, conditions: Conditioning, guidance: Guidance) -> Denoise:
        """Returns the model's denoiser with guidance against the negative prompt."""
        count = len(conditions)
        empty = self._empty[torch.zeros(count, dtype=torch.long, device=self.model.device)]
        return self.model.denoiser(conditions, empty, guidance)

    def decode(self, latents: Tensor | None) -> Tensor:
        """Decodes latents and counts them."""
        assert latents is not None
        started_s = self.now_s()
        images = self.model.decode(latents)
        self.ledger.decoded_images += len(images)
        self.ledger.decoding_s += self.now_s() - started_s
        return images

    def noise(self, trials: Sequence[Trial]) -> Tensor:
        """Returns the noises that runs began with, (B, C, H, W) on the CPU."""
        return torch.stack([trial.origin.noise(self.shape) for trial in trials])

    def now_s(self) -> float:
        """Returns the time when all work given so far is done."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    @torch.no_grad()
    def _run_batch(self, batch: list[tuple[int, Trial]]) -> list[Result]:
        started_s, before = self.now_s(), replace(self.ledger)
        trials = [trial for _, trial in batch]
        conditions, trace = self.conditions([prompt for prompt, _ in batch]), Trace()
        state = self._denoise(trials, conditions, trace)
        is_final = trials[0].goal == "final"
        images = state.x  # where nobody looks at the preview
        if is_final or self.scoring.looks_at_images:
            images = self.decode(state.x if is_final else state.x0)
        scores = self._verify(images, batch, conditions, trace)
        price = self.cost(trials[0].first_step, trials[0].stop)
        outcomes = [
            Outcome(
                trial,
                self.scoring.total(scores[row]),
                price,
                None if is_final else _sample(state, row),
                scores[row],
            )
            for row, trial in enumerate(trials)
        ]
        return self.results(outcomes, images if is_final else None, started_s, before)

    def results(
        self, outcomes: Sequence[Outcome], images: Tensor | None, started_s: float, before: Ledger
    ) -> list[Result]:
        """Returns the results of a batch: each with its share of time and costs."""
        count = len(outcomes)
        seconds = (self.now_s() - started_s) / count
        spent = (self.ledger - before).share(count)
        pictures = [None] * count if images is None else [image.cpu() for image in images]
        return [
            Result(outcome, picture, seconds, spent)
            for outcome, picture in zip(outcomes, pictures, strict=True)
        ]

    def _denoise(
        self, trials: Sequence[Trial], conditions: Conditioning, trace: Trace
    ) -> SampleState:
        """Runs trials to where they stop; records the readings of verifiers in the trace."""
        start, stop = self._start(trials), trials[0].stop
        started_s = self.now_s()
        seeds = [trial.seed for trial in trials]
        state = run(
            self.sampling.sampler,
            self.denoiser(conditions, self.guidance),
            self.grid,
            start,
            stop,
            self.sampling.eta,
            lambda step: step_noise(seeds, step, self.shape),
            self.scoring.watch(trace, stop),
        )
        self.ledger.count(len(trials), self.costs.run_rows(start.step, stop))
        self.ledger.denoising_s += self.now_s() - started_s
        return state

    def _start(self, trials: Sequence[Trial]) -> SampleState:
        states = []
        for trial in trials:
            start = trial.start
            if isinstance(start, Noise):
                states.append(SampleState(start.noise(self.shape)[None]))
            elif isinstance(start, Renoised):
                noise = Seeded(start.seed).noise(self.shape)[None]
                states.append(renoise(self.grid, start.state, start.step, noise))
            else:
                states.append(start)
        return _batch(states, self.model.device)

    def _verify(
        self,
        images: Tensor,
        batch: Sequence[tuple[int, Trial]],
        conditions: Conditioning,
        trace: Trace,
    ) -> list[dict[str, float]]:
        previews = {step: self.decode(x0) for step, x0 in trace.readings.items()}
        started_s, stop = self.now_s(), batch[0][1].stop
        measured = {}
        for verifier in self.scoring.measured:
            level = verifier.level(stop)
            denoise = self.denoiser(conditions, Guidance(verifier.guidance_scale))
            measurements = verifier.measure(trace.levels[level], level, denoise, self.grid)
            measured[verifier.measurement] = measurements
        noise = self.noise([trial for _, trial in batch]) if measured else images[:0]
        prompts = [self.prompts[prompt] for prompt, _ in batch]
        scores = self.scoring.scores(images, prompts, previews, noise, measured)
        self.ledger.count(len(batch), self.costs.score_rows(stop))
        self.ledger.verifier_calls += len(batch) * len(self.scoring.verifiers)
        self.ledger.verifying_s += self.now_s() - started_s
        return scores


def _sample(state: SampleState, row: int) -> SampleState:
    """Takes one sample out of a batch, as (1, C, H, W) on the CPU."""
    rows = slice(row, row + 1)
    x0 = None if state.x0 is None else state.x0[rows].cpu()
    return SampleState(state.x[rows].cpu(), state.step, x0)


def _batch(states: Sequence[SampleState], device: torch.device) -> SampleState:
    """Joins samples of one level; `x0` only where all of them have one."""
    [step] = {state.step for state in states}
    x = torch.cat([state.x for state in states]).to(device)
    memories = [state.x0 for state in states if state.x0 is not None]
    x0 = torch.cat(memories).to(device) if len(memories) == len(states) else None
    return SampleState(x, step, x0)
