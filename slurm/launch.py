"""The batch script's side of a SLURM job: `launch.py VERB [CONFIG.yaml] [key=value ...]`.

Runs from the repository at a job's first start, and from the run's frozen copy after that.
"""

import sys

import this_code  # noqa: F401

if __name__ == "__main__":
    from blackpoint.scripts.cluster.slurm_job import main

    sys.exit(main(sys.argv[1:]))
