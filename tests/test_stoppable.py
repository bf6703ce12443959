"""Signals that reach a verb which the same command continues."""

import os
import signal
import sys
import time

import pytest

from blackpoint.data.files.errors import Resumable, UserError
from blackpoint.scripts.verbs.stoppable import stoppable


def interrupted_in_a_library(number: int) -> None:
    """Is a compiled library that turns what interrupted it into its own error, as PyO3 does."""
    try:
        os.kill(os.getpid(), number)
        time.sleep(1)
    except BaseException:
        raise ValueError("could not determine the shape of an object") from None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_that_a_library_turned_into_an_error_is_still_a_stop(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    said = f"stopped by {number.name}; the same command continues"
    with pytest.raises(Resumable, match=said), stoppable():
        interrupted_in_a_library(number)
    assert signal.getsignal(number) is before


def test_ctrl_c_that_a_library_turned_into_an_error_is_still_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stoppable():
        interrupted_in_a_library(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_that_no_signal_preceded_stays_what_it_is() -> None:
    with pytest.raises(UserError, match="no such file"), stoppable():
        raise UserError("no such file")


class Dies:
    """Gets the signal while Python deletes it, where nothing can be raised."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, Resumable), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_stop_that_python_drops_is_raised_again(
    number: int, raised: type[BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    before = sys.unraisablehook, signal.getsignal(signal.SIGALRM)
    reached = list[str]()
    with pytest.raises(raised), stoppable():
        Dies(number)
        time.sleep(5)
        reached.append("what follows")
    assert not reached
    assert (sys.unraisablehook, signal.getsignal(signal.SIGALRM)) == before
    assert "Traceback" not in capfd.readouterr().err
