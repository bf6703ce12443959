"""`blackpoint search`: from a config to winners, candidates and the ledger in a folder.

candidates.jsonl   a row for every candidate, as it is scored
winners.jsonl      a row for every prompt: the winner, its plain image, what verifiers say, NFE
images/            the winners, contact sheets from first to best, what no seed re-makes
ledger.json        what was spent: UNet rows, decodes, verifier calls, seconds; number formats
hacking.json       what changed from the plain images to the winners
search.json        the settings; another search is refused in the same folder
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.plain import recorded
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.prompts.prompt_set import Prompt, read_prompt_set
from blackpoint.sampling.runtime.sharing import (
    forget_stop,
    own_folder,
    remove_parts,
    share_of,
    tell_stop,
    wait_until,
)
from blackpoint.sampling.runtime.tasks import Task, this_task
from blackpoint.sampling.sample import find_device
from blackpoint.sampling.search.algorithms.halving import pruning_levels, scores_of, spent
from blackpoint.sampling.search.algorithms.random_search import random_search
from blackpoint.sampling.search.batch_size import find_batch_size
from blackpoint.sampling.search.calibration import FOLDER as CALIBRATION
from blackpoint.sampling.search.calibration import (
    calibrate,
    calibration_line,
    is_calibrated,
    read_kendall,
)
from blackpoint.sampling.search.config import WHOLE, SearchConfig
from blackpoint.sampling.search.folder import (
    SETTINGS,
    check_folder,
    decoder_note,
    formats_of,
    keep_ledger,
    kept_formats,
    settled_formats,
    spent_in,
    spent_on,
)
from blackpoint.sampling.search.journal import (
    ROWS,
    STATES,
    FolderInUse,
    Journal,
    join_rows,
    read_rows,
)
from blackpoint.sampling.search.judge import HACKING, alarms, extractor, judge
from blackpoint.sampling.search.progress import SearchProgress
from blackpoint.sampling.search.search import PromptSearch, check_budget, drive, open_search
from blackpoint.sampling.search.setup import (
    Loaded,
    algorithm,
    is_reproducible,
    load,
    make_problem,
    note,
    rank_values,
)
from blackpoint.sampling.search.tables import send_tables
from blackpoint.sampling.search.trial import Outcome, Problem
from blackpoint.sampling.search.winners import BESTS, WINNERS, Winners, read_winners

BASELINES = "baselines"
PLAIN_FIRST = (*WHOLE, "noise_optimisation")
"""Algorithms whose first candidate is the plain image of its seed."""


def search_to_folder(
    config: SearchConfig, task: Task | None = None, since: float | None = None
) -> tuple[Path, list[str]]:
    """Searches every prompt; continues what an earlier start has left.

    since: time from which another process's word that it has stopped counts; that of the call if
    not given. Of several searches in a row, where a process may be ahead, that of the first.

    Returns the folder and what there is to say of it. Of several processes each searches its share
    of the prompts, and the first waits for the others and joins what they have found.
    """
    task, since = task or this_task(), since or time.time() - 1
    output = Path(config.output)
    prompts = {prompt.index: prompt for prompt in prompts_of(config, task)}
    settings = check_folder(config, output, prompts.values())
    done = read_winners(output)
    lines: list[str] = []
    forget_stop(output, task)
    try:
        mine = [index for index in share_of(list(prompts), task) if index not in done]
        if mine:
            lines = search_prompts(config, settings, prompts, mine, task, since)
    except FolderInUse:
        raise
    except Exception as error:
        tell_stop(output, task, str(error) or type(error).__name__)
        raise
    if task.rank > 0:
        return output, []
    if not (output / HACKING).is_file():
        wait_until(lambda: read_winners(output).keys() >= prompts.keys(), output, since)
        lines += join(config, output)
    return output, lines


def prompts_of(config: SearchConfig, task: Task) -> list[Prompt]:
    """Reads the prompts; raises UserError where a verifier of sets has several processes."""
    names = [name for name, each in config.verifiers.items() if each.kind == "oracle"]
    if names and task.count > 1:
        raise UserError(
            f"verifiers.{names[0]}: kind=oracle scores a set that grows with every winner, so one "
            f"prompt waits for the other; start one process, not {task.count}"
        )
    return read_prompt_set(config.prompts, config.limit, config.offset)


def search_prompts(
    config: SearchConfig,
    settings: dict[str, Any],
    prompts: dict[int, Prompt],
    mine: Sequence[int],
    task: Task,
    since: float,
) -> list[str]:
    """Searches the prompts of this process; returns what there is to say."""
    output = Path(config.output)
    device = find_device(config.device, task)
    kept, is_recorded = kept_formats(output / SETTINGS)
    asked = {"dtype": config.dtype, "tf32": config.tf32}
    formats = settled_formats(asked, output / SETTINGS, device, note)
    config = replace(config, dtype=formats["dtype"], tf32=formats["tf32"])
    settings = settings | formats
    if text := decoder_note(config, output):
        note(text)
    about_device = {"device": device.type, **formats}
    own = own_folder(output, task)
    texts = {index: prompt.text for index, prompt in prompts.items()}
    loaded = load(config, texts, task)
    runner = loaded.runner
    problem = make_problem(config, runner, mine[0])  # before anything is written or measured
    check_budget(problem, least_nfe(config, problem))
    extractor(config.diversity.checkpoint, config.diversity.module)
    unrecorded = (
        ("tf32",) if kept is not None and not is_recorded else ()
    )  # as all processes saw it
    record = {key: value for key, value in settings.items() if key not in unrecorded}
    write_whole(output / SETTINGS, json.dumps(record, indent=1) + "\n")
    if not config.batch_size:
        runner.batch_size = find_batch_size(runner, mine[0])
    kendall, lines = None, []
    if config.algorithm == "halving":
        if task.rank == 0:
            kendall = calibrate(
                config.halving,
                runner,
                list(prompts),
                config.seed,
                output,
                scores_of
                if len(config.verifiers) == 1
                else lambda rows: rank_values(config, [row["scores"] for row in rows]),
            )
        else:
            wait_until(lambda: is_calibrated(output), output, since)
            kendall = read_kendall(output)
        lines = [calibration_line(config.halving, config.num_steps, kendall)]
    winners = Winners(output, texts, settings, runner.shape)
    for oracle in loaded.oracles:
        for row in read_winners(output).values():
            oracle.keep(winners.picture(row))
    plain = baselines(config, loaded, winners, mine, task)
    beside = spent_in(output / CALIBRATION, own_folder(output / BASELINES, task))
    make = algorithm(config, kendall)
    journal = Journal(output, own, mine)
    if (own / WINNERS).is_file():
        read_rows(own / WINNERS)  # a torn last line is cut off before the next is written
    with SearchProgress(len(mine), config.budget_nfe) as progress:
        file = (own / WINNERS).open("a", encoding="utf-8")

        def finish(one: PromptSearch) -> None:
            prompt = prompts[one.problem.prompt_index]
            row, image = winners.finish(one, is_reproducible(config))
            for oracle in loaded.oracles:
                oracle.keep(winners.picture(row))
            pictures, first = [image], plain.get(prompt.index) or first_of(one)
            baseline = winners.baseline(one) if first else None
            if baseline is not None:
                pictures.append(baseline)
            held_out = judge(loaded.held_out, pictures, prompt.text)
            row |= {"category": prompt.category, "held_out": held_out[0], "baseline": None}
            if first is not None and baseline is not None:
                row["baseline"] = {
                    "seed": first.trial.seed,
                    "scores": recorded(first.scores),
                    "held_out": held_out[1],
                    "image": winners.save_baseline(one, baseline),
                }
            file.write(json.dumps(row) + "\n")
            file.flush()
            winners.forget(one)
            assert one.best is not None
            one.finals = [one.best]  # the states of the others are of no more use

        def tell(turn: list[PromptSearch]) -> None:
            progress.tell(turn)
            if progress.is_due():
                keep_ledger(own, journal.spent, beside, about_device)

        try:
            drive(
                runner,
                journal,
                (open_search(make_problem(config, runner, index), make) for index in mine),
                about=lambda index: {
                    "algorithm": config.algorithm,
                    "prompt": texts[index],
                    **about_device,
                },
                on_image=winners.keep,
                on_turn=tell,
                on_done=finish,
                one_by_one=bool(loaded.oracles),
            )
        finally:
            file.close()
            journal.close()
    return lines


def least_nfe(config: SearchConfig, problem: Problem) -> int | None:
    """Returns the NFE of one image where it is more than a whole run's, else None."""
    if config.algorithm != "halving":
        return None
    levels = pruning_levels(config.halving, config.num_steps, None)
    return spent(problem, levels, config.halving.keep, 1)


