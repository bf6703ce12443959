"""Notes that would come without end: the first ones are given, the rest are counted.

    if first("texts longer than the text encoder reads"):
        log.warning(...)

At the end of the command, or of the process, one line says how many there were in all.
"""

import logging
import multiprocessing.util
import os

log = logging.getLogger(__name__)

_counts: dict[str, int] = {}
_shown: dict[str, int] = {}


def first(kind: str, most: int = 1) -> bool:
    """Counts one more of `kind`, in the plural; returns whether it is among the first `most`."""
    if not _counts:
        # Not atexit, which processes of multiprocessing leave without.
        multiprocessing.util.Finalize(None, tell_counts, exitpriority=1)
    _counts[kind] = _counts.get(kind, 0) + 1
    _shown[kind] = most
    return _counts[kind] <= most


def for_terminal(text: str) -> str:
    """Returns text with control and half characters escaped but for the ends of lines.

    Names and captions of strangers must not move the cursor, colour or rename a terminal.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def tell_counts() -> None:
    """Logs the number of each kind of which not all were said, and forgets it."""
    for kind, count in _counts.items():
        if count > _shown[kind]:
            named = "the first is" if _shown[kind] == 1 else f"the first {_shown[kind]} are"
            log.warning("note: %s: %d in all; %s named above", kind, count, named)
    forget()


def forget() -> None:
    _counts.clear()
    _shown.clear()


os.register_at_fork(after_in_child=forget)
