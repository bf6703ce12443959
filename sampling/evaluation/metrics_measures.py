"""What is measured on each image of an evaluation: luminance, scores, rows for set metrics.

Everything is measured on the 8-bit picture that a PNG file holds. A network whose weights are
missing is left out and named; the rest runs.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from data.files.errors import UserError
from data.files.whole_file import write_whole
from sampling.evaluation.brightness import luminance_error, luminance_range
from sampling.evaluation.luminance import border_luminance, image_luminance
from sampling.evaluation.metrics import MetricsConfig
from sampling.evaluation.metrics_rows import Row, column_digest
from sampling.evaluation.noise_invariance import noise_dependence
from sampling.evaluation.set_models import (
    Pixels,
    SetModel,
    load_set_model,
    networks,
)
from sampling.model import DiffusionModel
from sampling.prompts import Prompt
from sampling.verifiers.load import load_verifiers
from sampling.verifiers.verifier import Verifier, checked_scores, of_images

DECIMALS, INVARIANCE = 6, "noise_invariance.json"
MAX_CHECKED = 10_000


@dataclass
class Measures:
    """What measures. A column's digest is of the settings that it is measured with."""

    columns: dict[str, str] = field(default_factory=dict)
    """Columns that can be measured here, with their digests."""
    verifiers: dict[str, Verifier] = field(default_factory=dict)
    set_models: list[SetModel] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """What was asked for and cannot be measured here, with the reason."""
    lacking: dict[str, dict[str, str]] = field(default_factory=dict)
    """Skipped -> the columns that it would measure, with their digests."""

    @property
    def asked(self) -> dict[str, str]:
        """All columns that are asked for, with their digests."""
        return self.columns | {k: v for each in self.lacking.values() for k, v in each.items()}

    def missing(self, row: Row) -> set[str]:
        """Returns the columns that a row lacks."""
        return self.columns.keys() - row.keys()

    @torch.no_grad()
    def measure(self, pixels: Pixels, prompts: Sequence[Prompt], wanted: set[str]) -> list[Row]:
        """Measures pictures (N, 3, H, W) uint8; returns a row of the wanted columns for each."""
        images = pixels.float() / 255
        rows: list[Row] = [{} for _ in prompts]
        for name, verifier in self.verifiers.items():
            if name in wanted:
                texts = [prompt.text for prompt in prompts]
                for row, value in zip(rows, checked_scores(verifier, images, texts), strict=True):
                    row[name] = float(value)
        for model in self.set_models:
            if wanted & set(model.columns):
                for column, found in zip(model.columns, model.rows(pixels), strict=True):
                    for row, values in zip(rows, found.float().cpu().numpy(), strict=True):
                        row[column] = values
        return rows


def luminance_rows(pixels: Pixels, prompts: Sequence[Prompt]) -> list[Row]:
    """Measures luminance of the image and of its border, and the distance to what is asked for."""
    images = pixels.float() / 255
    ranges = [luminance_range(prompt) for prompt in prompts]
    columns = zip(
        image_luminance(images).tolist(), border_luminance(images).tolist(), ranges, strict=True
    )
    rows: list[Row] = []
    for number, (whole, border, asked) in enumerate(columns):
        error = None
        if asked is not None:
            error = round(float(luminance_error(images[number : number + 1], [asked])[0]), DECIMALS)
        rows.append(
            {
                "luminance": round(whole, DECIMALS),
                "border_luminance": round(border, DECIMALS),
                "asked_low": None if asked is None else asked.low,
                "asked_high": None if asked is None else asked.high,
                "asked_where": None if asked is None else asked.where,
                "luminance_error": error,
            }
        )
    return rows


def load_measures(
    config: MetricsConfig, prompts: Sequence[Prompt], device: torch.device
) -> Measures:
    """Loads every network that is asked for; what is missing is skipped, with its reason.

    Raises UserError for a prompt that a verifier cannot judge.
    """
    found = Measures()
    for name, each in config.verifiers.items():
        settings = {k: v for k, v in asdict(each).items() if k not in ("batch_size", "name")}
        columns = {name: column_digest(settings)}
        try:
            loaded = load_verifiers({name: dataclasses.replace(each, name=name)}, device)
        except UserError as error:
            found.skipped[name], found.lacking[name] = str(error), columns
            continue
        verifier = of_images(loaded)[name]
        check = getattr(verifier, "check_prompt", None)
        for prompt in itertools.islice(prompts, MAX_CHECKED if check else 0):
            check(prompt.text)  # type: ignore[misc]
        found.verifiers[name] = verifier
        found.columns |= columns
    for key, names in networks(config.sets).items():
        given = getattr(config.sets, key)
        digest = column_digest([key, given if key == "inception" else asdict(given)])
        columns = {column: digest for column in names}
        try:
            found.set_models.append(load_set_model(config.sets, key, names, device))
        except UserError as error:
            skipped = f"sets.{key}"
            found.skipped[skipped], found.lacking[skipped] = str(error), columns
            continue
        found.columns |= columns
    return found


def noise_dependences(
    config: MetricsConfig, model: DiffusionModel, prompts: Sequence[Prompt]
) -> list[float]:
    """Returns, and keeps, each of the first prompts' deviation over noises of the first
    prediction."""
    texts, key = _invariance_key(config, prompts)
    found = noise_dependence(
        model,
        texts,
        config.brightness.invariance_noises,
        config.seed,
        config.height,
        config.width,
        config.batch_size,
        config.clip_skip,
    )
    values = [round(value, 8) for value in found.tolist()]
    content = {"settings": key, "deviations": values}
    write_whole(Path(config.output) / INVARIANCE, json.dumps(content) + "\n")
    return values


def kept_dependences(config: MetricsConfig, prompts: Sequence[Prompt]) -> list[float] | None:
    """Returns the deviations where they are known, or there are none."""
    texts, key = _invariance_key(config, prompts)
    if not texts:
        return []
    path = Path(config.output) / INVARIANCE
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return list(kept["deviations"]) if kept.get("settings") == key else None


def _invariance_key(config: MetricsConfig, prompts: Sequence[Prompt]) -> tuple[list[str], str]:
    """Returns whose predictions are compared, and a digest of what the deviations depend on."""
    number = min(config.brightness.invariance_prompts, len(prompts))
    texts = [prompt.text for prompt in prompts[:number]]
    settings = {**asdict(config.brightness), "height": config.height, "width": config.width}
    return texts, column_digest([texts, config.seed, settings])
