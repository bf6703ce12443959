"""The results of a search for each prompt: the winner's image, noise and row, a contact sheet.

The image of every candidate that may win is kept, unrounded, until its prompt is finished, so that
a killed search has all it needs. An image carries the settings that made it as PNG text.
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
from blackpoint.sampling.grid import SampleState
from blackpoint.sampling.prompts.prompt_set import Prompt
from blackpoint.sampling.runtime.pictures import caption_grid, read_picture, to_picture
from blackpoint.sampling.runtime.sharing import files_of
from blackpoint.sampling.search.driver import PromptSearch
from blackpoint.sampling.search.journal import read_rows
from blackpoint.sampling.search.judge import judge
from blackpoint.sampling.search.problem import Given, Neighbour, Noise, Outcome, Result
from blackpoint.sampling.search.setup import Loaded

BESTS, IMAGES, WINNERS = "bests", "images", "winners.jsonl"
BASELINE = "baseline"
MAX_SHEET = 12


class Winners:
    """Writes to `folder`; `settings` goes into every image."""

    def __init__(
        self,
        folder: Path,
        prompts: Mapping[int, str],
        settings: Mapping[str, Any],
        shape: Sequence[int],
    ) -> None:
        self.folder, self.prompts, self.settings, self.shape = folder, prompts, settings, shape
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)

    def keep(self, one: PromptSearch, result: Result, name: int | str | None = None) -> None:
        """Keeps the image of a candidate that may win, under its number or another name."""
        name = result.outcome.trial.candidate if name is None else name
        path = self._best_path(one.problem.prompt_index, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        assert result.image is not None
        save_file({"image": result.image.contiguous()}, path)

    def baseline(self, one: PromptSearch) -> Tensor | None:
        """Returns the plain image of the prompt's first seed, or None where there is none."""
        for name in (BASELINE, 0):
            path = self._best_path(one.problem.prompt_index, name)
            if path.is_file():
                return load_file(path)["image"]
        return None

    def finish(self, one: PromptSearch, reproducible: bool) -> tuple[dict[str, Any], Tensor]:
        """Writes image, noise and contact sheet of a finished prompt; returns row and image.

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
        """Writes the image of a baseline; returns its name in the folder."""
        name = f"{IMAGES}/{one.problem.prompt_index:06d}.baseline.png"
        to_picture(image).save(self.folder / name)
        return name

    def picture(self, row: Mapping[str, Any]) -> Tensor:
        """Returns a winner as its file has it, the same after a kill: (3, H, W) in [0, 1]."""
        return read_picture(self.folder / str(row["image"]))

    def forget(self, one: PromptSearch) -> None:
        """Removes the files that only a prompt without a row needs."""
        shutil.rmtree(self.folder / BESTS / f"{one.problem.prompt_index:06d}", ignore_errors=True)
        with contextlib.suppress(OSError):  # others are still searched
            (self.folder / BESTS).rmdir()

    def _keep_start(self, index: int, start: Any) -> None:
        """Keeps a start that no seed reproduces: the noise, or the state before the last part."""
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
        titles = [f"candidate {outcome.trial.candidate}: {outcome.score:.4f}" for outcome in bests]
        sheet = caption_grid([self.prompts[index]], [pictures], titles)
        sheet.save(self.folder / IMAGES / f"{index:06d}.sheet.png")

    def _best_path(self, index: int, name: int | str) -> Path:
        return self.folder / BESTS / f"{index:06d}" / f"{name:0>6}.safetensors"


class WinnerRows:
    """Appends a row to winners.jsonl in `own` for each prompt that is finished.

    `plain` has the outcomes of plain images that the algorithm does not make. Oracles are told of
    every winner, those of earlier starts included.
    """

    def __init__(
        self,
        part: Path,
        winners: Winners,
        prompts: Mapping[int, Prompt],
        loaded: Loaded,
        plain: Mapping[int, Outcome],
        reproducible: bool,
    ) -> None:
        self._winners, self._prompts, self._loaded = winners, prompts, loaded
        self._plain, self._reproducible = plain, reproducible
        for row in read_winners(winners.folder).values():
            self._tell_oracles(row)
        if (part / WINNERS).is_file():
            read_rows(part / WINNERS)  # a torn last line is cut off before the next is written
        self._file = (part / WINNERS).open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file; every row is in it already."""
        self._file.close()

    def finish(self, one: PromptSearch) -> None:
        """Judges the winner of a prompt and the plain image beside it, and writes the row."""
        index = one.problem.prompt_index
        row, image = self._winners.finish(one, self._reproducible)
        self._tell_oracles(row)
        first = self._plain.get(index) or first_of(one)
        baseline = self._winners.baseline(one) if first else None
        pictures = [image] if baseline is None else [image, baseline]
        judged = judge(self._loaded.held_out, pictures, self._prompts[index].text)
        row |= {"category": self._prompts[index].category, "held_out": judged[0], "baseline": None}
        if first is not None and baseline is not None:
            row["baseline"] = {
                "seed": first.trial.seed,
                "scores": recorded(first.scores),
                "held_out": judged[1],
                "image": self._winners.save_baseline(one, baseline),
            }
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._winners.forget(one)
        assert one.best is not None
        one.finals = [one.best]  # the states of the others are of no more use

    def _tell_oracles(self, row: Mapping[str, Any]) -> None:
        for oracle in self._loaded.oracles:
            oracle.keep(self._winners.picture(row))


def first_of(one: PromptSearch) -> Outcome | None:
    """Returns the first candidate where it is a whole image with a score."""
    return next((outcome for outcome in one.finals if outcome.trial.candidate == 0), None)


def read_winners(folder: Path) -> dict[int, dict[str, Any]]:
    """Reads the winners.jsonl of all processes by prompt; a torn last line is left out."""
    by_prompt: dict[int, dict[str, Any]] = {}
    for path in files_of(folder, WINNERS):
        for row in read_rows(path, repair=False):
            by_prompt[row["prompt_index"]] = row
    return by_prompt
