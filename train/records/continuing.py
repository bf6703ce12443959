"""Whether a command may continue the run that a run directory holds, and by which rules it goes on.

A key that train/records/resume_keys.py does not list makes another run; data and base count by what
they hold (train/records/run_identity.py), and a longer run must repeat the learning rates of the
steps done.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.config.learning_rate import (
    learning_rate_factor,
    settled_rate,
    with_learning_rate,
)
from blackpoint.train.records.resume_keys import When, images_per_step, rule_of
from blackpoint.train.records.run_directory import ABSENT, CONFIG, RunRecord, differing_keys

SECTIONS = {When.SAME_DATA: "data", When.SAME_BASE: "base"}
"""Of identity.json: digests of data and base."""
UNKNOWN_CONTENT = {
    "data": "its data hold: continue it once with the data where they were, and it knows them",
    "base": "its base holds: continue it once with the base where it was, and it knows it",
}
# A run that is older than this key keeps the rule of its time: max(w, floor) at every timestep.
FLOOR_KEY = "loss.floor_where"
# What a run writes; other files, such as shards, may lie in its directory from the start.
WRITTEN = ("checkpoints", "metrics.csv", "previews", "export", "export_lora", "exports")


def check_continues(run_dir: Path, config: TrainConfig) -> RunRecord:
    """Returns the record of the run in `run_dir`, which may be new.

    Raises UserError where it is a run of another config, or parts of a run.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run_dir={run_dir} is a file; name a directory")
    record = RunRecord.read(run_dir)
    if record.is_new:
        if taken := [name for name in WRITTEN if (run_dir / name).exists()]:
            raise UserError(
                f"run_dir={run_dir} holds {taken[0]} but no run ({CONFIG} is missing); nothing "
                "is overwritten: choose another run_dir"
            )
        return record
    config = with_learning_rate(config)
    old, new = record.compared(config)
    refused = [key for key in differing_keys(old, new) if _is_refused(key, old, new, record)]
    if refused:
        raise UserError(_another_config(record, refused, old, new))
    _check_length(record, config)
    return record


def _is_refused(key: str, old: dict[str, Any], new: dict[str, Any], record: RunRecord) -> bool:
    """Tells whether another value of a key makes another run."""
    rule = rule_of(key)
    match rule and rule.when:
        case When.ALWAYS | When.SAME_RATE:  # the rate is checked when all keys may change
            return False
        case When.SAME_STEP:
            return new["data.buckets.enabled"] or images_per_step(old) != images_per_step(new)
        case When.SAME_DATA | When.SAME_BASE as kind:
            return SECTIONS[kind] not in record.identity
        case _:
            return not (key == FLOOR_KEY and record.began_before(FLOOR_KEY))


def _another_config(
    record: RunRecord, refused: list[str], old: dict[str, Any], new: dict[str, Any]
) -> str:
    rows = [f"  {key}: {old.get(key, ABSENT)} there, {new.get(key, ABSENT)} now" for key in refused]
    rules = [rule for key in refused if (rule := rule_of(key))]
    unknown = sorted({SECTIONS[rule.when] for rule in rules if rule.when in SECTIONS})
    return (
        f"run_dir={record.run_dir} holds a run of another config:\n"
        + "\n".join(rows)
        + f"\nchoose another run_dir{_fork(record)}, or continue that run with its own values"
        + "".join(
            f"; this run did not record what {UNKNOWN_CONTENT[name]} anywhere" for name in unknown
        )
    )


def _fork(record: RunRecord) -> str:
    """Returns the words for another run from this one's weights; none before it has any."""
    if not (record.newest_step or record.is_exported):
        return ""
    return (
        f" (checkpoint={record.run_dir} run_dir={record.run_dir}_2 starts a new one from these "
        "weights)"
    )


def _check_length(record: RunRecord, config: TrainConfig) -> None:
    """Raises UserError for a trainer.max_steps that conflicts with the steps done."""
    before, wanted, done = (
        record.values["trainer.max_steps"],
        config.trainer.max_steps,
        record.steps_done,
    )
    where = f"trainer.max_steps={wanted}: run_dir={record.run_dir}"
    if wanted < done:
        raise UserError(
            f"{where} has done {done} steps already; set trainer.max_steps to that or more, or "
            "choose another run_dir"
        )
    if wanted == before or not done:
        return
    if wanted > done and not record.newest_step:
        raise UserError(
            f"{where} was exported after {done} steps and holds no checkpoints to go on from; "
            f"start another run from its export, checkpoint={record.run_dir / 'export'}"
        )
    settings, rate = config.optimizer, settled_rate(config.optimizer)
    step = min(done, wanted - 1)  # the next one, whose rate the checkpoint holds already
    then, now = (learning_rate_factor(step, settings, steps) for steps in (before, wanted))
    if then != now:
        raise UserError(
            f"{where} was begun with trainer.max_steps={before}, and with "
            f"optimizer.decay={settings.decay} its learning rate falls to 0 there: step {step + 1} "
            f"has {rate * then:.3g} and would have had {rate * now:.3g}; continue it with "
            f"trainer.max_steps={before}, or choose another "
            f"run_dir{_fork(record)}"
        )


def as_started(record: RunRecord, config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Returns the config that a run goes on with, and notes on differences from a new run's.

    That is `config` itself but for a run that is older than loss.floor_where and whose weights that
    key would change: its floor holds at every timestep, as it did when the run was started.
    """
    if not record.began_before(FLOOR_KEY):
        return config, []
    notes = []
    kind = config.loss.prediction_type
    validates = config.trainer.validate_every_steps and config.data.validation_shards
    if validates and kind != "v_prediction":
        notes.append(
            f"validation/loss is the error in v from here on; that of the network's own output, "
            f"which earlier rows and best.json hold, goes on as validation/{kind}_loss"
        )
    if config.loss.weighting != "uniform" and config.loss.floor_where != "everywhere":
        notes.append(
            f"{record.run_dir} was started with loss.floor at every timestep, and goes on with the "
            "same weights (loss.floor_where=everywhere); a new run lifts those of SNR below 1 alone"
        )
        config = replace(config, loss=replace(config.loss, floor_where="everywhere"))
    return config, notes