def baselines(
    config: SearchConfig, loaded: Loaded, winners: Winners, mine: Sequence[int], task: Task
) -> dict[int, Outcome]:
    """Paints the plain image of each prompt where the algorithm has none and somebody judges it."""
    if config.algorithm in PLAIN_FIRST or not config.held_out:
        return {}
    runner, folder = loaded.runner, Path(config.output) / BASELINES
    found: dict[int, Outcome] = {}

    def take(one: PromptSearch) -> None:
        if one.best is not None:
            found[one.problem.prompt_index] = one.best

    def plain(index: int) -> Problem:
        return Problem(
            index, config.seed, runner.grid, runner.cost, runner.cost(0, config.num_steps)
        )

    journal = Journal(folder, own_folder(folder, task), mine)
    try:
        drive(
            runner,
            journal,
            (
                open_search(plain(i), lambda problem: random_search(problem, config.random))
                for i in mine
            ),
            on_image=winners.keep_baseline,
            on_done=take,
            needs_winner=False,
        )
    finally:
        journal.close()
    return found


def first_of(one: PromptSearch) -> Outcome | None:
    """Returns the first candidate where it is a whole image with a score."""
    return next((each for each in one.finals if each.trial.candidate == 0), None)


def join(config: SearchConfig, output: Path) -> list[str]:
    """Joins what the processes have written, tells what came out, and clears up."""
    candidates = join_rows(output, ROWS, lambda row: (row["prompt_index"], row["candidate"]))
    rows = join_rows(output, WINNERS, lambda row: row["prompt_index"])
    beside = spent_in(output / CALIBRATION, output / BASELINES)
    keep_ledger(output, spent_on(candidates), beside, formats_of(candidates))
    found = alarms(rows, config.diversity, output)
    send_tables(config.wandb, output, rows, found)
    remove_parts(output)
    for name in (STATES, BESTS):
        shutil.rmtree(output / name, ignore_errors=True)
    content = [asdict(alarm) | {"raised": alarm.raised} for alarm in found]
    write_whole(output / HACKING, json.dumps(content, indent=1) + "\n")  # last: it says done
    return [line for alarm in found for line in alarm.lines]
