"""`blackpoint report`: one HTML page from what a run directory holds, finished or under way."""

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class ReportConfig:
    """The page about one run directory."""

    run_dir: str = MISSING
    """Run directory with metrics.csv, previews/ or black_point/ (rows of `blackpoint evaluate`)."""
    output: str | None = None
    """The page; run_dir/report.html if not set."""
    evaluation: str | None = None
    """Folder of a black-point study; run_dir/black_point if not set."""
    committed_rows: str = "docs/black_point/rows.csv.gz"
    """Rows that show the control where the study has none; skipped where the file is absent."""


def config_class() -> type[ReportConfig]:
    return ReportConfig


def run(config: ReportConfig) -> int:
    """Writes the page and says where it is."""
    from scripts.report_content import write

    print(write(config))
    return 0
