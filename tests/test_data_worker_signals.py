"""A loader's workers and the end of the process that started them."""

import os
import subprocess
import sys

import pytest

from tests.waiting import PATIENCE_S

ORPHAN = """
import os, sys, time
from blackpoint.data.files import signals
signals.LOOK_EVERY_S = 0.05
parent = os.getpid()
init = signals.leave_signals_to_parent()
if os.fork():
    os._exit(0)  # killed before its worker has begun
while os.getppid() == parent:
    time.sleep(0.01)
init(0)
time.sleep(3600)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are not forked here")
def test_a_worker_whose_parent_died_before_it_began_ends() -> None:
    """It holds the parent's output open: whoever reads that would wait for ever."""
    run = subprocess.run(
        [sys.executable, "-c", ORPHAN], capture_output=True, timeout=PATIENCE_S, check=False
    )
    assert run.returncode == 0 and not run.stderr
