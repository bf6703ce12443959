"""A sweep through a real SLURM array of two emulated nodes, with elements killed at random."""

import json
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

from tests.slurm_cluster import MARKS, Cluster
from tests.test_slurm import logs_of, make_checkout
from tests.test_sweep import training

pytestmark = MARKS
TIMEOUT_S = 3600


def test_killed_cells_are_continued_and_finished_ones_left_alone(
    tmp_path: Path, pipeline: Path, shards: Path
) -> None:
    checkout = make_checkout(tmp_path / "checkout", pipeline, shards)
    sweep = {
        "run_dir": "runs/sweep",
        "train": training(Path("base"), shards),
        "evaluate": {
            "prompts": ["a cat on a black background", "a street"],
            "num_images": 4,
            "batch_size": 2,
            "brightness.invariance_prompts": 0,
        },
        "arms": {"plain": {}, "rescaled": {"evaluate.guidance_rescale": 0.3}},
        "grid": {"evaluate.num_steps": [2, 3]},
    }
    (checkout / "sweep.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(sweep)))
    (checkout / "docs").mkdir()
    cluster = Cluster()
    try:
        cluster.start()
        settings = ["config=sweep.yaml", "num_kills=2", "at_once=4", "timeout_s=3000"]
        done = subprocess.run(
            [sys.executable, "-m", "blackpoint.scripts.studies.sweep_study", *settings],
            cwd=checkout,
            env=cluster.environment | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr + logs_of(checkout)
    finally:
        cluster.stop()
    found = json.loads((checkout / "docs" / "sweep_study.json").read_text())
    assert found["cells"] == 4 and found["killed"] > 0 and found["submissions"] >= 1
    assert found["finished_cells_run_again"] == 0 and found["same_table"]
    assert found["report_megabytes"] < 15
    trainings = list((checkout / "runs" / "sweep_study" / "disturbed" / "trainings").glob("*/"))
    assert len(trainings) == 1
