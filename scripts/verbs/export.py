"""blackpoint export: writes a trained checkpoint as a diffusers folder and proves it."""

import signal
import sys
from typing import Any

from blackpoint.sampling.options import ExportConfig


def config_class() -> type[ExportConfig]:
    """Returns the dataclass that configures this verb."""
    return ExportConfig


def run(config: ExportConfig) -> int:
    """Exports and returns the exit status."""
    from blackpoint.data.files.errors import NotExportable
    from blackpoint.sampling.export.export import export

    # Killed by a scheduler, we leave through the finally blocks that remove what is half-written.
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        folder = export(
            config.checkpoint,
            config.output,
            config.weights,
            config.verify,
            config.dtype,
            config.variant,
        )
    except NotExportable as error:
        raise NotExportable(f"{error}; verify=false writes the folder unchecked") from None
    finally:
        signal.signal(signal.SIGTERM, before)
    verified = "verified against diffusers" if config.verify else "not verified"
    print(f"exported to {folder} ({config.weights} weights, {config.dtype}, {verified})")
    return 0


def _stop(signal_number: int, _frame: Any) -> None:
    sys.exit(128 + signal_number)
