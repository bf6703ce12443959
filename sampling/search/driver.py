"""The driver: walks the searches of many prompts side by side, from their records or by running.

Every prompt has an algorithm (a generator, sampling/search/trial.py). In each turn the trials that
all open prompts ask for are gathered; those that candidates.jsonl knows are answered from there,
the rest is run together. Winners are the best final candidates, ties going to the lower number;
what is not a finite score is rejected and counted.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.search.journal import Journal
from blackpoint.sampling.search.problem import Outcome, Problem, Result, Search, Trial, by_score
from blackpoint.sampling.search.runner import TrialRunner

MakeSearch = Callable[[Problem], Search]
EVERY_S = 5.0


@dataclass
class PromptSearch:
    """One prompt's search as it stands."""

    problem: Problem
    search: Search
    pending: list[Trial]
    finals: list[Outcome] = field(default_factory=list)
    """Final candidates with a finite score, so far."""
    spent_nfe: int = 0
    num_rejected: int = 0
    is_done: bool = False
    leading: Outcome | None = None
    """Best outcome of the current turn that may win."""
    note: str = ""
    """How the algorithm ended, where that was not as planned."""

    @property
    def best(self) -> Outcome | None:
        """The best of the final candidates, ranked together."""
        return self.problem.best_first(self.finals)[0] if self.finals else None

    def may_win(self, outcome: Outcome) -> bool:
        """Tells whether a final candidate can still be the winner.

        Ranks within a group change as it grows, so by rank any one can; by score the best so far.
        """
        if outcome.trial.goal == "preview" or math.isnan(outcome.score):
            return False
        if self.problem.ranking is not by_score:
            return True
        before = [*self.finals] if self.leading is None else [*self.finals, self.leading]
        if self.problem.best_first([*before, outcome])[0] is not outcome:
            return False
        self.leading = outcome
        return True

    def take(self, outcomes: list[Outcome]) -> None:
        """Hands the outcomes of `pending` to the algorithm, and takes its next trials."""
        for outcome in outcomes:
            self.spent_nfe += outcome.nfe
            self.num_rejected += math.isnan(outcome.score)
            if outcome.trial.goal != "preview" and not math.isnan(outcome.score):
                self.finals.append(outcome)
        assert self.spent_nfe <= self.problem.budget_nfe, "an algorithm overspent"
        try:
            self.pending = self.search.send(outcomes)
        except StopIteration as stop:
            self.pending, self.is_done, self.note = [], True, stop.value or ""


def open_search(problem: Problem, make: MakeSearch) -> PromptSearch:
    """Starts the algorithm of one prompt; it has asked for its first round.

    Raises UserError where the budget does not pay for one image.
    """
    check_budget(problem)
    search = make(problem)
    return PromptSearch(problem, search, next(search))


def check_budget(problem: Problem, least_nfe: int | None = None) -> None:
    """Raises UserError where the budget does not pay for one image.

    least_nfe: that of the algorithm's smallest search, if it is known.
    """
    least = least_nfe or problem.gradient_cost or problem.full_cost
    if problem.budget_nfe < least:
        what = "one step of the noise" if problem.gradient_cost else "one image"
        raise UserError(
            f"budget_nfe={problem.budget_nfe} is smaller than {what}, which takes {least} NFE with "
            "these sampling steps and guidance; raise it, or take fewer num_steps"
        )


