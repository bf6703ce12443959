"""`blackpoint search`: from a config to winners, candidates and the ledger in a folder.

candidates.jsonl   a row for every candidate, as it is scored
winners.jsonl      a row for every prompt: the winner, its plain image, what verifiers say, NFE
images/            the winners, contact sheets from first to best, what no seed re-makes
ledger.json        what was spent: UNet rows, decodes, verifier calls, seconds; number formats
hacking.json       what changed from the plain images to the winners
best_of_n.json     the search beside best-of-N at its cost, where it has a calibration or a target
search.json        the settings; another search is refused in the same folder
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.prompts.prompt_set import Prompt, read_prompt_set
from blackpoint.sampling.runtime.memory import memory_line
from blackpoint.sampling.runtime.precision import FORMATS, kept_formats, settled_formats
from blackpoint.sampling.runtime.sharing import (
    PARTS,
    own_folder,
    share_of,
    telling_stop,
    wait_until,
)
from blackpoint.sampling.runtime.tasks import Task, this_task
from blackpoint.sampling.sample import find_device
from blackpoint.sampling.samplers import SAMPLERS
from blackpoint.sampling.search import calibration
from blackpoint.sampling.search.algorithms.random_search import RandomSearchConfig, random_search
from blackpoint.sampling.search.config import SearchConfig, highest_score
from blackpoint.sampling.search.costs import costs_line, costs_text
from blackpoint.sampling.search.driver import SearchProgress, check_budget, drive
from blackpoint.sampling.search.folder import (
    CHECKPOINT_DIGEST,
    HACKING,
    SETTINGS,
    WINNERS,
    check_checkpoint,
    check_folder,
    continued,
    decoder_note,
    formats_of,
    is_raised,
    keep_ledger,
    reopen,
    spent_in,
    spent_on,
)
from blackpoint.sampling.search.journal import ROWS, STATES, Journal, join_rows, read_rows
from blackpoint.sampling.search.judge import alarms, extractor, send_tables, with_judge
from blackpoint.sampling.search.problem import Correlation, Outcome, Problem
from blackpoint.sampling.search.runner import TrialRunner
from blackpoint.sampling.search.setup import load, make_problem, note, planned, rank_values
from blackpoint.sampling.search.winners import BASELINE, BESTS, Winners, read_winners
from blackpoint.sampling.statistics.best_of_n import HOW, Rows, comparison, table_of

BASELINES, BEST_OF_N = "baselines", "best_of_n.json"


def search_to_folder(config: SearchConfig, task: Task | None = None) -> tuple[Path, list[str]]:
    """Searches every prompt; continues an earlier start.

    Returns the folder and lines about it. Of several processes each searches its share
    of the prompts, and the first waits for the others and joins what they have found.
    """
    task, since = task or this_task(), time.time() - 1
    output = Path(config.output)
    config = continued(config, output)
    prompts = {prompt.index: prompt for prompt in prompts_of(config, task)}
    config = with_judge(config, (prompt.text for prompt in prompts.values()), output)
    settings = check_folder(config, output, prompts.values())
    with telling_stop(output, task):
        done = {} if is_raised(output, config.budget_nfe) else read_winners(output)
        if mine := [index for index in share_of(list(prompts), task) if index not in done]:
            search_prompts(config, settings, prompts, mine, task, since)
    if task.rank > 0:
        return output, []
    if (output / HACKING).is_file():
        return output, []
    wait_until(lambda: read_winners(output).keys() >= prompts.keys(), output, since)
    return output, join(config, output)


def prompts_of(config: SearchConfig, task: Task) -> list[Prompt]:
    """Reads the prompts; raises UserError where a verifier of sets has several processes."""
    for name, verifier in config.verifiers.items():
        if verifier.declared.needs == "set" and task.count > 1:
            raise UserError(
                f"verifiers.{name}: kind={verifier.kind} scores a set that grows with every "
                f"winner, so one prompt waits for the other; start one process, not {task.count}"
            )
    return read_prompt_set(config.prompts, config.limit, config.offset)


def search_prompts(
    config: SearchConfig,
    settings: dict[str, Any],
    prompts: dict[int, Prompt],
    mine: Sequence[int],
    task: Task,
    since: float,
) -> None:
    """Searches the prompts of this process."""
    output, device = Path(config.output), find_device(config.device, task)
    config, record = begin(config, settings, device)
    texts = {index: prompt.text for index, prompt in prompts.items()}
    loaded = load(config, texts, task)
    runner = loaded.runner
    record[CHECKPOINT_DIGEST] = digest = runner.model.digest()
    check_checkpoint(config, output, digest)
    problem = make_problem(config, runner, mine[0], None)
    check_budget(problem, config.declared.least_nfe(problem, config.settings))
    if task.rank == 0:
        parts, device = runner.model.loaded_parts(), runner.model.device
        costs = costs_line(
            planned(config, lambda steps: runner.in_steps(steps).costs), len(prompts)
        )
        note(f"{costs}; {memory_line(parts, device, config.batch_size)}")
    extractor(config.diversity.checkpoint, config.diversity.module)
    if is_raised(output, config.budget_nfe):
        reopen(output, config.budget_nfe)
    write_whole(output / SETTINGS, json.dumps(record, indent=1) + "\n")  # from here on it is begun
    if not config.batch_size:
        runner.batch_size = calibration.find_batch_size(runner, mine[0])
    kendall = calibrated(config, runner, list(prompts), task, since)
    formats = {name: getattr(config, name) for name in FORMATS}
    about = {"algorithm": config.algorithm, "device": device.type, **formats}
    has_noise_in_steps = SAMPLERS[config.sampler].fresh_noise(config.eta)
    part = own_folder(output, task)
    with closing(Journal(output, part, mine)) as journal:  # locks it
        done = read_winners(output)  # by another start of this process, which had the lock
        if not (mine := [index for index in mine if index not in done]):
            return
        winners = Winners(
            output,
            part,
            prompts,
            settings | formats,
            runner.draw,
            config.declared.is_reproducible and not has_noise_in_steps,
            loaded.held_out,
            loaded.oracles,
        )
        winners.plain = baselines(config, runner, winners, mine, task)
        runner.previews_every = config.previews.every
        beside = spent_in(output / calibration.FOLDER, own_folder(output / BASELINES, task))
        progress = SearchProgress(
            len(mine),
            config.budget_nfe,
            lambda: keep_ledger(part, journal.spent, beside, formats_of([about])),
        )
        with progress.bar:
            drive(
                runner,
                journal,
                (make_problem(config, runner, index, kendall) for index in mine),
                lambda problem: config.declared.start(problem, config.settings),
                about=lambda index: {"prompt": texts[index], **about},
                on_image=winners.keep,
                has_image=winners.has_image,
                on_result=winners.keep_previews,
                on_turn=progress.tell,
                on_done=winners.finish,
                one_by_one=bool(loaded.oracles),
            )


def begin(
    config: SearchConfig, settings: dict[str, Any], device: torch.device
) -> tuple[SearchConfig, dict[str, Any]]:
    """Settles the number formats on the device; returns the config and settings with them.

    Raises UserError where the folder was begun in others.
    """
    path = Path(config.output) / SETTINGS
    kept, is_recorded = kept_formats(path)
    asked = {name: getattr(config, name) for name in FORMATS}
    formats = settled_formats(asked, path, device, note)
    if text := decoder_note(config, path.parent):
        note(text)
    record = settings | formats
    if kept is not None and not is_recorded:  # as every process saw it
        del record["tf32"]
    return replace(config, **formats), record


def calibrated(
    config: SearchConfig, runner: TrialRunner, prompts: list[int], task: Task, since: float
) -> dict[int, Correlation] | None:
    """Has the first process measure how early scores rank, where the algorithm looks at them."""
    output = Path(config.output)
    if config.declared.calibration is None:
        return None

    def values(rows: Sequence[Mapping[str, Any]]) -> list[float]:
        if len(config.verifiers) == 1:
            return [row["score"] for row in rows]
        return rank_values(config, [row["scores"] for row in rows])

    if task.rank == 0:
        calibration.calibrate(
            config.declared, config.settings, runner, prompts, config.seed, output, values
        )
    else:
        wait_until(lambda: calibration.is_calibrated(output), output, since)
    return calibration.read_kendall(output)


def baselines(
    config: SearchConfig, runner: TrialRunner, winners: Winners, mine: Sequence[int], task: Task
) -> dict[int, Outcome]:
    """Generates the plain images for held-out verifiers where the algorithm generates none; beside
    tilted runs always."""
    if config.declared.has_plain_first or not (config.held_out or runner.tilt):
        return {}
    tilt, folder = runner.tilt_steps(None), Path(config.output) / BASELINES
    price = runner.cost(0, config.num_steps)
    problems = (Problem(index, config.seed, runner.grid, runner.cost, price) for index in mine)
    with closing(Journal(folder, own_folder(folder, task), mine)) as journal:
        searches = drive(
            runner,
            journal,
            problems,
            partial(random_search, config=RandomSearchConfig()),  # as others draw their first
            on_image=partial(winners.keep, name=BASELINE),
            needs_winner=False,
        )
    runner.tilt_steps(tilt)
    return {s.problem.prompt_index: s.best for s in searches if s.best is not None}


def join(config: SearchConfig, output: Path) -> list[str]:
    """Joins the files of the processes, reports the results, and clears up."""
    candidates = join_rows(output, ROWS, ("prompt_index", "candidate"))
    rows = join_rows(output, WINNERS, ("prompt_index",))
    beside = spent_in(output / calibration.FOLDER, output / BASELINES)
    spent = spent_on(candidates)
    keep_ledger(output, spent, beside, formats_of(candidates))
    results = alarms(rows, config.diversity, output)
    send_tables(config.wandb, output, rows, results)
    for name in (STATES, BESTS, PARTS):
        shutil.rmtree(output / name, ignore_errors=True)
    lines = beside_best_of_n(config, output, candidates, rows)
    content = [asdict(alarm) | {"raised": alarm.raised} for alarm in results]
    write_whole(output / HACKING, json.dumps(content, indent=1) + "\n")  # last: it says done
    costs = f"{config.algorithm}, per prompt: {costs_text(spent.to_row(), len(rows))}"
    return [costs, *lines, *(line for alarm in results for line in alarm.lines)]


def beside_best_of_n(
    config: SearchConfig, output: Path, candidates: Rows, winners: Rows
) -> list[str]:
    """Keeps and returns what the calibration found, and the search beside best-of-N."""
    notes, calibrated = [], []
    if (about := config.declared.calibration) and calibration.is_calibrated(output):
        kendall = calibration.read_kendall(output)
        choice = about.choice(config.settings, config.num_steps, kendall)
        notes.append(calibration.calibration_line(choice, config.num_steps, kendall))
        calibrated = read_rows(output / calibration.FOLDER / ROWS, repair=False)
    lines = []
    if len(config.verifiers) == 1 or config.ensemble == "weighted_sum":  # else it is a rank's
        told = (config.target, highest_score(config))
        lines = comparison(config.algorithm, winners, candidates, calibrated, *told)
    if len(lines) > 1:
        notes.append(HOW["calibration" if calibrated else "own"])
    if notes or lines:
        content = {"notes": notes, "lines": lines}
        write_whole(output / BEST_OF_N, json.dumps(content, indent=1) + "\n")
    return [*notes, *([f"\n{table_of(lines).text()}"] if lines else [])]
