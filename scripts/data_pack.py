"""blackpoint data pack: packs an image folder with captions into shards with an index."""

import signal
import sys
from typing import Any

from data.bad_samples import listing
from data.pack import PackConfig, pack


def config_class() -> type[PackConfig]:
    """Returns the dataclass that configures this verb."""
    return PackConfig


def run(config: PackConfig) -> int:
    """Packs, says what was found, packed and left out, and returns the exit status."""
    # Killed by a scheduler, we leave through the finally blocks that remove what is half-written.
    signal.signal(signal.SIGTERM, _stop)
    result = pack(config)
    print(f"captions from {result.caption_source}")
    print(f"packed {result.num_samples} samples in {result.num_shards} shards: {config.output}")
    if result.bad:
        print(f"left out {len(result.bad)} (listed in {config.output}/index/bad_samples.jsonl):")
        print(listing(result.bad))
    ignored = {
        suffix: number
        for suffix, number in result.ignored_suffixes.items()
        if suffix not in ("txt", "json", "jsonl", "csv", "parquet")
    }
    if ignored:
        kinds = ", ".join(f"{number} .{suffix}" for suffix, number in sorted(ignored.items()))
        print(f"ignored files that are no images: {kinds}")
    return 0


def _stop(signal_number: int, _frame: Any) -> None:
    sys.exit(128 + signal_number)
