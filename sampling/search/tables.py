"""A search's winners, and what the alarm says of them, as tables at Weights & Biases."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blackpoint.data.files.plain import finite, number
from blackpoint.sampling.runtime.tracking import WandbConfig, start_run
from blackpoint.sampling.search.folder import LEDGER, SETTINGS
from blackpoint.sampling.statistics.hacking_alarm import HackingAlarm

MAX_ROWS = 1000


def send_tables(
    config: WandbConfig, output: Path, rows: Sequence[dict[str, Any]], found: Sequence[HackingAlarm]
) -> None:
    """Sends a row for each winner, at most 1,000, with its picture, and the ledger's sums."""
    if not config.enabled:
        return
    import wandb

    run = start_run(config, output, json.loads((output / SETTINGS).read_text(encoding="utf-8")))
    names = [(f"held-out {name}", "held_out", name) for name in rows[0]["held_out"]]
    names += [(name, "scores", name) for name in rows[0]["scores"]]
    columns = ["prompt", "category", "winner", "plain", "score", "seed", "nfe", "rejected"]
    table = wandb.Table(columns=[*columns, *(title for title, _, _ in names)])
    for row in rows[:MAX_ROWS]:
        plain = row["baseline"]
        table.add_data(
            row["prompt"],
            row["category"],
            wandb.Image(str(output / row["image"])),
            wandb.Image(str(output / plain["image"])) if plain else None,
            *(row[key] for key in ("score", "seed", "nfe", "rejected")),
            *(finite(number(row[key][name])) for _, key, name in names),
        )
    run.log({"winners": table})
    changes = wandb.Table(columns=["searched", "metric", "change", "low", "high", "prompts"])
    for alarm in found:
        for metric, change in alarm.changes.items():
            numbers = (change.value, change.low, change.high, change.n)
            changes.add_data(alarm.searched, metric, *numbers)
    run.log({"changes": changes})
    ledger = json.loads((output / LEDGER).read_text(encoding="utf-8"))
    beside = ledger.pop("beside")
    run.summary.update(ledger | {"beside_nfe": beside["nfe"]})
    run.summary["hacking"] = any(alarm.raised for alarm in found)
    run.finish()
