"""The page's search: `blackpoint search` in a process of its own, read from its folder as it grows.

candidates.jsonl has a row for each candidate; of those that lead, bests/ has the image until the
prompt is done, and then images/ the winner, the plain image beside it and the contact sheet.
"""

import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.runtime.pictures import to_picture
from blackpoint.sampling.search.journal import ROWS, rows_by_key
from blackpoint.sampling.search.winners import BESTS, read_winners
from blackpoint.scripts.show.config import ShowConfig
from blackpoint.scripts.show.models import png_uri
from blackpoint.scripts.verb_process import verb_command

KEYS = ("seed", "num_steps", "guidance_scale", "guidance_rescale", "sampler", "budget_nfe")
"""Keys of `blackpoint search` that the page may set; none names a file or a module."""
LOOK_EVERY_S, LONGEST_S = 0.2, 20.0


class PageSearch:
    """At most one search, that of the page, in folders below `output`."""

    def __init__(self, config: ShowConfig, output: Path) -> None:
        self._config, self._output, self._folder = config, output, output
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()  # each request has a thread

    def start(self, prompt: str, target: float, **asked: Any) -> Mapping[str, Any]:
        """Starts a search in a new folder, and stops the one before it."""
        self._output.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="search_", dir=self._output))
        values = {key: asked[key] for key in KEYS if key in asked}
        values |= {"prompts": json.dumps([prompt]), "output": folder, "batch_size": 4}
        values |= {"checkpoint": self._config.checkpoint, "device": self._config.device}
        if self._config.search is None:
            goal = {"kind": "luminance", "target": target}
            values |= {f"verifiers.luminance.{key}": value for key, value in goal.items()}
        lines = [f"{key}={value}" for key, value in values.items()]
        command = verb_command("search", *filter(None, [self._config.search]), *lines)
        with self._lock, folder.with_suffix(".log").open("wb") as errors:
            self.stop()
            self._folder = folder
            self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        return {}

    def stop(self) -> Mapping[str, Any]:
        """Ends the search that is under way; what it found stays."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()
                self._process.wait()
        return {}

    def state(self, known: int, shown: int) -> Mapping[str, Any]:
        """Waits for more than the `known` candidates, or the end; returns what there is.

        Points are (NFE, best score so far); tiles are those of the leaders from number `shown` on,
        at the end plain image, winner and sheet. Raises UserError where the search has failed.
        """
        with self._lock:
            process, folder = self._process, self._folder
        if process is None:
            raise UserError("no search has been started; start one")
        until_s, status, rows = time.monotonic() + LONGEST_S, process.poll(), _rows(folder)
        while status is None and len(rows) <= known and time.monotonic() < until_s:
            time.sleep(LOOK_EVERY_S)
            status, rows = process.poll(), _rows(folder)
        if status:
            said = folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
            raise UserError(said.strip().rpartition("blackpoint: ")[2] or f"status {status}")
        points, leaders = [], list[dict[str, Any]]()
        for row in rows:
            if row["goal"] == "final" and row["score"] is not None:
                if not leaders or row["score"] > leaders[-1]["score"]:
                    leaders.append(row)
                points.append((row["nfe_so_far"], leaders[-1]["score"]))
        done = status is not None
        tiles = _winner(folder) if done else [_tile(folder, row) for row in leaders[shown:]]
        kept = str(folder) if done and self._config.output else ""
        return dict(known=len(rows), points=points, done=done, tiles=tiles, folder=kept)


def _rows(folder: Path) -> list[dict[str, Any]]:
    return list(rows_by_key(folder, ROWS, ("candidate",)).values())


def _tile(folder: Path, row: Mapping[str, Any]) -> tuple[str, str]:
    path = folder / BESTS / "000000" / f"{row['candidate']:06d}.safetensors"
    try:
        image = png_uri(to_picture(load_file(path)["image"]))
    except OSError:  # it has just ended
        image = ""
    return image, f"candidate {row['candidate']}: {row['score']:.4f}"


def _winner(folder: Path) -> list[tuple[str, str]]:
    row = read_winners(folder)[0]
    files = {row["image"]: f"winner: {row['score']:.4f}"}
    if plain := row["baseline"]:
        files = {plain["image"]: f"first seed, {plain['seed']}"} | files
    files[str(Path(row["image"]).with_suffix(".sheet.png"))] = "from the first to the best"
    return [(png_uri(Image.open(folder / file)), text) for file, text in files.items()]
