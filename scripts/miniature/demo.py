"""`blackpoint demo`: the whole path on real digits, from shards to a report."""

from blackpoint.scripts.miniature.demo_config import DemoConfig


def config_class() -> type[DemoConfig]:
    return DemoConfig


def run(config: DemoConfig) -> int:
    """Runs every step that is not done yet, then prints the numbers and where the report is."""
    from blackpoint.scripts.miniature.demo_steps import demonstrate

    demonstrate(config)
    return 0
