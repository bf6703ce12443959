"""Memory that is no longer used, given back to the operating system."""

import ctypes
import gc
import sys


def give_back_memory() -> None:
    """Collects garbage, and has the C library give back what it keeps of freed memory.

    glibc keeps blocks of less than 32 MB, as most weights are: over half of a dropped SD 1.5 stays
    resident, beside the model that is loaded next.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
