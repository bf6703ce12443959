"""What a search leaves for each prompt: the winner's picture, its noise, its row, a contact sheet.

The image of every candidate that may win is kept, unrounded, until its prompt is finished, so that
a killed search has all it needs. A picture carries the settings that made it as PNG text.
"""

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from torch import Tensor

from blackpoint.data.files.plain import recorded
from blackpoint.sampling.runtime.pictures import caption_grid, read_picture, to_picture
from blackpoint.sampling.runtime.sharing import files_of
from blackpoint.sampling.samplers import SampleState
from blackpoint.sampling.search.journal import read_rows
from blackpoint.sampling.search.search import PromptSearch
from blackpoint.sampling.search.trial import Given, Neighbour, Noise, Outcome, Result

BESTS, IMAGES, WINNERS = "bests", "images", "winners.jsonl"
BASELINE = "baseline"
MAX_SHEET = 12


class Winners:
    """Writes to `folder`; `settings` goes into every picture."""

    def __init__(
        self,
        folder: Path,
        prompts: Mapping[int, str],
        settings: Mapping[str, Any],
        shape: Sequence[int],
    ) -> None:
        self.folder, self.prompts, self.settings, self.shape = folder, prompts, settings, shape
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)

    def keep(self, one: PromptSearch, result: Result) -> None:
        """Keeps the image of a candidate that may win."""
        self._keep(one, result, result.outcome.trial.candidate)

    def keep_baseline(self, one: PromptSearch, result: Result) -> None:
        """Keeps the plain image of a prompt, which an algorithm of parts does not make."""
        self._keep(one, result, BASELINE)

    def baseline(self, one: PromptSearch) -> Tensor | None:
        """Returns the plain image of the prompt's first seed, or None where there is none."""
        for name in (BASELINE, 0):
            path = self._best_path(one.problem.prompt_index, name)
            if path.is_file():
                return load_file(path)["image"]
        return None

    def finish(self, one: PromptSearch, reproducible: bool) -> tuple[dict[str, Any], Tensor]:
        """Writes picture, noise and contact sheet of a finished prompt; returns row and image.

        `reproducible`: a seed alone re-makes what starts from it, as with deterministic samplers
        and whole runs.
        """
        index, best = one.problem.prompt_index, one.best
        assert best is not None
        start = best.trial.start
        seed = (
            best.trial.seed if reproducible and not isinstance(start, Neighbour | Given) else None
        )
        row = {
            "prompt_index": index,
            "prompt": self.prompts[index],
            "candidate": best.trial.candidate,
            "seed": seed,
            "score": best.score,
            "scores": recorded(best.scores),
            "nfe": one.spent_nfe,
            "rejected": one.num_rejected,
            "note": one.note,
            "image": f"{IMAGES}/{index:06d}.png",
        }
        image = load_file(self._best_path(index, best.trial.candidate))["image"]
        about = PngInfo()
        about.add_text("blackpoint", json.dumps({**self.settings, **row}))
        to_picture(image).save(self.folder / str(row["image"]), pnginfo=about)
        if seed is None:
            self._keep_start(index, start)
        self._contact_sheet(one)
        return row, image

    def save_baseline(self, one: PromptSearch, image: Tensor) -> str:
        """Writes the picture of a baseline; returns its name in the folder."""
        name = f"{IMAGES}/{one.problem.prompt_index:06d}.baseline.png"
        to_picture(image).save(self.folder / name)
        return name

    def picture(self, row: Mapping[str, Any]) -> Tensor:
        """Returns a winner as its file has it, the same after a kill: (3, H, W) in [0, 1]."""
        return read_picture(self.folder / str(row["image"]))

    def forget(self, one: PromptSearch) -> None:
        """Removes what only a prompt without a row needs."""
        shutil.rmtree(self.folder / BESTS / f"{one.problem.prompt_index:06d}", ignore_errors=True)
        with contextlib.suppress(OSError):  # others are still searched
            (self.folder / BESTS).rmdir()

    def _keep_start(self, index: int, start: Any) -> None:
        """Keeps what no seed re-makes: the noise, or the state that the last part began from."""
        name = self.folder / IMAGES / f"{index:06d}"
        if isinstance(start, Noise):
            save_file({"noise": start.noise(self.shape)}, f"{name}.noise.safetensors")
        elif isinstance(start, SampleState):
            state = {"x": start.x[0].contiguous(), "step": torch.tensor(start.step)}
            if start.x0 is not None:  # what a multistep sampler remembers
                state["x0"] = start.x0[0].contiguous()
            save_file(state, f"{name}.state.safetensors")

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

    def _keep(self, one: PromptSearch, result: Result, name: int | str) -> None:
        path = self._best_path(one.problem.prompt_index, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        assert result.image is not None
        save_file({"image": result.image.contiguous()}, path)

    def _best_path(self, index: int, name: int | str) -> Path:
        return self.folder / BESTS / f"{index:06d}" / f"{name:0>6}.safetensors"


def read_winners(folder: Path) -> dict[int, dict[str, Any]]:
    """Reads the winners.jsonl of all processes by prompt; a torn last line is left out."""
    found: dict[int, dict[str, Any]] = {}
    for path in files_of(folder, WINNERS):
        for row in read_rows(path, repair=False):
            found[row["prompt_index"]] = row
    return found
