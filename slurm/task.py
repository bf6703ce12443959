"""One task of srun: the `blackpoint` command from the code beside this file.

A failure of the task's own is told apart from one that another task's end caused: it leaves a mark
for slurm/launch.py.
"""

import os
from pathlib import Path

import this_code  # noqa: F401

if __name__ == "__main__":
    from blackpoint.scripts.cli import entry

    try:
        entry()
    except SystemExit as end:
        if end.code in (1, 2) and "BLACKPOINT_FAILED" in os.environ:
            Path(os.environ["BLACKPOINT_FAILED"]).touch()
        raise
