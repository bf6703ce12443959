"""What a run was made of, known by content: run_dir/identity.json, a section for each kind.

    data    what each data set holds, by the config's field: data/identity.py
    base    what the run started from, by its parts: train/records/base_identity.py

It is written at the first start. A run from before there was such a record is given it at its next
start, which is said.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.whole_file import write_whole
from blackpoint.data.identity import differences, is_certain
from blackpoint.data.images.decode import DECODER_VERSION, STORED_COLORS

FILE = "identity.json"


def read_identity(run_dir: Path) -> dict[str, Any]:
    """Returns the sections that are recorded; {} for a run from before there was a record."""
    try:
        found = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check_same_data(run_dir: Path, data: Mapping[str, Any]) -> str:
    """Returns a note for the user, or ""; raises UserError where a run began with other data."""
    if not (run_dir / "config.yaml").exists():
        return ""
    before = read_identity(run_dir).get("data")
    if before is None:
        return adopted(run_dir, "data")
    found = differences(before, data)
    if found:
        rows = "\n".join(f"  {row}" for row in found)
        raise UserError(
            f"run_dir={run_dir} holds a run of other data:\n{rows}\nput back the data that it "
            "began with, wherever they lie, or choose another run_dir"
        )
    if is_certain(data) and not is_certain(before):
        return f"{run_dir} knew its data by sizes and places alone; now by their content"
    return ""


def begun_decoder(run_dir: Path) -> int:
    """Returns the version of the decoder of images that a run began with; today's for a new run."""
    if not (run_dir / "config.yaml").exists():
        return DECODER_VERSION
    data_sets = read_identity(run_dir).get("data", {}).values()
    versions = [each.get("decoder", STORED_COLORS) for each in data_sets]
    return min(versions, default=_first_start(run_dir).get("decoder", STORED_COLORS))


def _first_start(run_dir: Path) -> dict[str, Any]:
    """Returns what environment.json says of the first start: it is there where identity.json was
    removed."""
    try:
        record = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
        return dict(record["starts"][0])
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def adopted(run_dir: Path, what: str) -> str:
    """Returns the note on a run from before its data, or its base, were recorded."""
    holds, they = ("holds", "it is") if what == "base" else ("hold", "they are")
    return (
        f"{run_dir} did not record what its {what} {holds}; {they} taken to be what is there now, "
        "and recorded"
    )


def write_identity(run_dir: Path, **sections: Mapping[str, Any]) -> None:
    """Records sections, and leaves others as they are."""
    before = read_identity(run_dir)
    if before | sections != before:
        text = json.dumps(before | sections, separators=(",", ":"))
        write_whole(run_dir / FILE, text + "\n")
