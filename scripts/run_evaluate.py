"""`blackpoint evaluate`: measures the black point of checkpoints, with intervals."""

import time

from sampling.evaluation.black_point import BlackPointConfig


def config_class() -> type[BlackPointConfig]:
    return BlackPointConfig


def run(config: BlackPointConfig) -> int:
    """Runs the study and prints its table."""
    from sampling.evaluation.black_point_summary import markdown
    from scripts.evaluation import evaluate

    started_s = time.perf_counter()
    _, findings = evaluate(config)
    print(markdown(findings))
    print(f"{config.output}/summary.md, {time.perf_counter() - started_s:.0f} s")
    return 0
