"""`blackpoint prefetch`: fills a folder with all of the hub that a config needs, for use offline.

The folder is a home of the hub's client (HF_HOME): with HF_HOME=FOLDER the same config finds there
what it would have fetched, and by the same functions as these were fetched.
"""

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from blackpoint.data.files.dotted import flat
from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import OutputText, PathText, shipped

FIRST = "config"
"""Key of the YAML: of what comes first on the command line, and of a sweep's sections."""
IMAGE_MODELS = ("diversity", "features", "classifier")
"""Sections whose checkpoint is a transformers model of images."""
Fetch = Callable[[str], Path]
"""hub id -> its folder in the hub's cache; raises UserError."""


@dataclass
class PrefetchConfig:
    """What to fetch for a config of train, sample, search, evaluate or sweep, and where to."""

    config: PathText = MISSING
    """The YAML of the other verb, first on the command line: blackpoint prefetch CONFIG.yaml
    output=FOLDER. Of its keys, those that name a hub id are fetched: base, text encoder, LoRA,
    verifiers with their tokenizers, networks of metrics."""
    checkpoint: PathText | None = None
    """Hub id in place of the config's checkpoint."""
    output: OutputText = MISSING
    """Folder to fill; the same command goes on where it was stopped."""


def config_class() -> type[PrefetchConfig]:
    return PrefetchConfig


def arguments(given: list[str]) -> list[str]:
    """Takes what comes first on the command line for the key `config`."""
    if given and "=" not in given[0] and not given[0].startswith("-"):
        return [f"{FIRST}={given[0]}", *given[1:]]
    return given


def run(config: PrefetchConfig) -> int:
    """Fetches, and prints how the folder is used."""
    from huggingface_hub import constants

    home = Path(config.output).resolve()
    wanted = {(key, hub_id): fetch for key, hub_id, fetch in wanted_of(settings_of(config))}
    previous, constants.HF_HUB_CACHE = constants.HF_HUB_CACHE, str(home / "hub")
    try:
        for (key, hub_id), fetch in wanted.items():
            print(f"{key}={hub_id} ...", flush=True)
            files = [file for file in fetch(hub_id).rglob("*") if file.is_file()]
            print(f"  {sum(file.stat().st_size for file in files) / 1e9:.3g} GB", flush=True)
    finally:
        constants.HF_HUB_CACHE = previous
    if wanted:
        print("\nwithout network, before the same commands:")
        print(f"export HF_HOME={shlex.quote(str(home))} HF_HUB_OFFLINE=1")
    else:
        print("no key names a hub id that is not a folder here: nothing to fetch")
    return 0


def settings_of(config: PrefetchConfig) -> dict[str, Any]:
    """Returns the YAML's keys, dotted, with those of the files that a sweep's sections name."""
    from blackpoint.scripts.config import read_yaml

    settings = flat(read_yaml(config.config))
    for key, value in list(settings.items()):
        section, _, last = key.rpartition(".")
        if section and last == FIRST and isinstance(value, str):
            settings = flat(read_yaml(value), f"{section}.") | settings
    return settings | ({"checkpoint": config.checkpoint} if config.checkpoint else {})


def wanted_of(settings: Mapping[str, Any]) -> Iterator[tuple[str, str, Fetch]]:
    """Yields key, hub id and how it is fetched, for what is on the hub and not here."""
    from blackpoint.sampling.verifiers.load import KINDS
    from blackpoint.sampling.verifiers.models.pretrained import download

    ways: dict[str, Fetch | None] = {}
    values = dict(settings)
    for section in dict.fromkeys(key.rpartition(".")[0] for key in settings):
        if section.split(".")[-2:-1] not in (["verifiers"], ["held_out"]):
            continue
        ways |= dict.fromkeys(key for key in settings if key.startswith(f"{section}."))
        kinds = settings.get(f"{section}.kind", "clip_score")  # a list in a sweep's grid
        for kind in kinds if isinstance(kinds, list) else [kinds]:
            if kind not in KINDS:
                raise UserError(f"{section}.kind={kind} is no verifier; use {', '.join(KINDS)}")
            for name, files in KINDS[kind].files.items():
                key = f"{section}.{name}"
                ways[key] = partial(download, field=key, example="docs/search.md", files=files)
                values[key] = settings.get(key) or KINDS[kind].defaults.get(name)
    for key, value in values.items():
        if fetch := ways[key] if key in ways else fetch_of(key, settings):
            yield from ((key, hub_id, fetch) for hub_id in hub_ids(value))


def fetch_of(key: str, settings: Mapping[str, Any]) -> Fetch | None:
    """Returns how the hub id at a key of no verifier is fetched; None where the key names none."""
    from blackpoint.sampling.checkpoints.resolve import download_lora, resolve
    from blackpoint.sampling.evaluation.metrics.set_models import INCEPTION_FILES
    from blackpoint.sampling.pipelines.load import download_pipeline
    from blackpoint.sampling.verifiers.models.pretrained import download

    section, _, last = key.rpartition(".")
    if last == "checkpoint" and section.rpartition(".")[2] in IMAGE_MODELS:
        return partial(download, field=key, example="facebook/dinov2-base")
    variant = settings.get(f"{section}.variant".lstrip("."))
    ways: dict[str, Fetch] = {
        "checkpoint": partial(download_pipeline, variant=variant),
        "text_encoder": lambda hub_id: resolve(hub_id).pipeline.path,
        "lora": lambda hub_id: download_lora(hub_id).parent,
        "inception": partial(download, field=key, example="a folder", files=INCEPTION_FILES),
    }
    return ways.get(last)


def hub_ids(value: object) -> Iterator[str]:
    """Yields the hub ids in a key's value, or in its list, that are no files or folders here."""
    from blackpoint.sampling.checkpoints.resolve import HUB_ID

    for entry in value if isinstance(value, list) else [value]:
        name = entry.get("path") if isinstance(entry, dict) else entry
        if isinstance(name, str) and HUB_ID.fullmatch(name) and not Path(shipped(name)).exists():
            yield name
