"""Runs trials of any number of prompts in batches: denoise, preview or decode, verify.

Trials that go from the same level to the same level share a batch, whatever their prompts. What
becomes of a trial depends on its batch by rounding alone; the ledger counts rows as forward hooks
would.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blackpoint.sampling.grid import Denoise, SampleState, renoise
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.noise import step_seeds
from blackpoint.sampling.options import SamplingOptions
from blackpoint.sampling.pipelines.painter import Conditions, Painter
from blackpoint.sampling.samplers import run
from blackpoint.sampling.search.costs import BACKWARD_NFE, Costs, Ledger
from blackpoint.sampling.search.gradients import TiltedSteps, gradient_batch
from blackpoint.sampling.search.problem import Noise, Outcome, Renoised, Result, Tilt, Trial
from blackpoint.sampling.search.scoring import AnyVerifier, Scoring, Trace, shown_levels


class TrialRunner:
    """Runs trials of `prompts`, which are named by their index, on one model.

    Prompts are encoded when their first trial comes, once, until `forget`. Every one of `verifiers`
    scores every image, but for those with `levels` (sampling/search/scoring.py); `weights` names
    those whose weighted sum is an outcome's score.
    """

    def __init__(
        self,
        model: Painter,
        prompts: Mapping[int, str],
        sampling: SamplingOptions,
        verifiers: Sequence[AnyVerifier],
        weights: Mapping[str, float],
        batch_size: int,
        levels: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.model, self.prompts, self.sampling = model, prompts, sampling
        self.batch_size = batch_size
        self.draw = partial(model.noise, height=sampling.height, width=sampling.width)
        self.draw([0])  # says what sizes are possible
        self._levels = levels or {}
        self.guidance = Guidance(sampling.guidance_scale, sampling.guidance_rescale)
        self.tilt: Tilt | None = None
        self.previews_every = 0
        """Steps between the x0-predictions that results show; 0 is none."""
        self._set_steps(sampling.num_steps, verifiers, weights)
        self._empty = model.encode_prompts(
            [sampling.negative_prompt], max_tokens=sampling.max_tokens
        )
        if sampling.clip_skip:
            model.encode_prompts([""], sampling.clip_skip)  # says how many layers there are
        self._encoded: dict[int, Any] = {}
        self.ledger = Ledger()
        self.holds_inverse_fixed = False
        """Noise optimisation: whether e' counts as constant in the gradient of stability."""

    def _set_steps(
        self, num_steps: int, verifiers: Sequence[AnyVerifier], weights: Mapping[str, float]
    ) -> None:
        sampler, process = self.sampling.sampler, self.model.process
        self.grid = process.grid(num_steps, sampler)
        self.scoring = Scoring(verifiers, weights, process, self.grid, self._levels)
        rows_at = self.model.rows_at
        self.costs = Costs(sampler, self.grid, self.guidance, self.scoring.measured, rows_at)
        self.tilt_steps(self.tilt)

    def in_steps(self, num_steps: int | None) -> "TrialRunner":
        """Returns the runner of runs in another number of steps, which shares all but the grid;
        itself for None."""
        if num_steps in (None, self.grid.num_steps):
            return self
        other = copy(self)
        other._set_steps(num_steps, self.scoring.verifiers, self.scoring.weights)
        return other

    def cost(self, first: int, stop: int, num_steps: int | None = None) -> int:
        """Returns the NFE of a run and its scores, on the grid of so many steps."""
        return self.in_steps(num_steps).costs.nfe(first, stop)

    def tilt_steps(self, tilt: Tilt | None) -> Tilt | None:
        """Sets how the step noise of all runs to come is tilted; returns how it was."""
        before, self.tilt = self.tilt, tilt
        goes_back = tilt is not None and tilt.gradient == "x_t"
        self.costs = replace(self.costs, goes_back_in_steps=goes_back)
        return before

    def gradient_cost(self) -> int:
        """Returns the NFE of a whole run with the gradient of its score."""
        whole = self.cost(0, self.grid.num_steps)
        return whole if self.holds_inverse_fixed else (1 + BACKWARD_NFE) * whole

    def run(self, trials: Sequence[tuple[int, Trial]]) -> Iterator[tuple[int, Result]]:
        """Runs (prompt index, trial) pairs; yields positions and results as a batch ends."""
        groups: dict[tuple[int, int, int, str, int], list[int]] = {}
        for position, (prompt, trial) in enumerate(trials):
            of_prompt = prompt if self.model.one_prompt_per_batch else 0
            levels = trial.num_steps or 0, trial.first_step, trial.stop
            groups.setdefault((*levels, trial.goal, of_prompt), []).append(position)
        for (num_steps, _, _, goal, _), positions in sorted(groups.items()):
            runner = self.in_steps(num_steps or None)
            for start in range(0, len(positions), self.batch_size):
                chunk = positions[start : start + self.batch_size]
                batch = [trials[position] for position in chunk]
                run_batch = gradient_batch if goal == "gradient" else TrialRunner._run_batch
                yield from zip(chunk, run_batch(runner, batch), strict=True)

    @torch.no_grad()
    def rehearse(self, batch: Sequence[tuple[int, Trial]]) -> None:
        """Denoises and decodes without verifying or counting, for its time and memory alone."""
        before = replace(self.ledger)
        conditions = self.conditions([prompt for prompt, _ in batch])
        state = self._denoise(batch, conditions, Trace())
        self.decode(state.x0)
        self.ledger = before

    def forget(self, prompt_index: int) -> None:
        """Drops the embedding of a prompt that is finished."""
        self._encoded.pop(prompt_index, None)

    def conditions(self, indices: Sequence[int]) -> Conditions:
        """Returns the conditions of prompts, one row per index; encodes those that are new."""
        new = [index for index in dict.fromkeys(indices) if index not in self._encoded]
        if new:
            texts = [self.prompts[index] for index in new]
            sampling = self.sampling
            encoded = self.model.encode_prompts(texts, sampling.clip_skip, sampling.max_tokens)
            for row, index in enumerate(new):
                self._encoded[index] = encoded[row : row + 1]
        first, *others = (self._encoded[index] for index in indices)
        return first.followed_by(others)

    def denoiser(self, conditions: Conditions, guidance: Guidance) -> Denoise:
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
        """Returns the noises that runs began with, in the model's layout on the CPU."""
        return torch.stack([trial.origin.noise(self.draw) for trial in trials])

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
        state = self._denoise(batch, conditions, trace)
        goal = trials[0].goal
        is_whole = goal != "preview"
        looks = goal == "final" or self.scoring.looks_at_images(trials[0].stop)
        images = state.x  # where nobody looks at it
        if looks:
            images = self.decode(state.x if is_whole else state.x0)
        latents = state.x if is_whole or state.x0 is None else state.x0
        scores = self._verify(images, latents, batch, conditions, trace)
        looked = {trials[0].stop: images} if looks and not is_whole else {}
        shown = {level: self.decode(x0) for level, x0 in trace.shown.items() if level not in looked}
        shown |= {level: image for level, image in looked.items() if level in trace.shown}
        price = self.cost(trials[0].first_step, trials[0].stop)
        outcomes = [
            Outcome(
                trial,
                self.scoring.total(scores[row]),
                price,
                None if is_whole else _sample(state, row),
                scores[row],
            )
            for row, trial in enumerate(trials)
        ]
        results = self.results(outcomes, images if goal == "final" else None, started_s, before)
        return [
            replace(result, previews={level: part[row].cpu() for level, part in shown.items()})
            for row, result in enumerate(results)
        ]

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
        self, batch: Sequence[tuple[int, Trial]], conditions: Conditions, trace: Trace
    ) -> SampleState:
        """Runs trials to where they stop; records the readings of verifiers in the trace."""
        trials = [trial for _, trial in batch]
        start, stop = self._start(trials), trials[0].stop
        started_s, steps = self.now_s(), None
        denoise = self.denoiser(conditions, self.guidance)
        seeds = [trial.seed for trial in trials]

        def noise(step: int) -> Tensor:
            return self.draw(step_seeds(seeds, step))

        if self.tilt is not None:
            prompts = [self.prompts[prompt] for prompt, _ in batch]
            steps = TiltedSteps(self, self.tilt, denoise, noise, prompts)
            denoise, noise = steps.denoise, steps.noise
        state = run(
            self.sampling.sampler,
            denoise,
            self.grid,
            start,
            stop,
            self.sampling.eta,
            noise,
            self._watch(trace, start.step, stop),
        )
        self.ledger.count(len(trials), self.costs.run_rows(start.step, stop))
        self.ledger.backward_rows += len(trials) * self.costs.backward_rows(start.step, stop)
        self.ledger.denoising_s += self.now_s() - started_s - (steps.seconds if steps else 0.0)
        return state

    def _watch(self, trace: Trace, first: int, stop: int) -> Callable[[SampleState], None]:
        keep = self.scoring.watch(trace, stop)
        shown = shown_levels(self.previews_every, first, stop, self.grid.num_steps)

        def watch(reached: SampleState) -> None:
            keep(reached)
            if reached.step in shown and reached.x0 is not None:
                trace.shown[reached.step] = reached.x0

        return watch

    def _start(self, trials: Sequence[Trial]) -> SampleState:
        states = []
        for trial in trials:
            start = trial.start
            if isinstance(start, Noise):
                states.append(SampleState(start.noise(self.draw)[None]))
            elif isinstance(start, Renoised):
                noise = self.draw([start.seed])
                states.append(renoise(self.grid, start.state, start.step, noise))
            else:
                states.append(start)
        return _batch(states, self.model.device)

    def _verify(
        self,
        images: Tensor,
        latents: Tensor,
        batch: Sequence[tuple[int, Trial]],
        conditions: Conditions,
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
        scores = self.scoring.scores(stop, images, latents, prompts, previews, noise, measured)
        self.ledger.count(len(batch), self.costs.score_rows(stop))
        self.ledger.verifier_calls += len(batch) * len(self.scoring.at(stop))
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
