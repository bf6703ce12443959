"""blackpoint data pack: packs an image folder with captions into shards with an index."""

import os

from blackpoint.data.bad_samples import listing
from blackpoint.data.files.signals import left_by_sigterm
from blackpoint.data.pack.pack import PackConfig, pack


def config_class() -> type[PackConfig]:
    """Returns the dataclass that configures this verb."""
    return PackConfig


def run(config: PackConfig) -> int:
    """Packs, reports packed and left-out samples, and returns the exit status."""
    # Each process computes alone: threads of numpy's own would only crowd a large machine.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with left_by_sigterm():
        result = pack(config)
    print(f"captions from {result.caption_source}")
    if result.num_kept_shards:
        print(f"kept {result.num_kept_shards} shards that an earlier run had finished")
    print(
        f"packed {result.num_samples} samples in {result.num_shards} shards: {config.output} "
        f"({result.num_bytes / 1e6:.1f} MB, {result.num_read / max(result.seconds, 1e-9):.0f} "
        f"images/s, {len(result.bad)} bad)"
    )
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
