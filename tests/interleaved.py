"""Another process at one exact point of this one's work, played within this process.

Where no lock holds two processes apart, each order of their steps can happen; here one is chosen.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    """Ends what is played to be a killed process."""


def dead_process() -> int:
    """Returns the id of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@contextmanager
def killed_at(owner: Any, name: str) -> Iterator[None]:
    """Ends what runs inside where it calls owner.name, with nothing of its clean-up done."""

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    process = dead_process()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", lambda: process)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            yield


@contextmanager
def other_process_at(owner: Any, name: str, other: Callable[[], Any]) -> Iterator[None]:
    """Runs `other`, from its start to its end, before the first call of owner.name inside."""
    call, is_first, process = getattr(owner, name), True, dead_process()

    def after_the_other(*arguments: Any, **options: Any) -> Any:
        nonlocal is_first
        if is_first:
            is_first = False
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "getpid", lambda: process)
                other()
        return call(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, after_the_other)
        yield
    assert not is_first
