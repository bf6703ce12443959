"""Help from a config dataclass: every field's dotted path, type, default and meaning.

The meaning is the docstring under the field, so that the help text and the code can't disagree.
"""

import dataclasses
import difflib
import functools
import re
import textwrap
import types
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
from omegaconf import MISSING

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import Holds

HELP_WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Field:
    """One key of a config: a leaf, or a section that holds more keys."""

    path: str
    hint: Any
    default: Any
    meaning: str
    unless: str | None = None
    """A key beside it that makes a required one unneeded, where that is given."""


def fields_of(config_class: type, prefix: str = "") -> dict[str, Field]:
    """Lists every key of a config dataclass by dotted path, a section before its own keys."""
    return {field.path: field for field in _walk(config_class, prefix)}


@functools.cache
def _walk(config_class: type, prefix: str) -> tuple[Field, ...]:
    hints = get_type_hints(config_class, include_extras=True)
    meanings = _meanings(config_class)
    fields: list[Field] = []
    # Keyword-only fields are those of a base that several verbs share: they come last.
    for field in sorted(dataclasses.fields(config_class), key=lambda field: field.kw_only is True):
        path, hint = f"{prefix}{field.name}", hints[field.name]
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = None if nested_class(hint) else field.default_factory()
        elif default is dataclasses.MISSING:
            default = MISSING
        unless = field.metadata.get("unless")
        unless = f"{prefix}{unless}" if unless else None
        fields.append(Field(path, hint, default, meanings.get(field.name, ""), unless))
        section = nested_class(hint)
        if section is not None:
            fields.extend(_walk(section, f"{path}."))
    return tuple(fields)


def _meanings(config_class: type) -> dict[str, str]:
    """Reads the docstrings under the fields, those of base classes included."""
    meanings: dict[str, str] = {}
    for cls in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(cls):
            for param in docstring_parser.parse_from_object(cls).params:
                meanings[param.arg_name] = " ".join((param.description or "").split())
    return meanings


def purpose(config_class: type) -> str:
    """Returns the first sentence of a dataclass's own docstring, or nothing."""
    text = config_class.__doc__ or ""
    # A dataclass without a docstring is given its signature as one.
    return "" if text.startswith(f"{config_class.__name__}(") else text.strip().split("\n\n")[0]


