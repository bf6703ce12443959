"""One run's configuration: dataclass defaults <- YAML file <- key=value, then a plain dataclass.

A verb's config is a dataclass beside the code that it configures; the docstring under a field is
its meaning. `load` reads `[CONFIG.yaml] [key=value ...]` through OmegaConf, which checks the types,
and turns every mistake into a `UserError` that names field, value, rule and remedy. How values are
written is in config_values.py.
"""

import re
import sys
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import BadPath, Holds, expanded, obstacle, shipped
from blackpoint.data.files.yaml_text import read_yaml_file
from blackpoint.data.files.yaml_text import to_yaml as to_yaml
from blackpoint.scripts.config_fields import (
    Field,
    container_of,
    fields_of,
    hint_at,
    holds,
    is_text,
    item_hint,
    nearest,
    nested_class,
    type_name,
)
from blackpoint.scripts.config_values import Texts, parse, written_out

ConfigT = TypeVar("ConfigT")
REFERENCE = re.compile(r"\$\{([\w.]+)")
COMMAND_LINE = "the command line"
KEY_VALUE = re.compile(r"^(?P<key>[A-Za-z_][\w.\[\]-]*)=(?P<text>.*)$", re.DOTALL)


def load(config_class: type[ConfigT], argv: Sequence[str]) -> ConfigT:
    """Builds the config from its defaults, an optional YAML file and key=value arguments.

    The file comes first and must exist; a later key=value wins over an earlier one and over the
    file. Raises `UserError` for whatever the user can put right.
    """
    config, texts = OmegaConf.structured(config_class), Texts()
    rest = list(argv)
    if rest and not KEY_VALUE.match(rest[0]) and not rest[0].startswith("-"):
        path = rest.pop(0)
        _assign(config, texts, config_class, read_yaml(path), "", path)
    for argument in rest:
        key, text = _split(argument)
        value = parse(hint_at(config_class, key), key, text)
        _assign(config, texts, config_class, {key: value}, "", COMMAND_LINE)
    return _finish(config, texts, config_class)


def load_values(config_class: type[ConfigT], values: dict[str, Any], origin: str) -> ConfigT:
    """Builds the config from its defaults and values at dotted keys; `origin` names them in errors.

    Raises UserError as `load` does.
    """
    config, texts = OmegaConf.structured(config_class), Texts()
    for key, value in values.items():
        _assign(config, texts, config_class, {key: value}, "", origin)
    return _finish(config, texts, config_class)