def drive(
    runner: TrialRunner,
    journal: Journal,
    searches: Iterable[PromptSearch],
    about: Callable[[int], Mapping[str, Any]] = lambda index: {},
    on_image: Callable[[PromptSearch, Result], None] = lambda *_: None,
    on_done: Callable[[PromptSearch], None] = lambda _: None,
    on_turn: Callable[[list[PromptSearch]], None] = lambda _: None,
    one_by_one: bool = False,
    needs_winner: bool = True,
) -> list[PromptSearch]:
    """Runs all searches to their end; returns them.

    `on_image` is told of every image that may be the winner of its prompt, when it is made,
    `on_done` of a prompt that is finished; `about` adds to the rows of a prompt. `one_by_one`
    begins a prompt when the one before it is finished, as a verifier that remembers winners needs.
    Raises RunFailed where every score of a prompt was rejected, unless not `needs_winner`.
    """
    waiting = iter(searches)
    finished: list[PromptSearch] = []
    active = list(itertools.islice(waiting, 1))
    while active:
        fresh: dict[tuple[int, int], Outcome] = {}
        wanted = _unpaid(active, journal)
        while (
            not one_by_one
            and len(wanted) < runner.batch_size
            and (more := list(itertools.islice(waiting, 1)))
        ):
            active += more
            wanted += _unpaid(more, journal)
        trials = [(one.problem.prompt_index, trial) for one, trial in wanted]
        for number, result in runner.run(trials):
            one, trial = wanted[number]
            index = one.problem.prompt_index
            if one.may_win(result.outcome):
                on_image(one, result)  # before its row, which says that nothing is missing
            journal.write(index, result, about(index))
            fresh[index, trial.candidate] = result.outcome
        for one in active:
            one.take([_outcome(one, trial, fresh, journal) for trial in one.pending])
            if one.is_done:
                if needs_winner:
                    _require_winner(one)
                on_done(one)
                journal.forget(one.problem.prompt_index)
                runner.forget(one.problem.prompt_index)
        on_turn(active)
        finished += [one for one in active if one.is_done]
        active = [one for one in active if not one.is_done]
        active = active or list(itertools.islice(waiting, 1))
    return finished


def _unpaid(searches: list[PromptSearch], journal: Journal) -> list[tuple[PromptSearch, Trial]]:
    """Returns the trials that are asked for and not recorded."""
    return [
        (one, trial)
        for one in searches
        for trial in one.pending
        if journal.find(one.problem.prompt_index, trial) is None
    ]


def _outcome(
    one: PromptSearch, trial: Trial, fresh: dict[tuple[int, int], Outcome], journal: Journal
) -> Outcome:
    """Returns the outcome of a trial, of this start or an earlier one."""
    index = one.problem.prompt_index
    outcome = fresh.get((index, trial.candidate)) or journal.find(index, trial)
    assert outcome is not None
    return outcome


def _require_winner(one: PromptSearch) -> None:
    if one.best is None:
        raise RunFailed(
            f"prompt {one.problem.prompt_index}: none of its {one.num_rejected} candidates has a "
            "finite score, so there is no winner; look at the verifier and at the images"
        )


class SearchProgress:
    """A bar over the NFE of all prompts of this process; calls `keep` once every few seconds."""

    def __init__(self, num_prompts: int, budget_nfe: int, keep: Callable[[], None]) -> None:
        columns = (
            TextColumn("searching"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("NFE, {task.fields[state]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns)
        self._budget_nfe, self._finished_nfe = budget_nfe, 0
        self._task = self.bar.add_task("search", total=num_prompts * budget_nfe, state="")
        self._keep, self._kept_s = keep, 0.0

    def tell(self, turn: list[PromptSearch]) -> None:
        """Shows the prompts of a turn, the finished among them."""
        active = [one for one in turn if not one.is_done]
        self._finished_nfe += self._budget_nfe * (len(turn) - len(active))
        spent = self._finished_nfe + sum(one.spent_nfe for one in active)
        bests = [one.best.score for one in turn if one.best is not None]
        left = sum(one.problem.budget_nfe - one.spent_nfe for one in active)
        best = f"best score {max(bests):.4f}, " if bests else ""
        state = f"{best}{len(active)} prompts open with {left} NFE"
        self.bar.update(self._task, completed=spent, state=state)
        if time.monotonic() - self._kept_s >= EVERY_S:
            self._keep()
            self._kept_s = time.monotonic()