def _bare(hint: Any) -> Any:
    """Strips Optional and marks."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = [arg for arg in get_args(hint) if arg is not type(None)]
        if len(rest) == 1:
            return _bare(rest[0])
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def is_optional(hint: Any) -> bool:
    """Whether null is a value of the field."""
    return type(None) in get_args(hint)


def holds(hint: Any, what: Holds) -> bool:
    """Whether a text field stands for that; a Path is a path."""
    if get_origin(hint) is Annotated:
        return what in get_args(hint)[1:]
    if get_origin(hint) in (Union, types.UnionType):
        return any(holds(arg, what) for arg in get_args(hint))
    return what is Holds.PATH and isinstance(hint, type) and issubclass(hint, Path)


def hint_at(config_class: type, path: str) -> Any:
    """Returns the type of a dotted key, entries of lists and mappings included; None for none.

    A config class whose mappings hold keys of other verbs says their types by `entry_hint`.
    """
    known = fields_of(config_class)
    if path in known:
        return known[path].hint
    if hasattr(config_class, "entry_hint"):
        return config_class.entry_hint(path)
    hint: Any = config_class
    for word in re.findall(r"[^.\[\]]+", path):
        section = nested_class(hint)
        if section is not None:
            field = fields_of(section).get(word)
            hint = field.hint if field else None
        else:
            hint = str if holds(hint, Holds.PROMPTS) else item_hint(hint)
    return hint


def nested_class(hint: Any) -> type | None:
    """Returns the dataclass of a section, or None for a leaf."""
    bare = _bare(hint)
    return bare if isinstance(bare, type) and dataclasses.is_dataclass(bare) else None


def item_hint(hint: Any) -> Any:
    """Returns the type of a list's items or a mapping's values, or None for other fields."""
    bare = _bare(hint)
    return get_args(bare)[-1] if get_origin(bare) in (list, dict) and get_args(bare) else None


def is_text(hint: Any) -> bool:
    """Whether a field holds text as it stands: str, Path, or a choice between words."""
    bare = _bare(hint)
    if get_origin(bare) is Literal:
        return all(isinstance(choice, str) for choice in get_args(bare))
    return isinstance(bare, type) and issubclass(bare, (str, Path, Enum))


def container_of(hint: Any) -> type | None:
    """Returns list, tuple or dict for a field that holds several entries, else None."""
    origin = get_origin(_bare(hint))
    return origin if origin in (list, tuple, dict) else None


def is_number(hint: Any) -> bool:
    """Whether a field holds a number or a truth value, or either of them or a word."""
    if get_origin(hint) in (Union, types.UnionType):
        return all(arg is type(None) or is_number(arg) or arg is str for arg in get_args(hint))
    return hint in (int, float, bool)


def type_name(hint: Any) -> str:
    """Names a type as a user would: `int`, `list of str`, `a | b`, `path or null`."""
    origin, args = get_origin(hint), get_args(hint)
    if holds(hint, Holds.PATH) and not is_optional(hint):
        return "path"
    if origin is Annotated:
        return "text, list of texts or file"
    if origin in (Union, types.UnionType):
        names = [type_name(arg) for arg in args if arg is not type(None)]
        return " or ".join([*names, "null"] if type(None) in args else names)
    if origin is Literal:
        return " | ".join(_shown(choice) for choice in args)
    if origin is list:
        return f"list of {type_name(args[0])}"
    if origin is tuple:
        return f"list [{', '.join('...' if arg is ... else type_name(arg) for arg in args)}]"
    if origin is dict:
        return f"mapping of {type_name(args[0])} to {type_name(args[1])}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(hint.__members__)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"section of {', '.join(field.name for field in dataclasses.fields(hint))}"
    return getattr(hint, "__name__", str(hint))


def nearest(path: str, known: Sequence[str]) -> str | None:
    """Finds the valid key that a mistyped one most likely means; None where nothing is near."""
    last = path.rpartition(".")[2]
    by_last: dict[str, str] = {}
    for candidate in known:
        by_last.setdefault(candidate.rpartition(".")[2], candidate)
    if last in by_last:
        return by_last[last]
    whole = difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    if whole:
        return whole[0]
    part = difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)
    return by_last[part[0]] if part else None


def describe(config_class: type, verb: str, verb_purpose: str, section: str = "") -> str:
    """Writes the help text of a verb: usage, then each field with type, default and meaning, those
    that must be given first; or those of a section or key alone.

    Raises UserError for a section that there is none of.
    """
    known = fields_of(config_class)
    if section:
        chosen = [p for p in known if p == section or p.startswith(f"{section}.")]
        if not chosen:
            close = nearest(section, list(known)) or ", ".join(sections_of(config_class))
            raise UserError(f"--help {section}: `{verb}` has no such section or key; see {close}")
        return "\n".join(_described([known[path] for path in chosen])).lstrip("\n") + "\n"
    required = [field for field in known.values() if field.default == MISSING]
    sections = ", ".join(sections_of(config_class))
    shown = f"--help SECTION shows one alone: {sections}." if sections else ""
    lines = [
        f"usage: blackpoint {verb} [CONFIG.yaml] [key=value ...]",
        "",
        *textwrap.wrap(verb_purpose, HELP_WIDTH),
        "",
        *textwrap.wrap(
            "Defaults, then the YAML file, then key=value: the later wins. --print-config prints"
            " the resolved config and exits.",
            HELP_WIDTH,
        ),
        *textwrap.wrap(
            "A text (str) is taken as it stands after the first =, without quotes; key=null unsets"
            ' one that may be null. A list is written as JSON: key=[1, 2], key=["a cat", "a'
            ' dog"]; a section or mapping as YAML: key={name: value}. Relative paths start from'
            " the current directory, and ~, $NAME and ${NAME} in paths are expanded.",
            HELP_WIDTH,
        ),
        *textwrap.wrap(shown, HELP_WIDTH),
        "",
        *(["required:", *_described(required), "", "others:"] if required else []),
        *_described([field for field in known.values() if field not in required]),
    ]
    return "\n".join(lines) + "\n"


def sections_of(config_class: type) -> list[str]:
    """Returns the names of the top sections of a config."""
    known = fields_of(config_class).values()
    return [f.path for f in known if "." not in f.path and nested_class(f.hint) is not None]


def _described(fields: Iterable[Field]) -> list[str]:
    lines: list[str] = []
    for field in fields:
        section, item = nested_class(field.hint), nested_class(item_hint(field.hint))
        if section is not None:
            meaning = field.meaning or purpose(section)
            off = " (null: off)" if is_optional(field.hint) else ""
            lines += ["", *textwrap.wrap(f"{field.path}: {meaning}{off}", HELP_WIDTH)]
            continue
        lines += _describe_field(field)
        below = ".NAME." if container_of(field.hint) is dict else "[]."
        for inner in fields_of(item, f"{field.path}{below}").values() if item else ():
            lines += _describe_field(inner)
    return lines


def _describe_field(field: Field) -> list[str]:
    default = "required" if field.default == MISSING else f"default {_shown(field.default)}"
    head = f"  {field.path}  ({type_name(field.hint)}; {default})"
    body = textwrap.wrap(
        field.meaning, HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
    )
    return [*textwrap.wrap(head, HELP_WIDTH, subsequent_indent=" " * 6), *body]


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(entry)}" for key, entry in value.items()) + "}"
    return '""' if value == "" else str(value)
