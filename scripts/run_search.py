"""blackpoint search: finds, for each prompt, the starting noise that a verifier likes best."""

from sampling.search.config import SearchConfig


def config_class() -> type[SearchConfig]:
    """Returns the dataclass that configures this verb."""
    return SearchConfig


def run(config: SearchConfig) -> int:
    """Searches and returns the exit status."""
    from sampling.search.run import search_to_folder

    print(f"winners.jsonl, candidates.jsonl and images/ are in {search_to_folder(config)}")
    return 0
