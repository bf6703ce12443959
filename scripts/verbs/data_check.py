"""blackpoint data check: reports what shards hold, and indexes shards made elsewhere."""

import signal
import sys
from typing import Any

from rich.console import Console

from blackpoint.data.bad_samples import listing
from blackpoint.data.check.check import BAD_FILE, REPORT_FILE, CheckConfig, check
from blackpoint.data.check.tables import tables


def config_class() -> type[CheckConfig]:
    """Returns the dataclass that configures this verb."""
    return CheckConfig


def run(config: CheckConfig) -> int:
    """Checks, prints the report and returns the exit status: 0 even if samples are bad."""
    # Killed by a scheduler, we leave through the finally blocks that remove what is half-written.
    signal.signal(signal.SIGTERM, _stop)
    report = check(config)
    console = Console(highlight=False)
    for part in tables(report):
        console.print(part)
    if report.bad:
        print(listing(report.bad))
    if config.output:
        print(f"report: {config.output}/{REPORT_FILE}, bad samples: {config.output}/{BAD_FILE}")
    return 0


def _stop(signal_number: int, _frame: Any) -> None:
    sys.exit(128 + signal_number)
