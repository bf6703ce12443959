"""What a sweep will cost, before it starts: UNet evaluations, decodes and verifier calls, by arm.

A search is its algorithm, walked without a network, every score being 0. All levels of halving are
taken to prune, drafts to rank well in the steps that are set, or in S / 8, and paths to have Stable
Diffusion's schedule with trailing timesteps. What stands `beside` the budget in a ledger, trainings
and measurements beside images are not counted. A verifier of latents, or one that declares levels,
is known as such when it is loaded: it is taken to score every image, decoded.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.process import Process
from blackpoint.sampling.prompts.prompt_set import read_prompt_set
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.costs import Costs, Ledger
from blackpoint.sampling.search.setup import planned
from blackpoint.sampling.statistics.table import Table
from blackpoint.scripts.sweep.cells import Cell

COLUMNS = (
    *("arm", "cells", "NFE per prompt", "prompts", "NFE", "decodes", "verifier calls"),
    *("verifier gradients", "held-out calls"),
)


def costs_table(cells: Sequence[Cell]) -> Table:
    """Returns the costs of evaluations and searches; raises one UserError for all prompts that
    cannot be read and budgets that pay for no image."""
    arms: dict[str, list[Sequence[int]]] = {}
    wrong: dict[str, None] = {}
    for cell in cells:
        for section, config in cell.configs.items():
            try:
                counts = _counts(section, config)
            except UserError as error:
                wrong[str(error)] = None
                continue
            for arm in filter(None, ("in all", cell.arm)):
                arms.setdefault(arm, []).append(counts)
    if wrong:
        raise UserError("\n".join(wrong))
    lines = []
    for arm, of_cells in arms.items():
        each, *others = zip(*of_cells, strict=True)
        shown = " to ".join(map(str, sorted({min(each), max(each)})))
        lines.append((arm, len(each), shown, *map(sum, others)))
    return Table.of(dict.fromkeys(COLUMNS, "d"), lines)


def _counts(section: str, config: Any) -> Sequence[int]:
    count = len(read_prompt_set(config.prompts, config.limit, config.offset))
    one = costs_of_search(config) if section == "search" else Ledger()
    if section == "evaluate":
        one.count(config.num_images, costs_of(config).run_rows(0, config.num_steps))
        one.decoded_images = config.num_images
        one.verifier_calls = config.num_images * len(config.verifiers)
    held_out = 2 * len(getattr(config, "held_out", ()))  # of the winner and the plain image
    counts = (one.nfe, one.decoded_images, one.verifier_calls, one.verifier_gradients, held_out)
    return one.nfe, count, *(count * number for number in counts)


def costs_of(config: Any, num_steps: int | None = None) -> Costs:
    """Returns the costs of runs with sampling options, or in another number of steps."""
    schedule = NoiseSchedule.scaled_linear(num_steps=max(1000, config.num_steps))
    grid = Process(schedule).grid(num_steps or config.num_steps, config.sampler)
    return Costs(config.sampler, grid, Guidance(config.guidance_scale))


def costs_of_search(config: SearchConfig) -> Ledger:
    """Returns the costs of one prompt of a search, as if its model were Stable Diffusion."""
    return planned(config, partial(costs_of, config))
