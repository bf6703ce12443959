"""Signals that reach a verb which the same command continues."""

import os
import signal
import time

import pytest

from blackpoint.data.files.errors import Resumable, UserError
from blackpoint.data.files.signals import deferred, received, stop_if_asked, stoppable


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


BOTH = pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, Resumable), (signal.SIGINT, KeyboardInterrupt)]
)


@BOTH
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_python_drops_is_made_good_at_the_next_safe_point(
    number: int, raised: type[BaseException]
) -> None:
    reached = list[str]()
    with pytest.raises(raised), stoppable():
        Dies(number)
        reached.append("what follows")
        stop_if_asked()
        reached.append("the next")
    assert reached == ["what follows"]


@BOTH
def test_after_the_first_safe_point_a_signal_waits_for_the_next(
    number: int, raised: type[BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    """What is half done between two of them is ended, and an error there is an error."""
    done = list[str]()
    with pytest.raises(raised), stoppable():
        stop_if_asked()
        os.kill(os.getpid(), number)
        done.append("half")
        done.append("whole")
        stop_if_asked()
        done.append("more")
    assert done == ["half", "whole"]
    assert f"{signal.Signals(number).name}: finishing what is under way" in capfd.readouterr().err
    with pytest.raises(UserError, match="no such file"), stoppable():
        stop_if_asked()
        os.kill(os.getpid(), number)
        raise UserError("no such file")


@pytest.mark.parametrize("has_safe_points", [False, True])
def test_what_tidies_up_is_not_stopped_again(
    has_safe_points: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM sends SIGUSR1, then SIGTERM; tidying up may take longer than safe points are apart."""
    tidied = list[bool]()
    with pytest.raises(Resumable, match="SIGUSR1"), stoppable():
        if has_safe_points:
            stop_if_asked()
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            stop_if_asked()
        finally:
            monkeypatch.setattr("blackpoint.data.files.signals.NO_SAFE_POINT_S", 0.0)
            os.kill(os.getpid(), signal.SIGTERM)
            tidied.append(True)
    assert tidied


def test_a_second_ctrl_c_acts_at_once() -> None:
    reached = list[str]()
    with pytest.raises(KeyboardInterrupt), stoppable():
        stop_if_asked()
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("the first")
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("the second")
    assert reached == ["the first"]


def test_who_defers_a_stop_looks_at_the_flag_alone() -> None:
    """Pictures that a training step shows pass safe points, where the step must not end."""
    with stoppable():
        with deferred("this step"):
            os.kill(os.getpid(), signal.SIGTERM)
            stop_if_asked()
            assert received() == "SIGTERM"
        assert not received()


def test_outside_a_verb_a_safe_point_does_nothing() -> None:
    stop_if_asked()
    assert not received()
