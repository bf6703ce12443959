"""blackpoint data encode: encodes shards into latents and prompt embeddings."""

import signal
import sys
from typing import Any

from data.bad_samples import listing
from train.encode_config import EncodeConfig


def config_class() -> type[EncodeConfig]:
    """Returns the dataclass that configures this verb."""
    return EncodeConfig


def run(config: EncodeConfig) -> int:
    """Encodes, says what was encoded and left out, and returns the exit status."""
    from train.encode import encode

    # Killed by a scheduler, we leave through the finally blocks that remove what is half-written.
    signal.signal(signal.SIGTERM, _stop)
    result = encode(config)
    print(f"encoded {result.num_samples} samples in {result.num_shards} shards: {config.output}")
    if result.bad:
        print(f"left out {len(result.bad)} (listed in {config.output}/index/bad_samples.jsonl):")
        print(listing(result.bad))
    print(
        f"train on them: blackpoint train data.shards={config.output} "
        f"data.resolution={config.resolution} checkpoint={config.checkpoint} run_dir=..."
    )
    return 0


def _stop(signal_number: int, _frame: Any) -> None:
    sys.exit(128 + signal_number)
