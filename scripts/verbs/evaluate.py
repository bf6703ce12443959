"""`blackpoint evaluate`: the metrics of a checkpoint, or a study of several."""

import difflib
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.signals import stoppable
from blackpoint.sampling.evaluation.black_point import BlackPointConfig
from blackpoint.sampling.evaluation.config import MetricsConfig
from blackpoint.sampling.evaluation.stability import StabilityStudyConfig
from blackpoint.scripts.config import KEY_VALUE, read_yaml

StudyConfig = MetricsConfig | BlackPointConfig | StabilityStudyConfig
STUDIES: dict[str, type[StudyConfig]] = {
    "metrics": MetricsConfig,
    "black_point": BlackPointConfig,
    "stability": StabilityStudyConfig,
}


def config_class() -> type[StudyConfig]:
    """Returns the dataclass of the study that runs unless another is named."""
    return MetricsConfig


def config_class_of(arguments: Sequence[str]) -> type[StudyConfig]:
    """Returns the dataclass of the study that the arguments, or their YAML file, name."""
    name: object = None
    if arguments and not KEY_VALUE.match(arguments[0]) and not arguments[0].startswith("-"):
        name = read_yaml(arguments[0]).get("study")
    for argument in arguments:
        if argument.startswith("study="):
            name = argument.removeprefix("study=")
    if name is None:
        return config_class()
    if str(name) not in STUDIES:
        close = difflib.get_close_matches(str(name), STUDIES, n=1, cutoff=0.3)
        remedy = f"did you mean study={close[0]}?" if close else f"use {' or '.join(STUDIES)}"
        raise UserError(f"study={name} is none; {remedy}")
    return STUDIES[str(name)]


def run(config: StudyConfig) -> int:
    """Runs what is asked for and prints what came out."""
    if isinstance(config, MetricsConfig):
        return _metrics(config)
    if isinstance(config, StabilityStudyConfig):
        return _stability(config)
    from blackpoint.sampling.evaluation.black_point_summary import markdown
    from blackpoint.scripts.miniature.evaluation import evaluate

    started_s = time.perf_counter()
    _, findings = evaluate(config)
    print(markdown(findings))
    print(f"{config.output}/summary.md, {time.perf_counter() - started_s:.0f} s")
    return 0


def _metrics(config: MetricsConfig) -> int:
    with stoppable():
        from blackpoint.sampling.evaluation.run import evaluate_to_folder
        from blackpoint.sampling.evaluation.summary import markdown

        summary = evaluate_to_folder(config)
    if summary is not None:
        print(markdown(summary))
        print(f"{config.output}: metrics.json, metrics.csv, metrics.md, images.parquet")
    return 0


def _stability(config: StabilityStudyConfig) -> int:
    with stoppable():
        from blackpoint.sampling.evaluation.stability_study import PEAKS, report, run_searches
        from blackpoint.sampling.report.training_page import shown_settings
        from blackpoint.sampling.runtime.tasks import this_task
        from blackpoint.scripts.studies.stability_cost import measured_peaks

        task = this_task()
        run_searches(config, task)
        if task.rank > 0:
            return 0
        peaks_path = Path(config.output) / PEAKS
        peaks = measured_peaks(config, peaks_path) if config.measure_memory else {}
        page, lines = report(config, peaks, shown_settings(asdict(config)))
    print("\n".join(lines))
    print(f"{page}; tables in results.md, rows in pairs.csv.gz and chosen.csv beside it")
    return 0
