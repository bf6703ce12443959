"""How a search stands: prompts and NFE left, the best score."""

import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from blackpoint.sampling.search.search import PromptSearch

EVERY_S = 5.0


class SearchProgress:
    """A bar over the NFE of all prompts of this process."""

    def __init__(self, num_prompts: int, budget_nfe: int) -> None:
        columns = (
            TextColumn("searching"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("NFE, {task.fields[state]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns)
        self._budget_nfe, self._finished_nfe = budget_nfe, 0
        self._task = self._bar.add_task("search", total=num_prompts * budget_nfe, state="")
        self._told_s = 0.0

    def __enter__(self) -> "SearchProgress":
        self._bar.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def is_due(self) -> bool:
        """Tells, once every few seconds, to write what only tells how far it is."""
        if time.monotonic() - self._told_s < EVERY_S:
            return False
        self._told_s = time.monotonic()
        return True

    def tell(self, turn: list[PromptSearch]) -> None:
        """Shows the prompts of a turn, the finished among them."""
        active = [one for one in turn if not one.is_done]
        self._finished_nfe += self._budget_nfe * (len(turn) - len(active))
        spent = self._finished_nfe + sum(one.spent_nfe for one in active)
        bests = [one.best.score for one in turn if one.best is not None]
        left = sum(one.problem.budget_nfe - one.spent_nfe for one in active)
        best = f"best score {max(bests):.4f}, " if bests else ""
        state = f"{best}{len(active)} prompts open with {left} NFE"
        self._bar.update(self._task, completed=spent, state=state)
