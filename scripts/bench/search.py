"""Search in the benchmark: against the UNet calls alone, and against a loop over a pipeline.

All run the same candidates: prompts, seeds, steps, guidance, the luminance verifier. The bare
contestant calls the UNet on both branches of guidance, as many rows at once as the search. The loop
is what people write around diffusers: StableDiffusionPipeline, one candidate after the other. Ours
is a whole `blackpoint search`, from the loaded model to its folder. Before the clock starts the
winners of both are compared: they must be the same.
"""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from blackpoint.data.files.errors import RunFailed
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.options import SamplingOptions
from blackpoint.sampling.prompts.prompt_set import Prompt
from blackpoint.sampling.search.algorithms.random_search import RandomSearchConfig, random_search
from blackpoint.sampling.search.driver import drive
from blackpoint.sampling.search.journal import Journal
from blackpoint.sampling.search.problem import Problem
from blackpoint.sampling.search.runner import TrialRunner
from blackpoint.sampling.search.winners import Winners
from blackpoint.sampling.verifiers.load import VerifierConfig, load_verifier
from blackpoint.sampling.verifiers.verifier import of_images
from blackpoint.scripts.bench.sampling import GUIDANCE, pipeline_of
from blackpoint.scripts.bench.timing import Row, Seconds, ratio_row, row, time_round
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.target_process import fine_tuned_process

UNET, SEARCH, LOOP = "unet_calls", "search", "pipeline_loop"
NAMES = {
    UNET: "UNet calls alone, a batch of candidates at once",
    SEARCH: "our search, with prompts, decode, verifier and files",
    LOOP: "a loop over diffusers' pipeline, a candidate at a time",
}
SEED = 0


def contestants(
    config: TrainConfig, folder: Path, num_candidates: int, num_steps: int
) -> dict[str, Callable[[], dict[int, int]]]:
    """Returns what is timed by name; each returns the winning seed of every prompt."""
    model = DiffusionModel.load(str(config.checkpoint))
    model.process = fine_tuned_process(config, model.process)
    pipeline = pipeline_of(model)
    pipeline.unet = copy.deepcopy(model.unet)  # as diffusers loads it
    model.unet.to(memory_format=torch.channels_last)
    prompts = dict(enumerate(config.preview.prompts[:2]))
    batch_size = num_candidates
    dark = load_verifier(VerifierConfig("luminance", target=0.0), model.device)
    verifier = of_images({"dark": dark})["dark"]
    sampling = SamplingOptions(
        num_steps=num_steps,
        guidance_scale=GUIDANCE.scale,
        guidance_rescale=GUIDANCE.rescale,
    )
    budget = 2 * num_steps * num_candidates

    def search() -> dict[int, int]:
        shutil.rmtree(folder, ignore_errors=True)
        runner = TrialRunner(model, prompts, sampling, [verifier], {verifier.name: 1.0}, batch_size)
        texts = {index: Prompt(text) for index, text in prompts.items()}
        journal = Journal(folder)
        winners = Winners(folder, folder, texts, {}, runner.draw, True, {})
        problems = [Problem(index, SEED, runner.grid, runner.cost, budget) for index in prompts]
        searches = drive(
            runner,
            journal,
            problems,
            lambda problem: random_search(problem, RandomSearchConfig()),
            on_image=winners.keep,
            on_done=winners.finish,
        )
        journal.close()
        return {done.problem.prompt_index: done.best.trial.seed for done in searches if done.best}

    shape = model.latent_shape()
    rows = torch.randn(2 * batch_size, *shape).to(memory_format=torch.channels_last)
    both = model.encode_prompts([prompts[0]] * 2 * batch_size).prompt_embeds
    timesteps = model.process.timesteps(num_steps)

    @torch.no_grad()
    def unet_calls() -> dict[int, int]:
        for _ in prompts:
            for t in timesteps:
                model.unet(rows, torch.full((2 * batch_size,), t), both, return_dict=False)
        return {}

    def loop() -> dict[int, int]:
        best: dict[int, tuple[float, int]] = {}
        for index, prompt in prompts.items():
            problem = Problem(index, SEED, None, None, budget)  # type: ignore[arg-type]
            for number in range(num_candidates):
                seed = problem.draw_seed("candidate", number)
                image = pipeline(
                    prompt,
                    num_inference_steps=num_steps,
                    guidance_scale=GUIDANCE.scale,
                    guidance_rescale=GUIDANCE.rescale,
                    generator=torch.Generator("cpu").manual_seed(seed),
                    output_type="pt",
                ).images
                score = verifier.score(image, [prompt]).item()
                best[index] = max(best.get(index, (-2.0, 0)), (score, seed))
        return {index: seed for index, (_, seed) in best.items()}

    return {UNET: unet_calls, SEARCH: search, LOOP: loop}


def time_search(
    config: TrainConfig, folder: Path, num_candidates: int, num_steps: int, rounds: int
) -> Seconds:
    """Returns the seconds of each contestant, one per round; raises RunFailed if winners differ."""
    parts = contestants(config, folder / "search", num_candidates, num_steps)
    ours, theirs = parts[SEARCH](), parts[LOOP]()
    if ours != theirs:
        raise RunFailed(
            f"our winners are the seeds {ours}, those of the loop over the pipeline {theirs}: they "
            "are not the same work, so there is nothing to compare"
        )
    seconds: Seconds = {}
    for number in range(rounds):
        time_round(parts, number, seconds)
    return seconds


def search_rows(seconds: Seconds, num_candidates: int) -> list[Row]:
    """Returns seconds per candidate of all, and how the search compares."""
    group, count = "search over noise", 2 * num_candidates
    rows = [
        row(group, text, "s/candidate", [s / count for s in seconds[name]])
        for name, text in NAMES.items()
    ]
    speed = "candidates per second of ours / of "
    rows.append(
        ratio_row(group, speed + "the UNet calls", seconds[UNET], seconds[SEARCH], at_least=0.95)
    )
    rows.append(ratio_row(group, speed + "the loop", seconds[LOOP], seconds[SEARCH], at_least=3.0))
    return rows
