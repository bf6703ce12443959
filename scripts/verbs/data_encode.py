"""blackpoint data encode: encodes shards into latents and prompt embeddings."""

from blackpoint.data.bad_samples import listing
from blackpoint.data.files.imports import uncollected
from blackpoint.data.files.signals import stoppable
from blackpoint.train.encode.config import EncodeConfig


def config_class() -> type[EncodeConfig]:
    """Returns the dataclass that configures this verb."""
    return EncodeConfig


def run(config: EncodeConfig) -> int:
    """Encodes, reports encoded and left-out samples, and returns the exit status."""
    # A scheduler's signal may come at any time from here on, also while torch is imported.
    with stoppable():
        with uncollected():
            from blackpoint.train.encode.encode import encode

        result = encode(config)
    kept = f", {result.num_kept_shards} of them before" if result.num_kept_shards else ""
    print(
        f"encoded {result.num_samples} samples in {result.num_shards} shards{kept}, "
        f"{result.num_bytes / 1e6:.1f} MB: {config.output}"
    )
    if result.bad:
        print(f"left out {len(result.bad)} (listed in {config.output}/index/bad_samples.jsonl):")
        print(listing(result.bad))
    return 0
