"""Imports of large libraries, without the garbage collector."""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Imports inside the block do not wait for the garbage collector.

    torch, diffusers and Lightning make 600,000 objects that live to the end. Going through them
    again and again takes a fifth of the time of their import, and afterwards 0.3 s at every full
    collection, so that what was imported is left out of those too.
    """
    was_enabled, num_modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > num_modules:
            gc.freeze()
        if was_enabled:
            gc.enable()
