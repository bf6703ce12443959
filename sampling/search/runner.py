"""Runs trials of any number of prompts in batches: denoise, preview or decode, verify.

Trials that go from the same level to the same level share a batch, whatever their prompts. What
becomes of a trial depends on its batch by rounding alone; the ledger counts rows as forward hooks
would.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blackpoint.sampling.conditioning import Conditioning, joined
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.inversion import Inversion
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.noise import step_noise
from blackpoint.sampling.samplers import Denoise, SampleState, renoise, run
from blackpoint.sampling.search.gradients import gradient_batch
from blackpoint.sampling.search.ledger import BACKWARD_NFE, Ledger
from blackpoint.sampling.search.trial import (
    Noise,
    Outcome,
    Renoised,
    Result,
    Seeded,
    Trial,
    join_states,
    rounded,
    slice_state,
)
from blackpoint.sampling.verifiers.stability import RoundTrip, Stability
from blackpoint.sampling.verifiers.verifier import Verifier, checked_scores


@dataclass(frozen=True)
class SearchSampling:
    """How every candidate is sampled."""

    num_steps: int
    guidance: Guidance
    sampler: str = "ddim"
    eta: float | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str = ""
    clip_skip: int = 0


class TrialRunner:
    """Runs trials of `prompts`, which are named by their index, on one model.

    Prompts are encoded when their first trial comes, once, until `forget`. Every one of `verifiers`
    scores every image; `weights` names those whose weighted sum is an outcome's score.
    """

    def __init__(
        self,
        model: DiffusionModel,
        prompts: Mapping[int, str],
        sampling: SearchSampling,
        verifiers: Sequence[Verifier],
        weights: dict[str, float],
        batch_size: int,
    ) -> None:
        self.model, self.prompts, self.sampling = model, prompts, sampling
        self.verifiers, self.weights, self.batch_size = verifiers, weights, batch_size
        self.shape = model.latent_shape(sampling.height, sampling.width)
        process = model.process
        self.grid = process.grid(sampling.num_steps, sampling.sampler)
        self._empty = model.encode_prompts([sampling.negative_prompt])
        if sampling.clip_skip:
            model.encode_prompts([""], sampling.clip_skip)  # says how many layers there are
        self._encoded: dict[int, Conditioning] = {}
        wanted = (verifier.preview_log_snr for verifier in verifiers)
        self._of_runs = [one for one in verifiers if isinstance(one, Stability)]
        for one in self._of_runs:
            one.inverter = one.inverter.of(process)
        self._kept_levels = {one.partial_steps for one in self._of_runs}
        self._round_trips = list({one.round_trip: one for one in self._of_runs}.values())
        self._preview_steps = [None if snr is None else self._nearest_step(snr) for snr in wanted]
        self.ledger = Ledger()
        self.holds_inverse_fixed = False
        """Noise optimisation: whether e' counts as constant in the gradient of stability."""

    def cost(self, first: int, stop: int) -> int:
        """Returns the NFE of one sample's run from level `first` to `stop`, and of its scores."""
        return sum(map(self._rows, self._evaluated(first, stop))) + self._scoring_nfe(stop)

    def _scoring_nfe(self, stop: int) -> int:
        """Returns the network evaluations of a sample's scores at a level."""
        return sum(
            verifier.evaluations(stop) * (1 if verifier.guidance_scale == 1 else 2)
            for verifier in self._round_trips
        )

    def _evaluated(self, first: int, stop: int) -> list[int]:
        """Returns the steps whose timesteps the network is asked at; Heun asks ahead too."""
        steps = list(range(first, stop))
        if self.sampling.sampler == "heun":
            steps += [step + 1 for step in steps if step + 1 < self.grid.num_steps]
        return steps

    def _nearest_step(self, log_snr: float) -> int:
        distance = (self.model.process.schedule.log_snr[list(self.grid.timesteps)] - log_snr).abs()
        return int(distance.argmin())

    def _rows(self, step: int) -> int:
        return 2 if self.sampling.guidance.is_on(self.grid.timesteps[step]) else 1

    def run(self, trials: Sequence[tuple[int, Trial]]) -> Iterator[tuple[int, Result]]:
        """Runs (prompt index, trial) pairs; yields each one's place and result as a batch ends."""
        groups: dict[tuple[int, int, str], list[int]] = {}
        for place, (_, trial) in enumerate(trials):
            goal = (trial.first_step, trial.stop, trial.goal)
            groups.setdefault(goal, []).append(place)
        for _, places in sorted(groups.items()):
            for start in range(0, len(places), self.batch_size):
                chunk = places[start : start + self.batch_size]
                batch = [trials[place] for place in chunk]
                is_plain = batch[0][1].goal != "gradient"
                found = self._run_batch(batch) if is_plain else gradient_batch(self, batch)
                yield from zip(chunk, found, strict=True)

    @torch.no_grad()
    def rehearse(self, batch: Sequence[tuple[int, Trial]]) -> None:
        """Denoises and decodes without verifying or counting, for its time and memory alone."""
        before = replace(self.ledger)
        trials = [trial for _, trial in batch]
        conditions = self.conditions([prompt for prompt, _ in batch])
        state, _, _ = self._denoise(self._start(trials), trials[0].stop, conditions, trials)
        self.decode(state.x0)
        self.ledger = before

    def forget(self, prompt_index: int) -> None:
        """Drops the embedding of a prompt that is finished."""
        self._encoded.pop(prompt_index, None)

    def conditions(self, indices: Sequence[int]) -> Conditioning:
        """Returns the conditions of prompts, a row an index; encodes those that are new."""
        new = [index for index in dict.fromkeys(indices) if index not in self._encoded]
        if new:
            texts = [self.prompts[index] for index in new]
            encoded = self.model.encode_prompts(texts, self.sampling.clip_skip)
            for row, index in enumerate(new):
                self._encoded[index] = encoded[row : row + 1]
        return joined([self._encoded[index] for index in indices])

    @torch.no_grad()
    def _run_batch(self, batch: list[tuple[int, Trial]]) -> list[Result]:
        started_s = self.now_s()
        before = replace(self.ledger)
        trials = [trial for _, trial in batch]
        stop, goal = trials[0].stop, trials[0].goal
        start, conditions = self._start(trials), self.conditions([prompt for prompt, _ in batch])
        state, readings, levels = self._denoise(start, stop, conditions, trials)
        price = self.cost(trials[0].first_step, stop)
        if goal == "final" or len(self._of_runs) < len(self.verifiers):
            images = self.decode(state.x if goal == "final" else state.x0)
        else:
            images = state.x  # nobody looks at the preview
        prompts = [self.prompts[prompt] for prompt, _ in batch]
        scores = self._verify(images, prompts, readings, trials, conditions, levels)
        seconds = (self.now_s() - started_s) / len(batch)
        spent = (self.ledger - before).share(len(batch))
        results = []
        for row, trial in enumerate(trials):
            score = rounded(sum(w * scores[row][name] for name, w in self.weights.items()))
            kept = None if goal == "final" else slice_state(state, row)
            image = images[row].cpu() if goal == "final" else None
            outcome = Outcome(trial, score, price, kept, scores[row])
            results.append(Result(outcome, image, seconds, spent))
        return results

    def _start(self, trials: Sequence[Trial]) -> SampleState:
        device, states = self.model.device, []
        for trial in trials:
            start = trial.start
            if isinstance(start, Noise):
                states.append(SampleState(start.noise(self.shape)[None]))
            elif isinstance(start, Renoised):
                noise = Seeded(start.seed).noise(self.shape)[None]
                states.append(renoise(self.grid, start.state, start.step, noise))
            else:
                states.append(start)
        return join_states(states, device)

    def _denoise(
        self, state: SampleState, stop: int, conditions: Conditioning, trials: Sequence[Trial]
    ) -> tuple[SampleState, dict[int, Tensor], dict[int, Tensor]]:
        """Returns the state at `stop`; the readings of x0 that verifiers want, by step; and x, by
        level."""
        started_s = self.now_s()
        count, seeds = len(trials), [trial.seed for trial in trials]
        denoise = self.denoiser(conditions, self.sampling.guidance)
        first = state.step
        readings: dict[int, Tensor] = {}
        levels: dict[int, Tensor] = {}

        def keep_reading(reached: SampleState) -> None:
            if reached.step in self._kept_levels or reached.step == stop:
                levels[reached.step] = reached.x
            if reached.step - 1 in self._preview_steps and reached.x0 is not None:
                readings[reached.step - 1] = reached.x0

        state = run(
            self.sampling.sampler,
            denoise,
            self.grid,
            state,
            stop,
            self.sampling.eta,
            lambda step: step_noise(seeds, step, self.shape),
            keep_reading,
        )
        self._count_run(count, first, stop)
        self.ledger.denoising_s += self.now_s() - started_s
        return state, readings, levels

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

    def _verify(
        self,
        images: Tensor,
        prompts: Sequence[str],
        readings: dict[int, Tensor],
        trials: Sequence[Trial],
        conditions: Conditioning,
        levels: dict[int, Tensor],
    ) -> list[dict[str, float]]:
        previews = {step: self.decode(x0) for step, x0 in readings.items()}
        started_s = self.now_s()
        columns = {}
        inversions: dict[RoundTrip, Inversion] = {}
        for verifier, step in zip(self.verifiers, self._preview_steps, strict=True):
            seen = None if step is None else previews.get(step)
            if isinstance(verifier, Stability):
                trip = verifier.round_trip
                if trip not in inversions:
                    inversions[trip] = self._invert(verifier, trials[0].stop, conditions, levels)
                noise = torch.stack([trial.origin.noise(self.shape) for trial in trials])
                scores = verifier.score_inversion(noise, inversions[trip]).double().cpu()
            else:
                scores = checked_scores(verifier, images, prompts, seen)
            columns[verifier.name] = scores.tolist()
            self.ledger.verifier_calls += len(images)
        self.ledger.verifying_s += self.now_s() - started_s
        return [
            {name: column[row] for name, column in columns.items()} for row in range(len(images))
        ]

    def _invert(
        self, verifier: Stability, stop: int, conditions: Conditioning, levels: dict[int, Tensor]
    ) -> Inversion:
        """Inverts runs to `stop` by a verifier's round trip, and counts it."""
        level = verifier.level(stop)
        denoise = self.denoiser(conditions, Guidance(verifier.guidance_scale))
        found = verifier.invert(levels[level], level, denoise, self.grid)
        self._count_scores(verifier, len(found.x), stop)
        return found

    def gradient_cost(self) -> int:
        """Returns the NFE of a whole run with the gradient of its score."""
        whole = self.cost(0, self.grid.num_steps)
        return whole if self.holds_inverse_fixed else (1 + BACKWARD_NFE) * whole

    def now_s(self) -> float:
        """Returns the time when all work given so far is done."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def count(self, num_samples: int, first: int, stop: int, backward: bool) -> None:
        """Counts runs and their scores, and the rows that a gradient went back through."""
        before = self.ledger.conditional_rows + self.ledger.unconditional_rows
        self._count_run(num_samples, first, stop)
        for verifier in self._round_trips:
            self._count_scores(verifier, num_samples, stop)
        if backward:
            after = self.ledger.conditional_rows + self.ledger.unconditional_rows
            self.ledger.backward_rows += after - before

    def _count_run(self, num_samples: int, first: int, stop: int) -> None:
        plain = len(self._evaluated(first, stop))
        guided = sum(map(self._rows, self._evaluated(first, stop)))
        self.ledger.conditional_rows += num_samples * plain
        self.ledger.unconditional_rows += num_samples * (guided - plain)

    def _count_scores(self, verifier: Stability, num_samples: int, stop: int) -> None:
        rows = num_samples * verifier.evaluations(stop)
        self.ledger.conditional_rows += rows
        self.ledger.unconditional_rows += rows if verifier.guidance_scale != 1 else 0
