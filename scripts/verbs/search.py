"""blackpoint search: finds, for each prompt, the starting noise that a verifier likes best."""

import time
from pathlib import Path

from blackpoint.data.files.errors import Resumable, RunFailed
from blackpoint.data.files.imports import uncollected
from blackpoint.data.files.signals import stoppable
from blackpoint.sampling.search.config import SearchConfig


def config_class() -> type[SearchConfig]:
    """Returns the dataclass that configures this verb."""
    return SearchConfig


def run(config: SearchConfig) -> int:
    """Searches and returns the exit status."""
    since = time.time() - 1
    try:
        # A scheduler's signal may come at any time from here on, also while torch is imported.
        with stoppable():
            with uncollected():
                from blackpoint.sampling.search.run import search_to_folder

            output, lines = search_to_folder(config)
    except Resumable:
        from blackpoint.sampling.runtime.sharing import stopped

        if reason := stopped(Path(config.output), since):  # the signal is what became of that
            raise RunFailed(reason) from None
        raise
    for line in lines:
        print(line)
    print(f"winners.jsonl, candidates.jsonl and images/ are in {output}")
    return 0
