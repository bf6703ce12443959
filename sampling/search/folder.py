"""The output folder of a search: its settings and its costs."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.plain import json_object, read_json
from blackpoint.data.files.whole_file import write_whole
from blackpoint.data.images.decode import DECODER_VERSION
from blackpoint.sampling.checkpoints.merged import lora_digests
from blackpoint.sampling.options import ROUNDING_KEYS
from blackpoint.sampling.prompts.prompt_set import Prompt
from blackpoint.sampling.runtime.precision import FORMATS, kept_formats
from blackpoint.sampling.runtime.sharing import files_of
from blackpoint.sampling.runtime.tasks import this_task
from blackpoint.sampling.search.config import ALGORITHMS, SearchConfig
from blackpoint.sampling.search.costs import Ledger
from blackpoint.sampling.search.journal import ROWS, read_rows

log = logging.getLogger(__name__)

SETTINGS, LEDGER, DIGEST = "search.json", "ledger.json", "prompts_digest"
WINNERS, HACKING = "winners.jsonl", "hacking.json"
LORA_DIGESTS = "lora_digests"
"""Digest and scale of each LoRA that is merged in; a file may be another one under its name."""
CHECKPOINT_DIGEST = "checkpoint_digest"
"""Of all that decides the checkpoint's images; other weights may come under its name."""
DECODER = "decoder"
"""Version of the decoder of reference pictures; recorded where there are any."""
_DOLLAR = "\ue000{"
RESULT_INVARIANT_KEYS = (*ROUNDING_KEYS, "compile", "diversity", "previews", "wandb")
"""Keys that change scores by rounding alone, or not at all."""


def continued(config: SearchConfig, output: Path) -> SearchConfig:
    """Returns the config with the settings of an algorithm that were the default when the folder
    was begun, where the config has today's."""
    saved, sections = read_json(output / SETTINGS) or {}, {}
    for name, algorithm in ALGORITHMS.items():
        section, default, before = getattr(config, name), algorithm.config(), saved.get(name, {})
        sections[name] = replace(
            section,
            **{
                key: value
                for key, value in algorithm.former.items()
                if saved and before.get(key, value) == value
                if getattr(section, key) == getattr(default, key)
            },
        )
    return replace(config, **sections)


def check_folder(config: SearchConfig, output: Path, prompts: Iterable[Prompt]) -> dict[str, Any]:
    """Returns the settings to be kept; raises UserError where `output` holds something else."""
    settings = {
        key: value for key, value in asdict(config).items() if key not in RESULT_INVARIANT_KEYS
    }
    settings[DIGEST] = digest_of(prompts)
    if config.lora:
        settings[LORA_DIGESTS] = lora_digests(config.lora, config.weights)
    if reads_pictures(config):
        settings[DECODER] = DECODER_VERSION
    path = output / SETTINGS
    if not path.is_file():
        entries = output.iterdir() if output.is_dir() else [output] if output.exists() else []
        if not all(entry.name.startswith(f".{SETTINGS}") for entry in entries):  # one is writing it
            raise UserError(f"output={output} holds something that is no search; name a new folder")
        return settings
    saved, now = read_settings(path), json.loads(json.dumps(settings))
    now.pop(DECODER, None)
    if saved.get(DIGEST, settings[DIGEST]) != settings[DIGEST]:
        raise UserError(
            f"output={output} holds a search of other prompts: prompts={config.prompts} has "
            "changed since; choose another output, or put back what it was"
        )
    saved[DIGEST] = now[DIGEST]
    kept, _ = kept_formats(path)
    saved |= kept or {}
    now |= {name: saved[name] for name in FORMATS if now[name] == "auto"}  # of no device yet
    differing = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key))
    reason = _no_growth(config, output, saved) if differing == ["budget_nfe"] else None
    if differing and reason != "":
        key, why = differing[0], f"; {reason}" if reason else ""
        raise UserError(
            f"output={output} holds a search with other settings ({key}: {saved.get(key)} there, "
            f"{now.get(key)} now{why}); choose another output, or continue it with its own"
        )
    return settings


def _no_growth(config: SearchConfig, output: Path, saved: Mapping[str, Any]) -> str:
    """Says why a search can't go on with another budget_nfe; "" where it can."""
    verifiers = list(config.verifiers.values())
    if config.budget_nfe < saved["budget_nfe"]:
        return "a budget can only grow"
    if not config.declared.grows:
        names = ", ".join(name for name, one in ALGORITHMS.items() if one.grows)
        return f"algorithm={config.algorithm} plans by its budget, unlike {names}"
    if len(verifiers) > 1 or verifiers[0].declared.needs == "set":
        return "only images that one verifier scores by themselves can be added to"
    if this_task().count > 1 or not (output / HACKING).is_file():
        return "one process can raise it, once the search is finished"
    return ""


