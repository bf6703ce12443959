"""`blackpoint search`: from a config to winners, candidates and the ledger in a folder.

candidates.jsonl   a row for every candidate, as it is scored
winners.jsonl      a row for every prompt: the winner, what verifiers say of it, its NFE
images/            the winners, contact sheets from first to best, noises that no seed re-makes
ledger.json        what was spent: UNet rows, decodes, verifier calls, seconds
search.json        the settings; another search is refused in the same folder
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from sampling.errors import UserError
from sampling.guidance import Guidance
from sampling.model import DiffusionModel
from sampling.prompts import Prompt, read_prompt_set
from sampling.sample import find_device
from sampling.search.config import SearchConfig
from sampling.search.fk_steering import fk_steering
from sampling.search.halving import halving, measured_kendall, pruning_levels, walk
from sampling.search.journal import Journal
from sampling.search.ledger import Ledger
from sampling.search.paths import paths
from sampling.search.random_search import random_search
from sampling.search.runner import SearchSampling, TrialRunner
from sampling.search.search import MakeSearch, PromptSearch, check_budget, drive, open_search
from sampling.search.trial import Outcome, Problem, Ranking, by_score
from sampling.search.winners import WINNERS, Winners, read_winners
from sampling.search.zero_order import zero_order
from sampling.speed import check_dtype
from sampling.verifiers.ensemble import combined
from sampling.verifiers.load import load_verifier
from sampling.verifiers.verifier import Verifier, checked_scores
from sampling.whole_file import write_whole

SETTINGS, LEDGER, CALIBRATION = "search.json", "ledger.json", "calibration"
FREE = ("output", "batch_size", "device")  # keys that change no choice


def search_to_folder(config: SearchConfig) -> Path:
    """Searches every prompt and returns the folder; continues what an earlier start has left."""
    output = Path(config.output)
    settings = check_folder(config, output)
    prompts = read_prompt_set(config.prompts, config.limit, config.offset)
    done = read_winners(output)
    if len(done) == len(prompts):
        return output
    runner, held_out = prepare(config, prompts)
    check_budget(make_problem(config, runner, 0))  # before anything is written or measured
    write_whole(output / SETTINGS, json.dumps(settings, indent=1) + "\n")
    make = algorithm(config, kendall_of(config, runner, output))
    winners = Winners(output, runner.prompts, settings, runner.shape)
    reproducible = config.algorithm in ("random", "zero_order", "halving") and not (
        config.sampler == "euler_ancestral" or (config.eta or 0) > 0
    )
    journal = Journal(output)
    columns = (
        TextColumn("searching"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    before = _read_ledger(output)
    with Progress(*columns) as progress, (output / WINNERS).open("a", encoding="utf-8") as file:
        total = len(prompts) - len(done)
        task = progress.add_task("search", total=total * config.budget_nfe, state="")

        def tell(turn: list[PromptSearch]) -> None:
            active = [one for one in turn if not one.is_done]
            spent = sum(one.spent_nfe for one in active)
            bests = [one.best.score for one in active if one.best is not None]
            best = f"best so far {max(bests):.4f}, " if bests else ""
            left = sum(one.problem.budget_nfe - one.spent_nfe for one in active)
            progress.update(task, completed=progress_base + spent, state=f"{best}{left} NFE left")
            ledger = (before + runner.ledger).to_row()
            write_whole(output / LEDGER, json.dumps(ledger, indent=1) + "\n")

        progress_base = 0

        def finish(one: PromptSearch) -> None:
            nonlocal progress_base
            row, image = winners.finish(one, reproducible)
            prompt = prompts[one.problem.prompt_index]
            row |= {"category": prompt.category, "held_out": judge(held_out, image, prompt.text)}
            file.write(json.dumps(row) + "\n")
            file.flush()
            winners.forget(one)
            progress_base += config.budget_nfe

        searches = (
            open_search(make_problem(config, runner, index), make)
            for index in range(len(prompts))
            if index not in done
        )
        try:
            drive(
                runner,
                journal,
                searches,
                about=lambda index: {"algorithm": config.algorithm, "prompt": prompts[index].text},
                on_image=winners.keep,
                on_turn=tell,
                on_done=finish,
            )
        finally:
            journal.close()
    return output


def prepare(
    config: SearchConfig, prompts: Sequence[Prompt]
) -> tuple[TrialRunner, dict[str, Verifier]]:
    """Loads the model and all verifiers; returns the runner and the held-out verifiers."""
    device = find_device(config.device)
    dtype = getattr(torch, config.dtype)
    check_dtype(device, dtype)
    verifiers, held_out = (
        {
            name: load_verifier(dataclasses.replace(each, name=name), device)
            for name, each in group.items()
        }
        for group in (config.verifiers, config.held_out)
    )
    model = DiffusionModel.load(config.checkpoint, device, dtype, config.weights)
    model.process.check_sound()
    sampling = SearchSampling(
        config.num_steps,
        Guidance(config.guidance_scale, config.guidance_rescale),
        config.sampler,
        config.eta,
        config.height,
        config.width,
        config.negative_prompt,
    )
    weights = {name: config.verifiers[name].weight for name in verifiers}
    weights = weights if len(weights) > 1 else dict.fromkeys(weights, 1.0)
    texts = [prompt.text for prompt in prompts]
    runner = TrialRunner(
        model, texts, sampling, list(verifiers.values()), weights, config.batch_size
    )
    return runner, held_out


def make_problem(config: SearchConfig, runner: TrialRunner, index: int) -> Problem:
    """Returns the search problem of one prompt."""
    ranking = ranking_of(config)
    return Problem(index, config.seed, runner.grid, runner.cost, config.budget_nfe, ranking)


def ranking_of(config: SearchConfig) -> Ranking:
    """Returns how candidates are compared: by the one verifier, or by the ensemble's rule."""
    if len(config.verifiers) == 1:
        return by_score
    weights = [each.weight for each in config.verifiers.values()]

    def rank(outcomes: Sequence[Outcome]) -> list[float]:
        scores = [[outcome.scores[name] for name in config.verifiers] for outcome in outcomes]
        return combined(torch.tensor(scores).double(), config.ensemble, weights).tolist()

    return rank


