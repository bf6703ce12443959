"""Weights & Biases: one run there for a run directory, however often it is resumed.

Rows can't be taken back there. A run that was killed goes on from a step before its last row, and
computes those numbers again: what was sent already is not sent twice. On a CPU they are the same to
the bit; on a GPU, whose kernels need not add in the same order twice, rows at wandb and those of
metrics.csv may then differ, as two runs do. Which were sent is kept in wandb/sent.json, for
metrics.csv is cut back to the checkpoint at every start.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.runtime.tracking import start_run, trained_by
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.records.metrics_file import rows_after

PICTURES = ("previews", "preview_table")


class ResumedWandbLogger(WandbLogger):
    """Passes on all but what was passed on before, given as (step, name)."""

    def __init__(self, experiment: Any, save_dir: Path, logged: Set[tuple[int, str]]) -> None:
        super().__init__(experiment=experiment, save_dir=save_dir)
        self.logged = logged

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs numbers, and the pictures that belong to preview/*, which came before those."""
        new = {name: value for name, value in metrics.items() if (step, name) not in self.logged}
        if any(logged == step and name.startswith("preview/") for logged, name in self.logged):
            new = {name: value for name, value in new.items() if name not in PICTURES}
        if new:
            super().log_metrics(new, step)


def wandb_logger(
    config: TrainConfig, run_dir: Path, logged: Set[tuple[int, str]] = frozenset()
) -> WandbLogger:
    """Starts or continues the run: online if wandb knows us and answers, else offline and says so.

    For the first process only; call `.experiment.finish()` at the end. `logged` are the
    rows, (step, name), beyond the checkpoint that the run continues from: sent already.
    """
    experiment = start_run(config.wandb, run_dir, dataclasses.asdict(config))
    experiment.define_metric("trainer/global_step")
    experiment.define_metric("*", step_metric="trainer/global_step")
    return ResumedWandbLogger(experiment, run_dir, logged)


def send_artifacts(config: TrainConfig, run_dir: Path) -> None:
    """Sends a finished training's exports, and its checkpoints where asked for, as artifacts of its
    run: <run id>-export and so on, by name of the folder, with the step as alias.

    Files are uploaded, or kept for `wandb sync`, from where they lie. A failure is a note.
    """
    wanted = config.wandb.artifacts if config.wandb.enabled else "none"
    paths = [run_dir.resolve() / name for name in ("export", "export_lora") if wanted != "none"]
    if wanted == "all":
        paths += sorted((run_dir.resolve() / "checkpoints").glob("*.ckpt"))
    if not paths:
        return
    import wandb

    run = start_run(config.wandb, run_dir, dataclasses.asdict(config))
    step = config.trainer.max_steps
    made = {"step": step, "base": config.checkpoint, "run_dir": str(run_dir.resolve())}
    made |= {f"trained_by/{name}": value for name, value in trained_by(config.checkpoint).items()}
    try:
        for path in filter(Path.exists, paths):
            kind = "checkpoint" if path.suffix == ".ckpt" else "model"
            artifact = wandb.Artifact(f"{run.id}-{path.stem}", kind, metadata=made)
            add = artifact.add_dir if path.is_dir() else artifact.add_file
            add(str(path), policy="immutable")
            run.log_artifact(artifact, aliases=[f"step-{step}"] if kind == "model" else [])
        run.finish()
    except Exception as error:
        print(f"note: wandb took no artifacts ({type(error).__name__}: {error})", file=sys.stderr)


def finish(logger: WandbLogger) -> None:
    """Ends the run at wandb; a service that is gone costs its last rows, not the training."""
    try:
        logger.experiment.finish()
    except Exception as error:
        print(
            f"note: wandb did not finish ({type(error).__name__}: {error}); metrics.csv is whole",
            file=sys.stderr,
        )


def sent_rows(run_dir: Path, resume_step: int) -> set[tuple[int, str]]:
    """Returns (step, name) of the rows beyond `resume_step` that earlier starts have sent.

    Must come before metrics.csv is cut back to that step; what is returned is kept for later
    starts. None without run_dir/wandb: nothing was sent yet.
    """
    path = run_dir / "wandb" / "sent.json"
    if not path.parent.is_dir():
        return set()
    try:
        kept = json.loads(path.read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):  # ValueError: emptied by a power failure
        kept = []
    sent = {(step, name) for step, name in kept if step > (resume_step or -1)}
    sent |= rows_after(run_dir / "metrics.csv", resume_step)
    write_whole(path, json.dumps(sorted(sent)))
    return sent