def is_raised(output: Path, budget_nfe: int) -> bool:
    """Tells whether a finished search is to go on with a larger budget."""
    return bool(read_json(output / SETTINGS).get("budget_nfe", budget_nfe) < budget_nfe)


def check_checkpoint(config: SearchConfig, output: Path, digest: str) -> None:
    """Raises UserError where the search was begun with another checkpoint of that name."""
    if read_json(output / SETTINGS).get(CHECKPOINT_DIGEST, digest) != digest:
        raise UserError(
            f"checkpoint={config.checkpoint} has other weights, or another process, than "
            f"output={output} was searched with; choose another output"
        )


def reopen(output: Path, budget_nfe: int) -> None:
    """Turns a finished search of independent candidates into the beginning of a larger one.

    The images that led in turn, of which winner and sheet are made, were kept for as long as the
    search was open alone; the driver makes them again.
    """
    log.warning(
        "note: %s goes on with budget_nfe=%d: its candidates are kept, the images that led in turn "
        "are made again",
        *(output, budget_nfe),
    )
    for name in (WINNERS, HACKING):  # the last says that all is done
        (output / name).unlink(missing_ok=True)


def formats_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the device and the formats of candidates, lists where they differ."""
    formats: dict[str, list[Any]] = {name: [] for name in ("device", *FORMATS)}
    for row in rows:
        for name, values in formats.items():
            if name in row and row[name] not in values:
                values.append(row[name])
    return {name: values[0] if len(values) == 1 else values for name, values in formats.items()}


def read_settings(path: Path) -> dict[str, Any]:
    """Reads search.json; keys that an earlier version did not write have their defaults.

    Raises UserError where it holds keys that this version does not know.
    """
    # OmegaConf fills in the defaults, and would take ${ inside a text for its own.
    saved = json_object(path.read_bytes().replace(b"${", _DOLLAR.encode()), path)
    beside = {key: saved.pop(key) for key in (DIGEST, LORA_DIGESTS) if key in saved}
    for key in (DECODER, CHECKPOINT_DIGEST):
        saved.pop(key, None)
    for name, algorithm in ALGORITHMS.items():
        if algorithm.former:
            saved[name] = {**algorithm.former, **saved.get(name, {})}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(SearchConfig), saved)
    except OmegaConfBaseException as error:
        raise UserError(
            f"{path} was written by another version ({str(error).splitlines()[0]}); choose another "
            "output, or continue it with the version that began it"
        ) from None
    whole = OmegaConf.to_container(merged)
    assert isinstance(whole, dict)
    whole = json.loads(json.dumps(whole, ensure_ascii=False).replace(_DOLLAR, "${"))
    kept = {str(key): value for key, value in whole.items() if key not in RESULT_INVARIANT_KEYS}
    return kept | beside


def reads_pictures(config: SearchConfig) -> bool:
    """Tells whether a verifier measures pictures of the user's."""
    sets = [verifier for verifier in config.verifiers.values() if verifier.declared.needs == "set"]
    references = [verifier.reference for verifier in sets]
    return any(path is not None and Path(path).suffix != ".safetensors" for path in references)


def decoder_note(config: SearchConfig, output: Path) -> str:
    """Returns a note where an earlier version of the decoder read the references, or ""."""
    saved = read_json(output / SETTINGS)
    if not reads_pictures(config) or not saved or saved.get(DECODER) == DECODER_VERSION:
        return ""
    return (
        f"{output} was begun when references were not decoded as training images are (orientation, "
        "transparency, 16 bits, colour profiles); from here on they are, and scores of kind=oracle "
        "change where the pictures have any of that"
    )


def digest_of(prompts: Iterable[Prompt]) -> str:
    """Returns a fingerprint of the prompts and their places."""
    digest = hashlib.blake2b(digest_size=12)
    for prompt in prompts:
        digest.update(f"{prompt.index}\0{prompt.text}\0".encode())
    return digest.hexdigest()


def keep_ledger(folder: Path, spent: Ledger, beside: Ledger, formats: Mapping[str, Any]) -> None:
    """Writes ledger.json: the search's costs, under `beside` those in no budget, and the
    device and number formats that computed it."""
    content = spent.to_row() | {"beside": beside.to_row()}
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in content.items()}
    write_whole(folder / LEDGER, json.dumps(rounded | {"formats": formats}, indent=1) + "\n")


def spent_in(*folders: Path) -> Ledger:
    """Adds up the costs of candidates in folders, and in their parts."""
    paths = [path for folder in folders for path in files_of(folder, ROWS)]
    return sum((spent_on(read_rows(path, repair=False)) for path in paths), Ledger())


def spent_on(rows: Iterable[Mapping[str, Any]]) -> Ledger:
    """Adds up the costs of candidates."""
    return sum((Ledger(**row["spent"]) for row in rows), Ledger())
