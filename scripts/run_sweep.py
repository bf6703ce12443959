"""`blackpoint sweep`: trains, evaluates and searches every cell of a grid, here or as an array."""

import os
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

from sampling.errors import RunFailed
from scripts.stoppable import stoppable
from scripts.sweep_config import SweepConfig

T = TypeVar("T")
ELEMENT, FIRST, COUNT = (f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "COUNT"))


def config_class() -> type[SweepConfig]:
    """Returns the dataclass of this verb's settings."""
    return SweepConfig


def run(config: SweepConfig) -> int:
    """Runs what is not done and says what became of every cell; 1 where one failed."""
    from scripts.sweep_cells import cells_of
    from scripts.sweep_runner import Outcome, Runner, raise_stopped, state_of, write_sweep

    cells = cells_of(config)
    if config.plan:
        for cell in cells:
            print(f"{state_of(cell).state:8} {cell.name}  {cell.folder}")
        print(
            f"{len(cells)} cells; as an array: sbatch --array=0-{len(cells) - 1} slurm/sweep.sbatch"
        )
        return 0
    mine = share_of_element(cells, os.environ)
    if not config.only:
        write_sweep(config, cells)
    number = 0

    def tell(outcome: Outcome) -> None:
        nonlocal number
        number += 1
        reason = f": {outcome.reason}" if outcome.reason else ""
        print(f"{number}/{len(todo)} {outcome.cell.name} {outcome.state}{reason}", flush=True)

    todo = [cell for cell in mine if state_of(cell).state != "done"]
    print(f"{len(mine)} cells, {len(mine) - len(todo)} done before", flush=True)
    runner = Runner(config, 1 if len(mine) < len(cells) else config.num_processes)
    with stoppable():
        outcomes = runner.run(mine, tell)
    raise_stopped(outcomes)
    counts = Counter(each.state for each in outcomes)
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    print(f"blackpoint report run_dir={config.run_dir} shows them")
    failed = [each for each in outcomes if each.state == "failed"]
    if failed:
        lines = [f"  {each.cell.name}: {each.reason}" for each in failed]
        raise RunFailed(
            f"{len(failed)} of {len(outcomes)} cells failed; the same command tries them again:\n"
            + "\n".join(lines)
        )
    return 0


def share_of_element(cells: list[T], environment: Mapping[str, str]) -> list[T]:
    """Returns the cells of this element of a SLURM array: every n-th of them; all outside one."""
    if ELEMENT not in environment:
        return cells
    place = int(environment[ELEMENT]) - int(environment.get(FIRST, "0"))
    return cells[place :: int(environment.get(COUNT, str(len(cells))))]
