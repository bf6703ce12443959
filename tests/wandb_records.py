"""What wandb's own reader of offline runs finds in their files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def wandb_records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Reads the records of one kind, such as history, of a folder's offline runs, oldest first."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        records = map(json.loads, answer.stdout.splitlines())
        found += [record[kind] for record in records if record["type"] == kind]
    return found
