"""What stops a data command on purpose: each class is one exit status of the command line."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Says which field or file is wrong, what the rule is and what to do about it.

    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_without_traceback(message, type(self)))


class RunFailed(RuntimeError):
    """Says what failed on the way, such as a full disk, and how to go on (exit status 1)."""

    def __init__(self, message: str) -> None:
        super().__init__(_without_traceback(message, type(self)))


class Unreachable(RunFailed):
    """A server did not answer: the same command goes on when it does (`train`: exit status 75)."""


class WriteFailed(Exception):
    """A file that is being made can't be written; the message is the system's reason."""


@contextmanager
def disk_writes() -> Iterator[None]:
    """Turns an OSError of what is done inside into WriteFailed: reading fails for other reasons."""
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
