"""Errors that stop a command on purpose: each class is one exit status of the command line."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
NOT_WRITABLE = (*FULL, *FORBIDDEN)
"""System errors of a disk that takes no more, for a reason that the user can mend."""


class UserError(ValueError):
    """The user's input is wrong (exit status 2); names field or file, value, rule and remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(_without_traceback(message, type(self)))


class NotExportable(UserError):
    """No diffusers folder can hold the model and be sampled as it is sampled here."""


class RunFailed(RuntimeError):
    """The work failed in a foreseen way (exit status 1), such as a full disk; says how to go on."""

    def __init__(self, message: str) -> None:
        super().__init__(_without_traceback(message, type(self)))


class Unreachable(RunFailed):
    """A server did not answer: the same command goes on when it does (`train`: exit status 75)."""


class Resumable(RuntimeError):
    """The run stopped early and the same command continues it (exit status 75)."""


class WriteFailed(Exception):
    """A file that is being made can't be written; the message is the system's reason."""


@contextmanager
def disk_writes() -> Iterator[None]:
    """Turns an OSError of the block into WriteFailed: reading fails for other reasons."""
    try:
        yield
    except OSError as error:
        raise WriteFailed(error.strerror or str(error)) from error


def _without_traceback(message: str, kind: type[Exception]) -> str:
    """Returns the message proper of an error that torch passes on from a worker of its loader.

    It is raised again as `kind(message and traceback)`, whose last part is the message.
    """
    if not message.startswith(f"Caught {kind.__name__} in DataLoader worker"):
        return message
    return message.rpartition(f"{kind.__module__}.{kind.__name__}: ")[2].rstrip()
