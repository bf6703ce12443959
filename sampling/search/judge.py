"""Held-out scores and diversity of winners beside baselines, and their tables at wandb.

The baseline of a prompt is the plain image of its first seed: the first candidate of an algorithm
of whole images; for the others one more image, which counts in no budget and in the ledger under
`beside`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from blackpoint.data.files.plain import finite, number, read_json, recorded
from blackpoint.sampling.prompts.brightness_target import luminance_target
from blackpoint.sampling.runtime.pictures import read_picture
from blackpoint.sampling.runtime.tracking import WandbConfig, start_run
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.folder import LEDGER, SETTINGS, read_settings
from blackpoint.sampling.search.setup import MAX_CHECKED, note
from blackpoint.sampling.statistics.diversity import diversity_change
from blackpoint.sampling.statistics.hacking_alarm import HackingAlarm, PairedScores, hacking_alarm
from blackpoint.sampling.verifiers.load import ImageModelConfig, VerifierConfig
from blackpoint.sampling.verifiers.models import clip_score, pick_score
from blackpoint.sampling.verifiers.models.image_model import load_features
from blackpoint.sampling.verifiers.verifier import Verifier, checked_scores

HUB_JUDGES = ("pick_score", pick_score.EXAMPLE), ("clip_score", clip_score.EXAMPLE)
"""Verifiers of any text, which judge where their weights are in the hub's cache."""
MAX_ROWS = 1000
MAX_DIVERSITY_IMAGES, BATCH, THUMBNAIL_PX = 2000, 64, 16


def with_judge(config: SearchConfig, prompts: Iterable[str], output: Path) -> SearchConfig:
    """Returns the config with a held-out verifier that is at hand, where a gradient leads the steps
    and none is set; says which, or that there is none. A search goes on with its own.

    At hand is the first, of a kind that is not searched, of PickScore and CLIP in the hub's cache,
    and of luminance where every prompt names one.
    """
    if config.held_out or config.step_tilt is None:
        return config
    chosen = None
    if (output / SETTINGS).is_file():
        saved = read_settings(output / SETTINGS)["held_out"].values()
        chosen = next((VerifierConfig(**one) for one in saved), None)
    else:
        at_hand = [VerifierConfig(kind, hub_id) for kind, hub_id in HUB_JUDGES if in_cache(hub_id)]
        if all(map(luminance_target, itertools.islice(prompts, MAX_CHECKED))):
            at_hand.append(VerifierConfig("luminance"))
        taken = {*config.verifiers, *(verifier.kind for verifier in config.verifiers.values())}
        chosen = next((one for one in at_hand if one.kind not in taken), None)
    if chosen is None:
        note(
            "held_out is not set and no verifier is at hand (PickScore or CLIP in the hub's cache, "
            "or a luminance that every prompt names), so the hacking alarm is off but for "
            "diversity; name one, such as held_out.clip.kind=clip_score "
            "held_out.clip.checkpoint=FOLDER"
        )
        return config
    source = chosen.checkpoint or "as the prompts name it"
    note(f"held_out is not set; {chosen.kind} judges the winners ({source})")
    return replace(config, held_out={chosen.kind: chosen})


def in_cache(hub_id: str) -> bool:
    """Tells whether the hub's cache holds a transformers model."""
    from huggingface_hub import try_to_load_from_cache

    files = (try_to_load_from_cache(hub_id, name) for name in ("config.json", "model.safetensors"))
    return all(isinstance(file, str) for file in files)


def judge(
    held_out: Mapping[str, Verifier], images: Sequence[Tensor], prompt: str
) -> list[dict[str, float | str]]:
    """Returns each held-out verifier's score of each image of a prompt."""
    columns = {
        name: checked_scores(verifier, torch.stack(list(images)), [prompt] * len(images)).tolist()
        for name, verifier in held_out.items()
    }
    return [
        recorded({name: column[row] for name, column in columns.items()})
        for row in range(len(images))
    ]


def alarms(
    rows: Sequence[dict[str, Any]], config: ImageModelConfig, output: Path
) -> list[HackingAlarm]:
    """Compares the winners of all prompts with their baselines.

    rows: those of winners.jsonl. One alarm for each searched verifier; none below two prompts.
    Scores and features that are not finite leave their prompt out of that comparison.
    """
    paired = [row for row in rows if row["baseline"] is not None]
    if len(paired) < 2:
        return []
    winners, plain = (
        _features(config, [output / row["image"] for row in rows[:MAX_DIVERSITY_IMAGES]])
        for rows in (paired, [row["baseline"] for row in paired])
    )
    usable = (winners.isfinite() & plain.isfinite()).all(dim=1)
    # One row that is not finite has no distance to any other.
    diversity = diversity_change(winners[usable], plain[usable]) if usable.sum() > 1 else None
    held_out = _paired_scores(paired, "held_out")
    return [
        hacking_alarm(scores, held_out, diversity) for scores in _paired_scores(paired, "scores")
    ]


@functools.cache
def extractor(checkpoint: str | None, module: str | None) -> Callable[[Tensor], Tensor]:
    """Loads the diversity's features, once; thumbnails without either. Raises UserError."""
    if not (checkpoint or module):
        return _thumbnails
    field = "diversity.checkpoint"
    return load_features(checkpoint, module, torch.device("cpu"), torch.float32, field)


def _paired_scores(rows: Sequence[dict[str, Any]], key: str) -> list[PairedScores]:
    """Returns the scores of each verifier of which an interval can be made: of two prompts."""
    paired = []
    for name in rows[0][key]:
        pairs = [(number(row[key][name]), number(row["baseline"][key][name])) for row in rows]
        if sum(all(map(math.isfinite, pair)) for pair in pairs) > 1:
            paired.append(PairedScores(name, *map(list, zip(*pairs, strict=True))))
    return paired


@torch.no_grad()
def _features(config: ImageModelConfig, files: Sequence[Path]) -> Tensor:
    features = extractor(config.checkpoint, config.module)
    parts = []
    for start in range(0, len(files), BATCH):
        images = [read_picture(file) for file in files[start : start + BATCH]]
        parts.append(features(torch.stack(images)).double())
    return torch.cat(parts)


def _thumbnails(images: Tensor) -> Tensor:
    """Returns root mean squares as distances: pixels of 16 x 16 thumbnails over sqrt(count)."""
    small = interpolate(images, (THUMBNAIL_PX, THUMBNAIL_PX), mode="area").flatten(1)
    return small / small.shape[1] ** 0.5


def send_tables(
    config: WandbConfig,
    output: Path,
    rows: Sequence[dict[str, Any]],
    results: Sequence[HackingAlarm],
) -> None:
    """Sends a row for each winner, at most 1,000, with its picture, and the ledger's sums."""
    if not config.enabled:
        return
    import wandb

    run = start_run(config, output, read_json(output / SETTINGS))
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
    for alarm in results:
        for metric, change in alarm.changes.items():
            numbers = (change.value, change.low, change.high, change.n)
            changes.add_data(alarm.searched, metric, *numbers)
    run.log({"changes": changes})
    ledger = read_json(output / LEDGER)
    beside = ledger.pop("beside")
    run.summary.update(ledger | {"beside_nfe": beside["nfe"]})
    run.summary["hacking"] = any(alarm.raised for alarm in results)
    run.finish()