def algorithm(config: SearchConfig, kendall: dict[int, float] | None) -> MakeSearch:
    """Returns the algorithm with its settings."""
    match config.algorithm:
        case "random":
            return lambda problem: random_search(problem, config.random)
        case "zero_order":
            return lambda problem: zero_order(problem, config.zero_order)
        case "paths":
            return lambda problem: paths(problem, config.paths)
        case "halving":
            return lambda problem: halving(problem, config.halving, kendall)
        case "fk_steering":
            return lambda problem: fk_steering(problem, config.fk_steering)


def kendall_of(config: SearchConfig, runner: TrialRunner, output: Path) -> dict[int, float] | None:
    """Measures, for halving, how well previews rank candidates, and prints what it found.

    The runs have seeds of their own and are in output/calibration; they count in no budget.
    """
    if config.algorithm != "halving":
        return None
    own, steps = config.halving, runner.grid.num_steps
    levels = pruning_levels(own, steps, None)
    cost = runner.cost(0, steps)
    journal = Journal(output / CALIBRATION)
    problems = (
        Problem(index, config.seed + 1, runner.grid, runner.cost, cost * own.calibration_candidates)
        for index in range(min(own.calibration_prompts, len(runner.prompts)))
    )
    try:
        drive(
            runner,
            journal,
            (
                open_search(problem, lambda p: walk(p, levels, own.calibration_candidates, 1.0))
                for problem in problems
            ),
        )
        kendall = measured_kendall(journal.rows.values())
    finally:
        journal.close()
    allowed = pruning_levels(own, steps, kendall)
    shown = ", ".join(f"{kendall.get(level, float('nan')):.2f} after {level}" for level in levels)
    print(f"Kendall's tau of preview and final score: {shown} of {steps} steps; prunes {allowed}")
    return kendall


def judge(held_out: dict[str, Verifier], image: Tensor, prompt: str) -> dict[str, float]:
    """Returns what verifiers that were not searched with say of a winner."""
    return {
        name: checked_scores(verifier, image[None], [prompt]).item()
        for name, verifier in held_out.items()
    }


def check_folder(config: SearchConfig, output: Path) -> dict[str, Any]:
    """Returns the settings to be kept; raises UserError where `output` holds something else."""
    settings = {key: value for key, value in asdict(config).items() if key not in FREE}
    path = output / SETTINGS
    if not path.is_file():
        if output.is_file() or (output.is_dir() and any(output.iterdir())):
            raise UserError(f"output={output} holds something that is no search; name a new folder")
        return settings
    saved = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(settings))
    differing = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key))
    if differing:
        key = differing[0]
        raise UserError(
            f"output={output} holds a search with other settings ({key}: {saved.get(key)} there, "
            f"{now.get(key)} now); choose another output, or continue it with its own"
        )
    return settings


def _read_ledger(output: Path) -> Ledger:
    path = output / LEDGER
    if not path.is_file():
        return Ledger()
    row = json.loads(path.read_text(encoding="utf-8"))
    row.pop("nfe")
    return Ledger(**row)
