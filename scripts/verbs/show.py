"""`blackpoint show`: a local page that samples a checkpoint beside its base, and searches."""

import contextlib

from blackpoint.data.files.imports import uncollected
from blackpoint.data.files.signals import left_by_sigterm
from blackpoint.scripts.show.config import ShowConfig


def config_class() -> type[ShowConfig]:
    return ShowConfig


def run(config: ShowConfig) -> int:
    """Serves the page; Ctrl-C is its end, status 0."""
    with left_by_sigterm(), contextlib.suppress(KeyboardInterrupt):
        with uncollected():
            from blackpoint.scripts.show.server import serve

        serve(config)
    return 0
