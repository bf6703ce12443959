"""Workers and ranks, and the end of the process that started them."""

import os
import subprocess
import sys
from pathlib import Path

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
SERVED = """
import multiprocessing, os, signal
from torch.utils.data import DataLoader
from blackpoint.data.files import signals
signals.LOOK_EVERY_S = 0.05
if __name__ == "__main__":
    batches = iter(DataLoader(
        list(range(4)), num_workers=1, multiprocessing_context="forkserver",
        worker_init_fn=signals.leave_signals_to_parent(),
    ))
    assert [batch.item() for batch in batches] == [0, 1, 2, 3]
    print("whole")
"""
RANK = """
import os, sys, time
from blackpoint.train.cluster import cluster
cluster.LOOK_EVERY_S = 0.05
parent = os.getpid()
cluster.end_with_first_process()
if os.fork():
    os._exit(0)  # killed before the other has begun
while os.getppid() == parent:
    time.sleep(0.01)
os.environ["LOCAL_RANK"] = "1"
cluster.end_with_first_process()
time.sleep(3600)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are not forked here")
def test_a_worker_whose_parent_died_before_it_began_ends() -> None:
    """It holds the parent's output open: whoever reads that would wait for ever."""
    run = subprocess.run(
        [sys.executable, "-c", ORPHAN], capture_output=True, timeout=PATIENCE_S, check=False
    )
    assert run.returncode == 0 and not run.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_rank_whose_first_process_died_before_they_met_ends() -> None:
    names = ("LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_STEP_ID")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RANK],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        env={name: value for name, value in os.environ.items() if name not in names},
    )
    assert run.returncode == 0
    assert run.stderr.splitlines() == [
        "the first process of this run is gone; the same command continues it"
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_worker_that_a_fork_server_starts_stays_with_who_asked_for_it(tmp_path: Path) -> None:
    """Its parent is the server: Python 3.14 starts workers so."""
    script = tmp_path / "served.py"
    script.write_text(SERVED)
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, timeout=PATIENCE_S, check=False
    )
    assert run.returncode == 0 and run.stdout == b"whole\n"
