"""`blackpoint evaluate`: one checkpoint and one sampling setting, by every metric."""

from collections.abc import Sequence

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.imports import uncollected
from blackpoint.data.files.signals import stoppable
from blackpoint.sampling.evaluation.config import MetricsConfig, not_asked
from blackpoint.scripts.config import KEY_VALUE, read_yaml

FORMER_STUDIES = {
    "black_point": "evaluate measures it, of any checkpoint with any prompts; run `blackpoint "
    "evaluate configs/black_point.yaml checkpoint=FOLDER output=FOLDER`, or compare several "
    "checkpoints by `blackpoint sweep configs/black_point_study.yaml`",
    "stability": "it is a sweep of searches now; run `blackpoint sweep configs/stability.yaml`; "
    "each search folder of an earlier study is still read by `blackpoint report run_dir=FOLDER`",
}
"""Former values of `study` -> what to run instead."""


def config_class() -> type[MetricsConfig]:
    """Returns the dataclass of this verb's settings."""
    return MetricsConfig


def config_class_of(arguments: Sequence[str]) -> type[MetricsConfig]:
    """Returns the same; raises UserError where the arguments, or their YAML file, name a former
    study, whose keys are no keys any more."""
    name: object = None
    if arguments and not KEY_VALUE.match(arguments[0]) and not arguments[0].startswith("-"):
        name = read_yaml(arguments[0]).get("study")
    for argument in arguments:
        if argument.startswith("study="):
            name = argument.removeprefix("study=")
    if name in FORMER_STUDIES:
        raise UserError(f"study={name} is no study any more: {FORMER_STUDIES[str(name)]}")
    return config_class()


def run(config: MetricsConfig) -> int:
    """Samples and measures missing images and prints the metrics."""
    with stoppable():
        with uncollected():
            from blackpoint.sampling.evaluation.run import evaluate_to_folder
            from blackpoint.sampling.evaluation.summary import markdown

        summary = evaluate_to_folder(config)
    if summary is not None:
        print(markdown(summary, for_terminal=True), end="")
        for line in not_asked(config, {metric.name for metric in summary.metrics}):
            print(f"- not asked for: {line}")
        print(f"{config.output}: metrics.json, metrics.csv, metrics.md, images.parquet")
    return 0
