"""`blackpoint report`: one HTML page from a run, an evaluation, a search or a sweep."""

from dataclasses import asdict
from pathlib import Path

from blackpoint.scripts.verbs.report_config import ReportConfig, is_about_results


def config_class() -> type[ReportConfig]:
    return ReportConfig


def run(config: ReportConfig) -> int:
    """Writes the page and says where it is."""
    if config.compare:
        from blackpoint.scripts.show.compare import write_comparison

        page, asked = Path(config.output or "compared.html"), asdict(config.images)
        write_comparison(page, config.compare, config.prompts, asked.pop("device"), asked)
        print(page)
        return 0
    if is_about_results(config.folder):
        from blackpoint.scripts.verbs.report_results import write_results_of

        for path in write_results_of(config):
            print(path)
        return 0
    from blackpoint.scripts.verbs.report_content import write

    print(write(config))
    return 0
