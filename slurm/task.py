"""One task of srun: the `blackpoint` command from the code beside this file.

The folder above this one comes first on the path, so that a run's frozen copy runs itself, whatever
the working directory holds. A failure of the task's own is told apart from one that another task's
end caused: it leaves a mark for slurm/launch.py.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from blackpoint.scripts.cli import entry

    try:
        entry()
    except SystemExit as end:
        if end.code in (1, 2) and "BLACKPOINT_FAILED" in os.environ:
            Path(os.environ["BLACKPOINT_FAILED"]).touch()
        raise
