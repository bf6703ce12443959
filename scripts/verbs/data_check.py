"""blackpoint data check: reports the contents of shards, and indexes shards made elsewhere."""

from rich.console import Console

from blackpoint.data.bad_samples import listing
from blackpoint.data.check.check import BAD_FILE, REPORT_FILE, CheckConfig, check
from blackpoint.data.check.tables import tables
from blackpoint.data.files.errors import UserError
from blackpoint.data.files.signals import left_by_sigterm


def config_class() -> type[CheckConfig]:
    """Returns the dataclass that configures this verb."""
    return CheckConfig


def run(config: CheckConfig) -> int:
    """Checks, prints the report and returns 0; raises UserError where every sample is bad."""
    with left_by_sigterm():
        report = check(config)
    console = Console(highlight=False)
    for part in tables(report):
        console.print(part)
    if report.bad:
        print(listing(report.bad))
    if config.output:
        print(f"report: {config.output}/{REPORT_FILE}, bad samples: {config.output}/{BAD_FILE}")
    if not report.num_samples:
        raise UserError(f"shards={config.shards}: no sample can be used; see the reasons above")
    return 0