def check_outputs(config: object) -> None:
    """Raises UserError where nothing can be made at a path that the verb is to write."""
    for path, field in fields_of(type(config)).items():
        value = attrgetter(path)(config) if holds(field.hint, Holds.OUTPUT) else None
        if value is not None and (reason := obstacle(Path(value))):
            raise UserError(f"{path}={value} can't be written: {reason}; name another place")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping as plain containers; an empty file is an empty mapping."""
    try:
        path = shipped(expanded(str(path)))
    except BadPath as error:
        raise UserError(f"{path}: {error}") from None
    if not Path(path).is_file():
        raise UserError(
            f"{path}: there is no such file. Expected `[CONFIG.yaml] [key=value ...]`; a relative"
            f" path starts from the current directory, {Path.cwd()}"
        )
    try:
        content = read_yaml_file(Path(path))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: not a YAML config: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict | None):
        raise UserError(f"{path}: not a YAML config: must hold `key: value` lines, one per field")
    return {str(key): value for key, value in (content or {}).items()}


def _split(argument: str) -> tuple[str, str]:
    """Splits key=value; raises UserError for anything else."""
    match = KEY_VALUE.match(argument)
    if match is None:
        hint = (
            "options are written without dashes" if argument.startswith("-") else "`=` is missing"
        )
        if argument.endswith((".yaml", ".yml")):
            hint = "one YAML file is read, and it comes before every key=value"
        raise UserError(f"`{argument}`: {hint}; expected `[CONFIG.yaml] [key=value ...]`")
    return match["key"], match["text"]


def _assign(
    config: DictConfig,
    texts: Texts,
    config_class: type,
    values: dict[str, Any],
    prefix: str,
    origin: str,
) -> None:
    """Sets each value at its dotted path, going down into nested dataclasses."""
    known = fields_of(config_class)
    for key, value in values.items():
        path = f"{prefix}{key}"
        field = known.get(path)
        if field is None and not _is_entry(known, path):
            raise UserError(_unknown(config_class, path, origin))
        if field is not None:
            value = written_out(field.hint, value)
            _check_items(config_class, field.hint, value, path, origin)
            if nested_class(field.hint) is not None and isinstance(value, dict):
                _open_sections(config, known, path)
                _assign(config, texts, config_class, value, f"{path}.", origin)
                continue
        mapping = known.get(path.rpartition(".")[0])
        if mapping and isinstance(value, dict) and nested_class(item_hint(mapping.hint)):
            _open_sections(config, known, path)
            _assign(config, texts, config_class, value, f"{path}.", origin)
            continue
        _open_sections(config, known, path.rpartition(".")[0])
        # ??? in a file stands for a key that is still to be given.
        open_still = value == MISSING and origin != COMMAND_LINE
        if open_still and (field is None or field.default == MISSING):
            guarded = value
        else:
            hint = hint_at(config_class, path)
            guarded = texts.guarded(hint, value, f"{path} = {value!r:.80} (from {origin})")
            if isinstance(value, str) and is_text(hint) and not holds(hint, Holds.PATH):
                _say_what_stays(known, path, value)
        try:
            OmegaConf.update(config, path, guarded)
        except (OmegaConfBaseException, ValueError, IndexError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(_wrong_type(known, path, value, origin, error)) from None


def _say_what_stays(known: dict[str, Field], path: str, text: str) -> None:
    for name in REFERENCE.findall(text):
        if name in known or name.startswith("oc."):
            print(
                f"note: {path} holds ${{{name}}}, which stays as it is in a text", file=sys.stderr
            )


def _open_sections(config: DictConfig, known: dict[str, Field], path: str) -> None:
    """Gives the optional sections on the way to a key their defaults where they are off."""
    names, missing = path.split("."), OmegaConf.missing_keys(config) if path else set[str]()
    for length in range(1, len(names) + 1):
        parent = ".".join(names[:length])
        if parent in known and container_of(known[parent].hint) is dict and parent in missing:
            OmegaConf.update(config, parent, {})  # a required one gets its first entry
        section = nested_class(known[parent].hint) if parent in known else None
        if section is None and length > 1:  # an entry of a mapping of sections
            field = known.get(".".join(names[: length - 1]))
            section = nested_class(item_hint(field.hint)) if field else None
        if section is not None and OmegaConf.select(config, parent) is None:
            OmegaConf.update(config, parent, OmegaConf.structured(section))


def _is_entry(known: dict[str, Field], path: str) -> bool:
    """Whether the path names an entry of a dict or list field, such as `weights.mean`."""
    parents = re.split(r"[.\[]", path)
    for length in range(len(parents) - 1, 0, -1):
        field = known.get(".".join(parents[:length]))
        if field is not None:
            return container_of(field.hint) is not None and nested_class(field.hint) is None
    return False


def _check_items(config_class: type, hint: Any, value: Any, path: str, origin: str) -> None:
    """Refuses unknown keys in a list or mapping of sections, where OmegaConf names no neighbour."""
    item_class = nested_class(item_hint(hint))
    if item_class is None or not isinstance(value, list | dict):
        return
    known = fields_of(item_class)
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in pairs:
        shown = f"{path}.{name}" if isinstance(value, dict) else f"{path}[{name}]"
        for key in item if isinstance(item, dict) else ():
            if key not in known:
                raise UserError(_unknown(item_class, str(key), f"{origin}, {shown}"))


def _unknown(config_class: type, path: str, origin: str) -> str:
    known = fields_of(config_class)
    closest = nearest(path, [field.path for field in known.values()])
    remedy = f"did you mean `{closest}`?" if closest else "see --help for every key"
    return f"`{path}` (from {origin}) is not a key here; {remedy}"


def _wrong_type(
    known: dict[str, Field], path: str, value: Any, origin: str, error: Exception
) -> str:
    field = known.get(path)
    shown = repr(value) if len(repr(value)) < 80 else repr(value)[:77] + "..."
    if field is None:
        return f"{path} = {shown} (from {origin}): {str(error).splitlines()[0]}"
    if nested_class(item_hint(field.hint)) is not None and isinstance(value, list):
        return f"{path} = {shown} (from {origin}): {str(error).splitlines()[0]}"
    given = "null" if value is None else type(value).__name__
    meaning = f" ({field.meaning})" if field.meaning else ""
    return f"{path} = {shown} (from {origin}) is {given}; expected {type_name(field.hint)}{meaning}"


def _finish(config: DictConfig, texts: Texts, config_class: type[ConfigT]) -> ConfigT:
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise UserError(
            f"a value with ${{...}} does not resolve: {str(error).splitlines()[0]}"
        ) from None
    for path, field in fields_of(config_class).items():
        replaced = field.unless and OmegaConf.select(config, field.unless)
        if replaced and path in OmegaConf.missing_keys(config):
            OmegaConf.update(config, path, None)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        known = fields_of(config_class)
        lines = [
            f"  {path}=...  {known[path].meaning}" if path in known else f"  {path}=..."
            for path in missing
        ]
        raise UserError(
            "required and not set; give them as key=value or in the YAML file:\n" + "\n".join(lines)
        )
    checked = OmegaConf.to_container(config, structured_config_mode=SCMode.DICT)
    instance = texts.instance(config_class, checked)
    assert isinstance(instance, config_class)
    return instance
