"""`blackpoint sweep`: trains, evaluates and searches every cell of a grid, here or as an array."""

import os
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

from blackpoint.data.files.errors import RunFailed
from blackpoint.data.files.signals import stoppable
from blackpoint.scripts.sweep.config import SweepConfig

T = TypeVar("T")
ELEMENT, FIRST, LAST, STEP, COUNT = (
    f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "STEP", "COUNT")
)


def config_class() -> type[SweepConfig]:
    """Returns the dataclass of this verb's settings."""
    return SweepConfig


def run(config: SweepConfig) -> int:
    """Runs unfinished cells and reports the outcome of each; 1 where one failed."""
    from blackpoint.scripts.sweep.cells import cells_of, chosen_of
    from blackpoint.scripts.sweep.costs import costs_table
    from blackpoint.scripts.sweep.runner import (
        Outcome,
        Runner,
        raise_stopped,
        state_of,
        write_sweep,
    )

    every = cells_of(config)
    cells = chosen_of(every, config.only)
    mine = share_of_element(cells, os.environ)
    todo = [cell for cell in mine if state_of(cell).state != "done"]
    if (costs := costs_table(todo)).rows:
        print(f"Costs of unfinished cells, in UNet evaluations (NFE):\n\n{costs.text()}")
    if config.plan:
        for cell in cells:
            print(f"{state_of(cell).state:8} {cell.name}  {cell.folder}")
        print(
            f"{len(cells)} cells; as an array: sbatch --array=0-{len(cells) - 1} slurm/sweep.sbatch"
        )
        return 0
    write_sweep(config, every)
    number = 0

    def tell(outcome: Outcome) -> None:
        nonlocal number
        number += 1
        reason = f": {outcome.reason}" if outcome.reason else ""
        print(f"{number}/{len(todo)} {outcome.cell.name} {outcome.state}{reason}", flush=True)

    print(f"{len(mine)} cells, {len(mine) - len(todo)} done before", flush=True)
    runner = Runner(config, 1 if len(mine) < len(cells) else config.num_processes)
    with stoppable():
        outcomes = runner.run(mine, tell)
    raise_stopped(outcomes)
    counts = Counter(outcome.state for outcome in outcomes)
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if failed:
        lines = [f"  {outcome.cell.name}: {outcome.reason}" for outcome in failed]
        raise RunFailed(
            f"{len(failed)} of {len(outcomes)} cells failed; the same command tries them again:\n"
            + "\n".join(lines)
        )
    return 0


def share_of_element(cells: list[T], environment: Mapping[str, str]) -> list[T]:
    """Returns the cells of this element of a SLURM array; all outside one.

    Of an array 0-(n-1) every n-th, so that fewer elements than cells do; of any other, such as 3,7,
    the cell of that number.
    """
    if ELEMENT not in environment:
        return cells
    element, first = int(environment[ELEMENT]), int(environment.get(FIRST, "0"))
    last, step = (
        int(environment.get(name, default)) for name, default in ((LAST, "0"), (STEP, "1"))
    )
    count = int(environment.get(COUNT, str(len(cells))))
    if first == 0 and step == 1 and last + 1 == count:
        return cells[element::count]
    return cells[element : element + 1]  # some of the cells, by their numbers in the plan
