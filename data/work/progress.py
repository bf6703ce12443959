"""The progress bar of commands that read a whole data set, and reading by threads behind it."""

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from blackpoint.data.work.workers import usable_cores

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class RateColumn(ProgressColumn):
    """How many are done in a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Shows a bar on stderr (only its last state in a log).

    What it yields moves the bar by one, or by the number that it is given.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count=1: bar.advance(task, count)


def in_threads(
    title: str,
    function: Callable[[ItemT], ResultT],
    items: Collection[ItemT],
    is_shown: bool = True,
) -> Iterator[tuple[ItemT, ResultT]]:
    """Yields each item with function(item), in order, computed by one thread per core."""
    bar = progress(title, len(items)) if is_shown else nullcontext(lambda: None)
    with ThreadPoolExecutor(usable_cores()) as pool, bar as advance:
        for item, result in zip(items, pool.map(function, items), strict=True):
            advance()
            yield item, result
