"""What a search leaves for each prompt: the winner's picture, its noise, its row, a contact sheet.

The image of every candidate that may win is kept, unrounded, until its prompt is finished, so that
a killed search has all it needs. A picture carries the settings that made it as PNG text.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from torch import Tensor

from sampling.pictures import caption_grid, to_picture
from sampling.search.runner import Result
from sampling.search.search import PromptSearch
from sampling.search.trial import Neighbour, Outcome, Seeded

BESTS, IMAGES, WINNERS = "bests", "images", "winners.jsonl"
MAX_SHEET = 12


class Winners:
    """Writes to `folder`; `settings` goes into every picture."""

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[str],
        settings: Mapping[str, Any],
        shape: Sequence[int],
    ) -> None:
        self.folder, self.prompts, self.settings, self.shape = folder, prompts, settings, shape
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)

    def keep(self, one: PromptSearch, result: Result) -> None:
        """Keeps the image of a candidate that may win."""
        index, candidate = one.problem.prompt_index, result.outcome.trial.candidate
        path = self._best_path(index, candidate)
        path.parent.mkdir(parents=True, exist_ok=True)
        assert result.image is not None
        save_file({"image": result.image.contiguous()}, path)

    def finish(self, one: PromptSearch, reproducible: bool) -> tuple[dict[str, Any], Tensor]:
        """Writes picture, noise and contact sheet of a finished prompt; returns row and image.

        `reproducible`: a seed alone re-makes what starts from it, as with deterministic samplers
        and whole runs.
        """
        index, best = one.problem.prompt_index, one.best
        assert best is not None
        start = best.trial.start
        seed = best.trial.seed if reproducible and not isinstance(start, Neighbour) else None
        row = {
            "prompt_index": index,
            "prompt": self.prompts[index],
            "candidate": best.trial.candidate,
            "seed": seed,
            "score": best.score,
            "scores": {k: None if math.isnan(v) else v for k, v in best.scores.items()},
            "nfe": one.spent_nfe,
            "rejected": one.num_rejected,
            "image": f"{IMAGES}/{index:06d}.png",
        }
        image = load_file(self._best_path(index, best.trial.candidate))["image"]
        about = PngInfo()
        about.add_text("blackpoint", json.dumps({**self.settings, **row}))
        to_picture(image).save(self.folder / str(row["image"]), pnginfo=about)
        if isinstance(start, Seeded | Neighbour) and seed is None:
            noise = start.noise(self.shape)
            save_file({"noise": noise}, self.folder / IMAGES / f"{index:06d}.noise.safetensors")
        self._contact_sheet(one)
        return row, image

    def forget(self, one: PromptSearch) -> None:
        """Removes what only a prompt without a row needs."""
        shutil.rmtree(self.folder / BESTS / f"{one.problem.prompt_index:06d}", ignore_errors=True)
        with contextlib.suppress(OSError):  # others are still searched
            (self.folder / BESTS).rmdir()

    def _contact_sheet(self, one: PromptSearch) -> None:
        """Shows the bests in the order that they were found, from the first to the winner."""
        index = one.problem.prompt_index
        bests: list[Outcome] = []
        for outcome in sorted(one.finals, key=lambda each: each.trial.candidate):
            if one.problem.best_first([*bests, outcome])[0] is outcome:
                bests.append(outcome)
        bests = bests if len(bests) <= MAX_SHEET else [bests[0], *bests[1 - MAX_SHEET :]]
        numbers = [outcome.trial.candidate for outcome in bests]
        images = [load_file(self._best_path(index, number))["image"] for number in numbers]
        pictures = [to_picture(image) for image in images]
        titles = [f"candidate {each.trial.candidate}: {each.score:.4f}" for each in bests]
        sheet = caption_grid([self.prompts[index]], [pictures], titles)
        sheet.save(self.folder / IMAGES / f"{index:06d}.sheet.png")

    def _best_path(self, index: int, candidate: int) -> Path:
        return self.folder / BESTS / f"{index:06d}" / f"{candidate:06d}.safetensors"


def read_winners(folder: Path) -> dict[int, dict[str, Any]]:
    """Reads winners.jsonl by prompt; a torn last line is left out, and its prompt done again."""
    found: dict[int, dict[str, Any]] = {}
    path = folder / WINNERS
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["prompt_index"]] = row
    return found
