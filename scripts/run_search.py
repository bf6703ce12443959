"""blackpoint search: finds, for each prompt, the starting noise that a verifier likes best."""

from sampling.search.config import SearchConfig
from scripts.stoppable import stoppable


def config_class() -> type[SearchConfig]:
    """Returns the dataclass that configures this verb."""
    return SearchConfig


def run(config: SearchConfig) -> int:
    """Searches and returns the exit status."""
    # A scheduler's signal may come at any time from here on, also while torch is imported.
    with stoppable():
        from sampling.search.run import search_to_folder

        output, lines = search_to_folder(config)
    for line in lines:
        print(line)
    print(f"winners.jsonl, candidates.jsonl and images/ are in {output}")
    return 0
