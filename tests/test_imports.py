"""The house rules that a machine can check: import direction, light imports, names, sizes."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data", "sampling", "train", "scripts")
# Distributions that are not called what they are imported as.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "open_clip": "open-clip-torch",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SOURCES = MODULES + sorted((ROOT / "tests").rglob("*.py"))
NAMES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in MODULES
    if path.name != "__init__.py"
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Lists the full names that a file imports, wherever in the file; ours without blackpoint."""
    names: set[str] = set()
    for node in _run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Exports carry a copy of this one, with its neighbour.
            alone = path.name == "pixel_pipeline.py" and node.module == "pixel_codec"
            assert node.level == 0 or alone, f"{path}: imports are absolute"
            module = f"blackpoint.sampling.pixels.{node.module}" if alone else node.module or ""
            names.update({module, *(f"{module}.{alias.name}" for alias in node.names)})
    return frozenset(name.removeprefix("blackpoint.") for name in names)


def _run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Walks a tree but for what only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from _run_time_nodes(child)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_name_of_before_is_imported(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    old = re.findall(rf"^\s*(?:from|import) (?:{'|'.join(PACKAGES)})\b.*", text, re.M)
    assert not old, "import from blackpoint.*"


@pytest.mark.parametrize("room, below", [("files", ()), ("images", ("data.files.",))])
def test_rooms_of_sampling_are_below_everything(room: str, below: tuple[str, ...]) -> None:
    for path in (ROOT / "data" / room).glob("*.py"):
        names = {name for name in imports_of(path) if name in NAMES}
        assert all(name.startswith((f"data.{room}.", *below)) for name in names), f"{path}: {names}"
        assert not {"torch", "lightning", "diffusers"} & {n.split(".")[0] for n in imports_of(path)}


def test_importing_sampling_imports_no_lightning() -> None:
    modules = [f"blackpoint.{name}" for name in NAMES if name.startswith("sampling.")]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print([m for m in ('lightning', 'pytorch_lightning', 'wandb') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_library_in_two_names_waits_for_torch_until_one_is_asked_for() -> None:
    code = (
        "import sys, blackpoint.sampling as s\n"
        "assert 'torch' not in sys.modules\n"
        "from blackpoint.sampling import DiffusionModel, NoiseSchedule\n"
        "assert DiffusionModel.load and NoiseSchedule.scaled_linear and not hasattr(s, 'Nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_third_party_imports_are_declared() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = set(re.findall(r'"([A-Za-z0-9-]+)>=', pyproject))
    undeclared = set()
    for path in SOURCES:
        for name in {name.split(".")[0] for name in imports_of(path)}:
            known = name in sys.stdlib_module_names or name in (*PACKAGES, "tests", "blackpoint")
            if not known and DISTRIBUTIONS.get(name, name.replace("_", "-")) not in declared:
                undeclared.add(f"{relative(path)}: {name}")
    assert not undeclared, "add to pyproject.toml: " + ", ".join(sorted(undeclared))


def test_every_package_is_listed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^packages = \[(.*?)\]", text, re.M | re.S)
    assert listed is not None
    packages = {relative(path.parent).replace("/", ".") for path in MODULES}
    assert {path.parent for path in MODULES if path.name == "__init__.py"} == {
        path.parent for path in MODULES
    }
    assert set(re.findall(r'"blackpoint\.([\w.]+)"', listed[1])) == packages | {"assets", "configs"}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_are_small_ascii_and_named_for_what_they_hold(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    assert len(text.splitlines()) <= 410, "split the file: one concept each"
    assert path.stem not in ("utils", "util", "helpers", "common", "misc")
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(text)), "say what lives here"
    elif path.parent != ROOT / "sampling":
        assert text == "", "package files stay empty, but for the library's two names"
