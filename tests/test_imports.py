"""The house rules that a machine can check: import direction, light imports, names and sizes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data", "sampling", "train", "scripts")
ALLOWED = {
    "data": {"data"},
    "sampling": {"sampling"},
    "train": {"train", "sampling", "data"},
    "scripts": {"scripts", "train", "sampling", "data"},
}
ROOMS_OF_SAMPLING = ("data.files.", "data.images.")
"""Rooms of data that sampling may use."""
# Distributions that are not called what they are imported as.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "open_clip": "open-clip-torch",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SOURCES = MODULES + sorted((ROOT / "tests").glob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Lists the full names of the modules that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Exports carry a copy of this one, with its neighbour.
            alone = path.name == "pixel_pipeline.py" and node.module == "pixel_codec"
            assert node.level == 0 or alone, f"{path}: imports are absolute"
            found.add(f"sampling.{node.module}" if node.level else node.module or "")
    return found


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = {name for name in imports_of(path) if name.split(".")[0] in PACKAGES}
    if package == "sampling":
        ours = {name for name in ours if not name.startswith(ROOMS_OF_SAMPLING)}
    packages = {name.split(".")[0] for name in ours}
    assert packages <= ALLOWED[package], f"{package} must not import {ours}"


@pytest.mark.parametrize("room, below", [("files", ()), ("images", ("data.files.",))])
def test_rooms_of_sampling_are_below_everything(room: str, below: tuple[str, ...]) -> None:
    for path in (ROOT / "data" / room).glob("*.py"):
        names = {name for name in imports_of(path) if name.split(".")[0] in PACKAGES}
        assert all(name.startswith((f"data.{room}.", *below)) for name in names), f"{path}: {names}"
        assert not {"torch", "lightning", "diffusers"} & {n.split(".")[0] for n in imports_of(path)}


def test_importing_sampling_imports_no_lightning() -> None:
    modules = [
        relative(path).removesuffix(".py").replace("/", ".")
        for path in MODULES
        if path.is_relative_to(ROOT / "sampling") and path.name != "__init__.py"
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print([m for m in ('lightning', 'pytorch_lightning', 'wandb') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_third_party_imports_are_declared() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = set(re.findall(r'"([A-Za-z0-9-]+)>=', pyproject))
    undeclared = set()
    for path in SOURCES:
        for name in {name.split(".")[0] for name in imports_of(path)}:
            known = name in sys.stdlib_module_names or name in (*PACKAGES, "tests")
            if not known and DISTRIBUTIONS.get(name, name.replace("_", "-")) not in declared:
                undeclared.add(f"{relative(path)}: {name}")
    assert not undeclared, "add to pyproject.toml: " + ", ".join(sorted(undeclared))


def test_every_package_is_listed() -> None:
    packages = {
        relative(path.parent).replace("/", ".") for path in MODULES if path.name == "__init__.py"
    }
    folders = {relative(path.parent).replace("/", ".") for path in MODULES}
    listed = re.search(
        r"^packages = \[(\"data\".*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    assert listed is not None
    assert set(re.findall(r'"([\w.]+)"', listed[1])) == packages == folders


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_are_small_ascii_and_named_for_what_they_hold(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    assert len(text.splitlines()) <= 400, "split the file: one concept each"
    assert path.stem not in ("utils", "util", "helpers", "common", "misc")
    if path.name == "__init__.py":
        assert text == "", "package files stay empty"
    else:
        assert ast.get_docstring(ast.parse(text)), "say what lives here"
    if path.parent == ROOT / "scripts":
        assert path.stem not in PACKAGES, "running it would shadow the package"
