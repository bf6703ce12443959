"""The driver: walks the searches of many prompts side by side, from their records or by running.

Every prompt has an algorithm (a generator, sampling/search/problem.py). In each turn the trials
that all open prompts ask for are gathered; those that candidates.jsonl knows are answered from
there, the rest is run together. Winners are the best final candidates, ties going to the lower
number; what is not a finite score is rejected and counted.
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
        if not outcome.trial.may_win or math.isnan(outcome.score):
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
        assert len(outcomes) == len(self.pending)
        for outcome in outcomes:
            self.spent_nfe += outcome.nfe
            self.num_rejected += math.isnan(outcome.score)
            if outcome.trial.may_win and not math.isnan(outcome.score):
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
    if problem.target is not None:
        search = until_target(search, problem.target)
    return PromptSearch(problem, search, next(search))


def until_target(search: Search, target: float) -> Search:
    """Runs the candidates of a round one after another and ends with the first whose score reaches
    `target`; what cannot win, such as drafts, stays together."""
    trials = next(search)
    while True:
        together = not all(trial.may_win for trial in trials)
        outcomes: list[Outcome] = []
        for part in [trials] if together else [[trial] for trial in trials]:
            outcomes += yield part
            last = outcomes[-1]
            if last.trial.may_win and last.score >= target:
                return ""
        try:
            trials = search.send(outcomes)
        except StopIteration as stop:
            return stop.value


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
    problems: Iterable[Problem],
    make: MakeSearch,
    about: Callable[[int], Mapping[str, Any]] = lambda index: {},
    on_image: Callable[[PromptSearch, Result], None] = lambda *_: None,
    on_result: Callable[[PromptSearch, Result], None] = lambda *_: None,
    on_done: Callable[[PromptSearch], None] = lambda _: None,
    on_turn: Callable[[list[PromptSearch]], None] = lambda _: None,
    has_image: Callable[[int, Trial], bool] = lambda *_: True,
    one_by_one: bool = False,
    needs_winner: bool = True,
) -> list[PromptSearch]:
    """Searches all problems to their end, each by what `make` makes of it; returns the searches.

    `on_image` is told of every image that may be the winner of its prompt, when it is made (again,
    where its candidate is recorded and `has_image` says that the image is not there),
    `on_result` of every result where previews are shown, `on_done` of a prompt that is finished;
    `about` adds to the rows of a prompt. `one_by_one` begins a prompt when the one before it is
    finished, as a verifier that remembers winners needs. Raises RunFailed where every score of a
    prompt was rejected, unless not `needs_winner`.
    """

    def to_run(search: PromptSearch) -> list[Trial]:
        return [trial for trial in search.pending if lacks(search, trial)]

    def lacks(search: PromptSearch, trial: Trial) -> bool:
        index = search.problem.prompt_index
        known = journal.find(index, trial)
        return known is None or (search.may_win(known) and not has_image(index, trial))

    waiting = (open_search(problem, make) for problem in problems)
    finished: list[PromptSearch] = []
    active: list[PromptSearch] = []
    while active := active or list(itertools.islice(waiting, 1)):
        unpaid = [(search, trial) for search in active for trial in to_run(search)]
        while not one_by_one and len(unpaid) < runner.batch_size:
            search = next(waiting, None)
            if search is None:
                break
            active.append(search)
            unpaid += [(search, trial) for trial in to_run(search)]
        fresh: dict[tuple[int, int], Outcome] = {}
        for number, result in runner.run([(s.problem.prompt_index, trial) for s, trial in unpaid]):
            search, trial = unpaid[number]
            index = search.problem.prompt_index
            if runner.previews_every:
                on_result(search, result)
            if journal.find(index, trial) is not None:  # its score stands, its image was missing
                on_image(search, result)
                continue
            if search.may_win(result.outcome):
                on_image(search, result)  # before its row, which says that nothing is missing
            journal.write(index, result, about(index))
            fresh[index, trial.candidate] = result.outcome
        for search in active:
            index = search.problem.prompt_index
            outcomes = (
                fresh.get((index, t.candidate)) or journal.find(index, t) for t in search.pending
            )
            search.take(list(filter(None, outcomes)))
            if search.is_done:
                if needs_winner and search.best is None:
                    raise RunFailed(
                        f"prompt {index}: none of its {search.num_rejected} candidates has a "
                        "finite score, so there is no winner; look at the verifier and at the "
                        "images"
                    )
                on_done(search)
                journal.forget(index)
                runner.forget(index)
        on_turn(active)
        finished += [search for search in active if search.is_done]
        active = [search for search in active if not search.is_done]
    return finished


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
        active = [search for search in turn if not search.is_done]
        self._finished_nfe += self._budget_nfe * (len(turn) - len(active))
        spent = sum(search.spent_nfe for search in active)
        bests = [search.best.score for search in turn if search.best is not None]
        left = len(active) * self._budget_nfe - spent
        best = f"best score {max(bests):.4f}, " if bests else ""
        state = f"{best}{len(active)} prompts open with {left} NFE"
        self.bar.update(self._task, completed=self._finished_nfe + spent, state=state)
        if time.monotonic() - self._kept_s >= EVERY_S:
            self._keep()
            self._kept_s = time.monotonic()
