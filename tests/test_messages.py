"""Every key that a message names as a remedy exists in the verb that prints it.

As far as that can be read from the source: a message may be printed by every verb whose module
imports, at any depth, the module that the message stands in. `key=value` with a value written out
is a remedy or an example; `key={...}` repeats what was given.
"""

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from blackpoint.scripts.cli import VERBS
from blackpoint.scripts.config_fields import fields_of, item_hint, nested_class

ROOT = Path(__file__).resolve().parents[1]
KEY = re.compile(r"(?<![\w./\-{}$\]\0])([a-z_][a-z0-9_]*(?:\.[A-Za-z_]\w*)*)=(?:[\w.\[\"]|\.\.\.)")
COMMAND = re.compile(r"blackpoint ((?:data )?[a-z]+) ")
CLASSES: dict[str, list[type]] = {
    verb: [importlib.import_module(module).config_class()] for verb, (module, _) in VERBS.items()
}
RUNS = {
    "sweep": ("train", "evaluate", "search"),
    "demo": ("train", "evaluate", "search", "data pack", "export"),
    "doctor": ("train", "sample"),
    "show": ("train", "sample", "search"),
    "init": ("train", "data pack"),
    "prefetch": ("train", "sample", "search", "evaluate"),
}
"""Verbs that run others, whose messages they pass on, or that name what to give to others."""
WRITES_CODE = tuple(f"sampling/export/{name}.py" for name in ("model_card", "clients", "lora_card"))
"""Modules whose texts are Python for others."""
FACTS = {
    "data/shards/remote.py": {"bytes"},  # a header of HTTP
    "sampling/export/client_schedulers.py": {"eta"},  # an argument of diffusers' DDIMScheduler
    "sampling/process.py": {"prediction_type", "timestep_spacing"},  # scheduler_config.json
    "sampling/checkpoints/scheduler_config.py": {
        "rescale_betas_zero_snr"
    },  # of scheduler_config.json too
    "sampling/statistics/table.py": {"class", "id"},  # attributes of HTML
    "scripts/cli.py": {"key"},
    "scripts/config.py": {"key"},
    "scripts/config_fields.py": {"key"},
}
"""What looks like a key and is none of a verb's."""
NOT_PRINTED = {
    ("sampling/process.py", "allow_unsound"): ("search", "export", "data encode"),
    ("sampling/runtime/pictures.py", "dtype"): ("train",),
    ("sampling/runtime/speed.py", "attention"): ("data encode", "export"),
    ("sampling/runtime/speed.py", "compile"): ("evaluate", "data encode", "export"),
}
"""Verbs that import the module and never come to the message: they have the choice made, call no
sampler, load no half precision, or know that kind of config from its neighbours alone."""
READS_ONLY = ("report",)
"""Verbs that read what others wrote: of other packages they print nothing with a remedy."""


@cache
def imported(path: Path) -> frozenset[Path]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        ours = (name.removeprefix("blackpoint.") for name in names)
        found |= {ROOT / f"{name.replace('.', '/')}.py" for name in ours}
    return frozenset(file for file in found if file.exists())


def reachable(path: Path) -> set[Path]:
    seen: set[Path] = set()
    waiting = [path]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += imported(module)
    return seen


def texts(tree: ast.Module) -> Iterator[str]:
    """Yields the strings of a module but for docstrings, what is filled in as NUL."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            skipped.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            skipped |= {id(value) for value in node.values}
            parts = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
            yield "".join(map(str, parts))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in skipped:
            yield from [node.value] if isinstance(node.value, str) else []


@cache
def remedies(path: Path) -> frozenset[tuple[str, str]]:
    """Returns (verb, key) of a module's messages; the verb is "" unless the message names it."""
    name = str(path.relative_to(ROOT))
    found = set()
    for text in texts(ast.parse(path.read_text(encoding="utf-8"))):
        start, verb = 0, ""
        for match in [*COMMAND.finditer(text), None]:
            end = match.start() if match else len(text)
            found |= {(verb, key) for key in KEY.findall(text[start:end])}
            if match is not None:
                start, verb = match.end(), match[1] if match[1] in VERBS else ""
    return frozenset(pair for pair in found if pair[1] not in FACTS.get(name, ()))


def last_words(verb: str) -> set[str]:
    """Returns the last words of a verb's keys: nested configs do not know where they stand."""
    found = set()
    for each in (verb, *RUNS.get(verb, ())):
        for config_class in CLASSES[each]:
            for path, field in fields_of(config_class).items():
                found.add(path.rpartition(".")[2])
                item = nested_class(item_hint(field.hint))
                found |= set(fields_of(item)) if item else set()
    return found


def module_of(verb: str) -> Path:
    return ROOT / (VERBS[verb][0].removeprefix("blackpoint.").replace(".", "/") + ".py")


@pytest.mark.parametrize("verb", VERBS)
def test_keys_of_messages_exist_in_the_verb_that_prints_them(verb: str) -> None:
    known, wrong = last_words(verb), set()
    for path in reachable(module_of(verb)):
        name = str(path.relative_to(ROOT))
        if name in WRITES_CODE or (verb in READS_ONLY and not name.startswith("scripts/")):
            continue
        for named, key in remedies(path):
            words = last_words(named) if named else known
            excepted = verb in NOT_PRINTED.get((name, key), ())
            if key.rpartition(".")[2] not in words and not excepted:
                wrong.add(f"{name}: {named or verb} has no {key}")
    assert not wrong, "\n".join(sorted(wrong))


def test_the_exceptions_are_still_there() -> None:
    for name, key in NOT_PRINTED:
        assert ("", key) in remedies(ROOT / name), f"{name} does not name {key} any more"
