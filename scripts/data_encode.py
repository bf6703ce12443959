"""blackpoint data encode: encodes shards into latents and prompt embeddings."""

import signal
from typing import Any

from data.bad_samples import listing
from sampling.errors import Resumable
from train.encode_config import EncodeConfig

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler sends before it kills."""


class _Stopped(BaseException):
    """A signal came; the message is its name."""


def config_class() -> type[EncodeConfig]:
    """Returns the dataclass that configures this verb."""
    return EncodeConfig


def run(config: EncodeConfig) -> int:
    """Encodes, says what was encoded and left out, and returns the exit status."""
    # A scheduler's signal may come at any time from here on, also while torch is imported.
    previous = {number: signal.signal(number, _stop) for number in SIGNALS}
    try:
        from train.encode import encode

        result = encode(config)
    except _Stopped as stopped:
        raise Resumable(f"stopped by {stopped}; the same command continues") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    kept = f", {result.num_kept_shards} of them before" if result.num_kept_shards else ""
    print(
        f"encoded {result.num_samples} samples in {result.num_shards} shards{kept}, "
        f"{result.num_bytes / 1e6:.1f} MB: {config.output}"
    )
    if result.bad:
        print(f"left out {len(result.bad)} (listed in {config.output}/index/bad_samples.jsonl):")
        print(listing(result.bad))
    print(
        f"train on them: blackpoint train data.shards={config.output} "
        f"data.resolution={config.resolution} checkpoint={config.checkpoint} run_dir=..."
    )
    return 0


def _stop(number: int, _frame: Any) -> None:
    """Leaves through the finally blocks; libraries catch Exception, so it is none."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise _Stopped(signal.Signals(number).name)
