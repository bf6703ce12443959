"""README and docs name what exists: verbs, keys, modules, files and links; snippets parse."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from blackpoint.scripts.cli import VERBS, chosen_config_class
from blackpoint.scripts.config import load
from blackpoint.scripts.config_fields import hint_at

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [README, *sorted((ROOT / "docs").rglob("*.md"))]
    if path.name != "extending.md"  # what it adds is not there: tests/test_extending*.py
}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
FOLDERS = "assets|configs|data|docs|sampling|scripts|slurm|tests|train"
FILE = re.compile(rf"(?<![\w./{{*-])((?:{FOLDERS})/[\w./-]*(?:/|\.(?:py|md|yaml|jsonl|sbatch)))")
KEY_VALUE = re.compile(r"([A-Za-z_][\w.\[\]-]*)=")
SBATCH_VERBS = {"encode": "data encode"}


def blocks(text: str, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(text) if name == language]


def commands_of(text: str) -> Iterator[list[str]]:
    """Yields the commands of bash blocks and code spans, as words, without their comments."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    for line in [*lines, *SPAN.findall(FENCE.sub("", text))]:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue  # a span that is no command
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


def verb_call(words: list[str]) -> list[str]:
    """Returns verb and arguments of a command that calls one, also by sbatch or torchrun."""
    if words[0] not in ("blackpoint", "sbatch", "torchrun"):
        return []
    for number, word in enumerate(words):
        if Path(word).name == "blackpoint" or word == "blackpoint.scripts.cli":
            return words[number + 1 :]
        if word.endswith(".sbatch"):
            name = Path(word).stem
            return [*SBATCH_VERBS.get(name, name).split(), *words[number + 1 :]]
    return []


@cache
def config_class_of(verb: str, *arguments: str) -> type:
    return chosen_config_class(importlib.import_module(VERBS[verb][0]), list(arguments))


def problems(words: list[str]) -> Iterator[str]:
    """Yields what a command names that does not exist."""
    if words[:2] == ["python", "-m"] and words[2].startswith("blackpoint."):
        if not (ROOT / f"{words[2].replace('.', '/')}.py".removeprefix("blackpoint/")).is_file():
            yield f"module {words[2]}"
    elif words[0] == "make":
        yield from (f"target {word}" for word in words[1:] if f"\n{word}:" not in MAKEFILE)
    call = verb_call(words)
    if not call or call[0] in ("VERB", "--version"):
        return
    verb = next((verb for verb in (" ".join(call[:2]), call[0]) if verb in VERBS), None)
    if verb is None:
        yield f"verb {call[0]}"
        return
    arguments = call[len(verb.split()) :]
    configs = [word for word in arguments if word.startswith("configs/")]
    yield from (f"config {word}" for word in configs if not (ROOT / word).is_file())
    pairs = [word for word in arguments if KEY_VALUE.match(word)]
    config_class = config_class_of(verb, *configs, *pairs)
    keys = [word.partition("=")[0] for word in pairs]
    yield from (f"key {key} of {verb}" for key in keys if hint_at(config_class, key) is None)


def words_of(module: str) -> set[str]:
    """Returns the words of a module's source, which takes seconds less than its import."""
    path = ROOT.joinpath(*module.split(".")[1:])
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return set(re.findall(r"\w+", source.read_text(encoding="utf-8")))


def test_commands_name_verbs_keys_modules_and_configs_that_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    commands = [(page, words) for page, text in PAGES.items() for words in commands_of(text)]
    assert sum(bool(verb_call(words)) for _, words in commands) > 50, "commands are found"
    missing = [(page, problem) for page, words in commands for problem in problems(words)]
    assert not missing


def test_commands_that_a_newcomer_pastes_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value is of its field's type and within its bounds, and no required key is missing."""
    monkeypatch.chdir(ROOT)
    loaded = 0
    for page in ("README.md", "docs/tutorial.md", "docs/troubleshooting.md"):
        for call in map(verb_call, commands_of(PAGES[page])):
            verb = next((v for v in (" ".join(call[:2]), *call[:1]) if v in VERBS), "")
            arguments = call[len(verb.split()) :]
            if not verb or not arguments or "CONFIG.yaml" in arguments:
                continue  # a mention
            load(config_class_of(verb, *arguments), arguments)
            loaded += 1
    assert loaded > 40, "commands are found"


def test_links_and_paths_exist() -> None:
    for page, text in PAGES.items():
        links = {link for link in LINK.findall(FENCE.sub("", text)) if "://" not in link}
        assert not {link for link in links if not (ROOT / page).parent.joinpath(link).exists()}, (
            page
        )
        paths = {path for span in SPAN.findall(text) for path in FILE.findall(span)}
        assert not {path for path in paths if not (ROOT / path).exists()}, page


def test_python_snippets_run_as_pasted_as_far_as_their_names_tell() -> None:
    for page, text in PAGES.items():
        for body in blocks(text, "python"):
            known: set[str] = set()
            used: set[str] = set()
            for node in ast.walk(ast.parse(body)):
                if isinstance(node, ast.ImportFrom):
                    names = {name.name for name in node.names}
                    if (node.module or "").startswith("blackpoint"):
                        missing = names - words_of(node.module or "")
                        assert not missing, f"{page}: {missing}"
                    known |= names
                elif isinstance(node, ast.Import):
                    known |= {name.name for name in node.names}
                elif isinstance(node, ast.Name):
                    (known if isinstance(node.ctx, ast.Store) else used).add(node.id)
            assert used <= known, f"{page}: {used - known} in a snippet is not imported"


def test_readme_is_short_and_its_tree_is_the_repository() -> None:
    text = PAGES["README.md"]
    assert len(text.splitlines()) < 150
    (tree,) = (body for body in blocks(text, "") if body.startswith("configs/"))
    folder = ROOT
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        folder = folder if line.startswith(" ") else ROOT
        assert all((folder / name).exists() for name in names), line
        if not line.startswith(" "):
            folder = ROOT / names[0]


def test_three_files_lead_a_newcomer_from_the_readme_and_each_names_the_next() -> None:
    table = PAGES["docs/design.md"].partition("## The newcomer's table")[2]
    rows = [SPAN.findall(line) for line in table.splitlines() if line.startswith("| ")]
    rows = [files for files in rows if files]
    assert len(rows) == 5
    for files in rows:
        assert files[0] == "README.md" and len(files) <= 3
        for before, path in zip(files, files[1:], strict=False):
            assert (ROOT / path).is_file()
            assert Path(path).name in (ROOT / before).read_text(encoding="utf-8"), (before, path)
