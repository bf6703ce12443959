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
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import interpolate

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.plain import recorded
from blackpoint.sampling.grid import SampleState
from blackpoint.sampling.pipelines.painter import Draw
from blackpoint.sampling.prompts.prompt_set import Prompt
from blackpoint.sampling.runtime.picture_grid import SURROUND, caption_grid
from blackpoint.sampling.runtime.pictures import eight_bit, read_picture, to_picture
from blackpoint.sampling.search.driver import PromptSearch
from blackpoint.sampling.search.folder import WINNERS
from blackpoint.sampling.search.journal import read_rows, rows_by_key
from blackpoint.sampling.search.judge import judge
from blackpoint.sampling.search.problem import Given, Neighbour, Noise, Outcome, Result, Trial
from blackpoint.sampling.verifiers.verifier import SetVerifier, Verifier

BESTS, IMAGES = "bests", "images"
BASELINE = "baseline"
MAX_SHEET = 12
PREVIEWS, PREVIEW_PX = ".previews", 128


class Winners:
    """Writes the images to `folder` and a row for each finished prompt to winners.jsonl in `part`.

    `settings` goes into every image; `reproducible`: a seed alone re-makes what starts from it, as
    with deterministic samplers and whole runs. `oracles` are told of every winner, those of earlier
    starts included.
    """

    def __init__(
        self,
        folder: Path,
        part: Path,
        prompts: Mapping[int, Prompt],
        settings: Mapping[str, Any],
        draw: Draw,
        reproducible: bool,
        held_out: Mapping[str, Verifier],
        oracles: Sequence[SetVerifier] = (),
    ) -> None:
        self._folder, self._prompts, self._settings = folder, prompts, settings
        self._draw, self._reproducible = draw, reproducible
        self._held_out, self._oracles = held_out, oracles
        self.plain: Mapping[int, Outcome] = {}
        """Outcomes of the plain images that the algorithm does not make, by prompt."""
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        for row in read_winners(folder).values():
            self._tell_oracles(row)
        self._rows = part / WINNERS
        self._rows.touch()
        read_rows(self._rows)  # a torn last line is cut off before the next is written

    def keep(self, search: PromptSearch, result: Result, name: int | str | None = None) -> None:
        """Keeps the image of a candidate that may win, under its number or another name."""
        name = result.outcome.trial.candidate if name is None else name
        path = self._best_path(search.problem.prompt_index, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        assert result.image is not None
        save_file({"image": result.image.contiguous()}, path)

    def has_image(self, prompt_index: int, trial: Trial) -> bool:
        """Tells whether the image of a candidate is kept."""
        return self._best_path(prompt_index, trial.candidate).is_file()

    def keep_previews(self, search: PromptSearch, result: Result) -> None:
        """Keeps thumbnails of a run's x0-predictions, by level, and what the run goes on from."""
        trial = result.outcome.trial
        path = self._best_path(search.problem.prompt_index, f"{trial.candidate}{PREVIEWS}")
        path.parent.mkdir(parents=True, exist_ok=True)
        parent = -1 if trial.parent is None or not trial.first_step else trial.parent
        thumbnails = {str(level): _thumbnail(x0) for level, x0 in result.previews.items()}
        save_file({"from": torch.tensor([parent, trial.first_step]), **thumbnails}, path)

    def finish(self, search: PromptSearch) -> None:
        """Judges the winner of a prompt and the plain image beside it; writes images and row."""
        index, best = search.problem.prompt_index, search.best
        assert best is not None
        row, image = self._write_winner(search, best)
        self._tell_oracles(row)
        plain = self.plain.get(index) or next(
            (outcome for outcome in search.finals if outcome.trial.candidate == 0), None
        )
        files = [self._best_path(index, name) for name in (BASELINE, 0)] if plain else []
        baseline = next((load_file(file)["image"] for file in files if file.is_file()), None)
        prompt, pictures = self._prompts[index], [image] if baseline is None else [image, baseline]
        judged = judge(self._held_out, pictures, prompt.text)
        row |= {"category": prompt.category, "held_out": judged[0], "baseline": None}
        if plain is not None and baseline is not None:
            name = f"{IMAGES}/{index:06d}.baseline.png"
            to_picture(baseline).save(self._folder / name)
            row["baseline"] = {
                "seed": plain.trial.seed,
                "scores": recorded(plain.scores),
                "held_out": judged[1],
                "image": name,
            }
        with self._rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shutil.rmtree(self._best_path(index, 0).parent, ignore_errors=True)
        with contextlib.suppress(OSError):  # others are still searched
            (self._folder / BESTS).rmdir()
        search.finals = [best]  # the states of the others are of no more use

    def _write_winner(self, search: PromptSearch, best: Outcome) -> tuple[dict[str, Any], Tensor]:
        """Writes image, noise and contact sheet of a finished prompt; returns row and image."""
        index, start = search.problem.prompt_index, best.trial.start
        has_seed = self._reproducible and not isinstance(start, Neighbour | Given)
        row = {
            "prompt_index": index,
            "prompt": self._prompts[index].text,
            "candidate": best.trial.candidate,
            "seed": best.trial.seed if has_seed else None,
            "score": best.score,
            "scores": recorded(best.scores),
            "nfe": search.spent_nfe,
            "rejected": search.num_rejected,
            "note": search.note,
            "image": f"{IMAGES}/{index:06d}.png",
        }
        path = self._best_path(index, best.trial.candidate)
        if not path.is_file():
            raise UserError(
                f"output={self._folder}: prompt {index} has its candidates, but no row in {WINNERS}"
                f" and no {path.name} in {BESTS}; they were changed or removed: restore them, or "
                "choose another output"
            )
        image = load_file(path)["image"]
        about = PngInfo()
        about.add_text("blackpoint", json.dumps({**self._settings, **row}))
        to_picture(image).save(self._folder / str(row["image"]), pnginfo=about)
        if not has_seed:
            self._keep_start(index, start)
        self._contact_sheet(search)
        return row, image

    def _tell_oracles(self, row: Mapping[str, Any]) -> None:
        """Shows them the winner as its file has it, the same after a kill."""
        for oracle in self._oracles:
            oracle.keep(read_picture(self._folder / str(row["image"])))

    def _keep_start(self, index: int, start: Any) -> None:
        """Keeps a start that no seed reproduces: the noise, or the state before the last part."""
        name = self._folder / IMAGES / f"{index:06d}"
        if isinstance(start, Noise):
            save_file({"noise": start.noise(self._draw).contiguous()}, f"{name}.noise.safetensors")
        elif isinstance(start, SampleState):
            state = {"x": start.x[0].contiguous(), "step": torch.tensor(start.step)}
            if start.x0 is not None:  # what a multistep sampler remembers
                state["x0"] = start.x0[0].contiguous()
            save_file(state, f"{name}.state.safetensors")

    def _contact_sheet(self, search: PromptSearch) -> None:
        """Shows the bests in the order that they were found, from the first to the winner, and
        their runs where previews were kept."""
        index = search.problem.prompt_index
        bests: list[Outcome] = []
        for outcome in sorted(search.finals, key=lambda final: final.trial.candidate):
            if search.problem.best_first([*bests, outcome])[0] is outcome:
                bests.append(outcome)
        bests = bests if len(bests) <= MAX_SHEET else [bests[0], *bests[1 - MAX_SHEET :]]
        files = [self._best_path(index, outcome.trial.candidate) for outcome in bests]
        pictures = [to_picture(load_file(file)["image"]) for file in files]
        titles = [f"candidate {outcome.trial.candidate}: {outcome.score:.4f}" for outcome in bests]
        sheet = caption_grid([self._prompts[index].text], [pictures], titles)
        sheet.save(self._folder / IMAGES / f"{index:06d}.sheet.png")
        runs = [self._previews(index, outcome.trial.candidate) for outcome in bests]
        if not any(runs):
            return
        levels = sorted({level for run in runs for level in run})
        shown = [Image.fromarray(_thumbnail(load_file(file)["image"]).numpy()) for file in files]
        empty = Image.new("RGB", shown[0].size, SURROUND)
        rows = [
            [*(run.get(level, empty) for level in levels), picture]
            for run, picture in zip(runs, shown, strict=True)
        ]
        columns = [*(f"after step {level}" for level in levels), "image"]
        previews = caption_grid(titles, rows, columns)
        previews.save(self._folder / IMAGES / f"{index:06d}.previews.png")

    def _previews(self, index: int, candidate: int) -> dict[int, Image.Image]:
        """Returns the x0-predictions of a run by level, those of the runs that it goes on from
        included."""
        path = self._best_path(index, f"{candidate}{PREVIEWS}")
        if not path.is_file():
            return {}
        kept = load_file(path)
        parent, first_step = kept.pop("from").tolist()
        before = self._previews(index, parent) if parent >= 0 else {}
        own = {int(level): Image.fromarray(x0.numpy()) for level, x0 in kept.items()}
        return {level: one for level, one in before.items() if level <= first_step} | own

    def _best_path(self, index: int, name: int | str) -> Path:
        return self._folder / BESTS / f"{index:06d}" / f"{name:0>6}.safetensors"


def _thumbnail(image: Tensor) -> Tensor:
    """Returns (3, H, W) in [0, 1] as (h, w, 3) uint8 of at most `PREVIEW_PX`; gray where it is not
    finite."""
    smaller = min(1.0, PREVIEW_PX / max(image.shape[1:]))
    sides = [max(1, round(side * smaller)) for side in image.shape[1:]]
    small = interpolate(image[None].float().nan_to_num(0.5), sides, mode="area")[0]
    return eight_bit(small).permute(1, 2, 0).contiguous()


def read_winners(folder: Path) -> dict[int, dict[str, Any]]:
    """Reads the winners.jsonl of all processes by prompt; a torn last line is left out."""
    return rows_by_key(folder, WINNERS, ("prompt_index",))
