"""`blackpoint report`: one HTML page from a run, an evaluation, a search or a sweep."""

from pathlib import Path

from blackpoint.scripts.verbs.report_config import ReportConfig, is_about_results


def config_class() -> type[ReportConfig]:
    return ReportConfig


def run(config: ReportConfig) -> int:
    """Writes the page and says where it is."""
    if is_about_results(Path(config.run_dir)):
        from blackpoint.scripts.verbs.report_results import write_results_of

        for path in write_results_of(config):
            print(path)
        return 0
    from blackpoint.scripts.verbs.report_content import write

    print(write(config))
    return 0
