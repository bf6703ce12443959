"""From a text after key=, or in a YAML file, to the value of a config field.

The field's type decides. A text stays as it is written: a prompt may be `#3`, `- a cat`, `[a, b]`,
`a ${b}` or `null`. Numbers, truth values and lists are parsed, sections and mappings are YAML.
OmegaConf reads `${...}` and `???` inside texts as its own, so such texts pass it under tokens.
"""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import yaml
from omegaconf import MISSING

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import BadPath, Holds, expanded, is_verbatim, shipped
from blackpoint.data.files.yaml_text import read_yaml
from blackpoint.sampling.prompts.prompt_set import prompts_path
from blackpoint.scripts.config_fields import (
    container_of,
    fields_of,
    holds,
    is_number,
    is_optional,
    is_text,
    item_hint,
    nested_class,
)

_MARK = "\ue000"
"""Begins a token: a character of no meaning, and what holds it is kept under a token itself."""
# An item of a list: in quotes as JSON or YAML have them, or else up to the next comma.
_ITEM = re.compile(
    r"""\s*(?:("(?:[^"\\]|\\.)*"|'(?:[^']|'')*')\s*(?=,|\Z)|([^,]*))(,|\Z)""", re.DOTALL
)


def parse(hint: Any, key: str, text: str) -> Any:
    """Reads the text after `key=`; one that does not fit the type is refused where it is set."""
    if hint is None:
        return text
    if is_optional(hint) and text == "null":
        return None
    if holds(hint, Holds.PROMPTS):
        return _text_or_list(key, text)
    if is_text(hint):
        if text == "null":
            print(f"note: {key}=null is the word null; {key}= is an empty text", file=sys.stderr)
        return text
    if is_number(hint):
        return _number(text)
    item = item_hint(hint)
    if container_of(hint) in (list, tuple) and (is_text(item) or holds(item, Holds.PROMPTS)):
        return _items(key, text)
    if short_form(item) and not text.lstrip().startswith(("[", "{")):
        return text
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        raise UserError(
            f"{key}={text}: the value is not valid YAML; quote it for the shell"
        ) from None


def short_form(item: Any) -> str | None:
    """Returns the field of a section that a text alone stands for; None where none does."""
    section = nested_class(item) if item is not None else None
    return getattr(section, "SHORT_FORM", None)


def written_out(hint: Any, value: Any) -> Any:
    """Returns a list of sections with the texts that stand for one written out, and one section as
    a list of it; any other value as it is."""
    name = short_form(item_hint(hint)) if container_of(hint) is list else None
    if name is None or value is None:
        return value
    items = value if isinstance(value, list) else [value]
    return [{name: item} if isinstance(item, str) else item for item in items]


def _text_or_list(key: str, text: str) -> str | list[Any]:
    """Returns the list where the text is one in JSON, else the text."""
    if not text.lstrip().startswith("["):
        return text
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        if text.rstrip().endswith("]"):
            print(
                f'note: {key}={text} is one text; a list is written as JSON: {key}=["a", "b"]',
                file=sys.stderr,
            )
        return text
    return value if isinstance(value, list) else text


def _number(text: str) -> Any:
    """Returns null, a truth value, an int or a float, or the text where it is none of these."""
    word = text.strip().lower()
    if word in ("", "null", "~", "true", "false"):
        return {"true": True, "false": False}.get(word)
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return text


def _items(key: str, text: str) -> Any:
    """Splits a list of texts; `[a, "b, c"]` needs quotes where an item holds a comma alone."""
    inside = text.strip()
    if not (inside.startswith("[") and inside.endswith("]") and len(inside) > 1):
        return _number(text)  # no list: refused as what it is
    inside, start = inside[1:-1], 0
    items: list[str] = []
    while start < len(inside):
        match = _ITEM.match(inside, start)
        assert match is not None, "the second form takes anything"
        quoted, plain = match[1], match[2]
        item = _unquoted(quoted) if quoted else plain.strip()
        if not item and not quoted:
            if inside[match.end() :].strip() or not (items and match.end() == len(inside)):
                raise UserError(f'{key}={text}: an item is empty; write "" for an empty text')
        else:
            items.append(item)
        start = match.end()
    return items


def _unquoted(text: str) -> str:
    if text[0] == "'":
        return text[1:-1].replace("''", "'")
    try:
        return str(json.loads(text, strict=False))
    except ValueError:  # a backslash that JSON does not know
        return text[1:-1]


class Texts:
    """Texts that OmegaConf would not leave as they are, by the tokens that stand for them."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def guarded(self, hint: Any, value: Any, where: str) -> Any:
        """Returns a value for a field of type `hint` as OmegaConf may see it, its paths expanded.

        where: names the value in errors. In a path ${...} that is no environment variable is left
        to OmegaConf, as in numbers. Raises UserError.
        """
        if isinstance(value, dict):
            section = nested_class(hint)
            known = fields_of(section) if section is not None else {}
            hints = {key: field.hint for key, field in known.items()}
            return {
                key: self.guarded(hints.get(str(key), item_hint(hint)), entry, f"{where}, {key}")
                for key, entry in value.items()
            }
        if isinstance(value, list):
            item = str if holds(hint, Holds.PROMPTS) else item_hint(hint)
            return [self.guarded(item, entry, where) for entry in value]
        if is_text(hint) and isinstance(value, bool | float):
            raise UserError(f"{where}: {value} is {type(value).__name__}; put a text in quotes")
        if not isinstance(value, str) or is_number(hint):
            return value
        if holds(hint, Holds.PATH):
            if is_verbatim(value):
                return self._token(value)
            path = _path(expanded, value, where)
            return path if holds(hint, Holds.OUTPUT) else shipped(path)
        if holds(hint, Holds.PROMPTS):
            value = _path(prompts_path, value, where)
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where} is not UTF-8 text; write it in UTF-8") from None
        return self._token(value)

    def instance(self, hint: Any, value: Any) -> Any:
        """Builds dataclasses from OmegaConf's checked values, texts in place of their tokens."""
        section, item = nested_class(hint), item_hint(hint)
        if isinstance(value, dict):
            if section is None:
                return {key: self.instance(item, entry) for key, entry in value.items()}
            known = fields_of(section)
            entries = {key: self.instance(known[key].hint, value[key]) for key in value}
            return section(**entries)
        if isinstance(value, list | tuple):
            items = [self.instance(item, entry) for entry in value]
            return tuple(items) if container_of(hint) is tuple else items
        return self._texts.get(value, value) if isinstance(value, str) else value

    def _token(self, text: str) -> str:
        if "${" not in text and text != MISSING and _MARK not in text:
            return text
        token = f"{_MARK}{len(self._texts)}"
        self._texts[token] = text
        return token


def _path(read: Callable[[str], str], text: str, where: str) -> str:
    try:
        return read(text)
    except BadPath as error:
        raise UserError(f"{where}: {error}") from None
