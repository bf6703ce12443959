"""The house rules that a machine can check: rooms, import direction, light imports, names, sizes.

A room is a folder of modules. In a folder that holds rooms, such as sampling/, every module counts
as a room by itself: sampling/model.py stands above sampling/checkpoints, sampling/choices.py below.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data", "sampling", "train", "scripts")
MOST_MODULES, MOST_LINES = 15, 350
MOST_PRODUCT_LINES, MOST_CODE_LINES = 45_453, 54_119
PROOF = ("scripts.miniature", "scripts.studies", "scripts.bench", "scripts.measurements")
"""Rooms that prove what the product says; the product never imports them."""
ROOMS = """\
data.*: data.files data.images data.index data.order data.shards data.work
data.check: data.* data.files data.index data.shards data.work
data.files:
data.images: data.files
data.index: data.* data.files data.images data.shards data.work
data.order: data.files data.index data.shards
data.pack: data.* data.files data.images data.index data.shards data.work
data.shards: data.* data.files data.images
data.work: data.* data.files data.images data.shards
sampling.*: data.files data.images sampling.checkpoints sampling.export sampling.pipelines
    sampling.pixels sampling.prompts sampling.runtime
sampling.checkpoints: data.files sampling.* sampling.lora sampling.pixels
sampling.evaluation.*: data.files sampling.* sampling.evaluation.metrics sampling.pipelines
    sampling.pixels sampling.prompts sampling.runtime sampling.statistics sampling.verifiers.*
sampling.evaluation.metrics: data.files data.images sampling.* sampling.checkpoints
    sampling.evaluation.* sampling.pipelines sampling.pixels sampling.prompts sampling.statistics
    sampling.verifiers.* sampling.verifiers.models
sampling.export: data.files data.images sampling.* sampling.checkpoints sampling.lora
    sampling.pixels
sampling.lora: data.files
sampling.pipelines: data.files sampling.* sampling.checkpoints
sampling.pixels: data.files data.images
sampling.prompts: data.files
sampling.report: data.files sampling.evaluation.* sampling.evaluation.metrics sampling.prompts
    sampling.runtime sampling.search.* sampling.statistics sampling.verifiers.*
sampling.runtime: data.files data.images sampling.*
sampling.search.*: data.files data.images sampling.* sampling.checkpoints sampling.pipelines
    sampling.prompts sampling.runtime sampling.search.algorithms sampling.statistics
    sampling.verifiers.* sampling.verifiers.models
sampling.search.algorithms: data.files sampling.* sampling.search.*
sampling.statistics: data.files sampling.*
sampling.verifiers.*: data.files data.images sampling.* sampling.pipelines sampling.pixels
    sampling.prompts sampling.runtime sampling.statistics sampling.verifiers.models
sampling.verifiers.models: data.files sampling.checkpoints sampling.verifiers.*
scripts.*: data.files data.shards sampling.prompts sampling.runtime train.plan train.records
scripts.bench: data.* data.files data.images data.index data.shards sampling.*
    sampling.checkpoints sampling.pipelines sampling.prompts sampling.report sampling.runtime
    sampling.search.* sampling.search.algorithms sampling.statistics sampling.verifiers.* scripts.*
    scripts.measurements train.* train.callbacks train.config train.records
scripts.cluster: data.files scripts.* train.config train.records
scripts.doctor: data.files sampling.* sampling.runtime scripts.cluster train.*
scripts.init: data.* data.files data.images data.pack sampling.* sampling.lora sampling.runtime
    scripts.doctor train.cluster train.config train.plan train.records
scripts.measurements: data.* data.files data.images data.index data.shards sampling.*
    sampling.checkpoints sampling.export sampling.pixels sampling.prompts sampling.report
    sampling.runtime sampling.search.* sampling.statistics sampling.verifiers.* scripts.* train.*
    train.config train.records
scripts.miniature: data.files data.images data.pack sampling.* sampling.checkpoints
    sampling.export sampling.prompts sampling.report sampling.runtime sampling.search.*
    sampling.statistics scripts.* scripts.doctor scripts.sweep scripts.verbs train.*
    train.config
scripts.prefetch: data.files sampling.checkpoints sampling.evaluation.metrics sampling.pipelines
    sampling.verifiers.* sampling.verifiers.models scripts.*
scripts.show: data.files data.images sampling.* sampling.prompts sampling.report sampling.runtime
    sampling.search.* sampling.statistics scripts.* train.records
scripts.studies: data.* data.files data.pack sampling.evaluation.* sampling.report
    sampling.runtime sampling.statistics scripts.* scripts.measurements scripts.miniature
    scripts.sweep train.* train.cluster train.config train.records
scripts.sweep: data.files sampling.* sampling.checkpoints sampling.evaluation.* sampling.prompts
    sampling.report sampling.search.* sampling.statistics scripts.* train.config train.records
scripts.verbs: data.* data.check data.files data.pack sampling.* sampling.evaluation.*
    sampling.export sampling.report sampling.runtime sampling.search.* sampling.statistics
    scripts.* scripts.doctor scripts.show scripts.sweep train.* train.config train.encode
    train.plan train.records
train.*: data.* data.files sampling.* sampling.export sampling.pixels sampling.runtime
    train.callbacks train.cluster train.config train.records
train.callbacks: data.files sampling.* sampling.checkpoints sampling.export sampling.pixels
    sampling.prompts sampling.runtime train.* train.cluster train.config train.records
train.cluster: data.files sampling.checkpoints sampling.runtime train.* train.config train.records
train.config: data.* data.files sampling.* sampling.runtime train.*
train.encode: data.* data.files data.images data.index data.order data.shards data.work sampling.*
    sampling.checkpoints sampling.runtime train.records
train.plan: data.* data.files sampling.* sampling.checkpoints sampling.runtime
    sampling.statistics train.* train.cluster train.config train.records
train.records: data.* data.files data.images data.order data.shards sampling.*
    sampling.checkpoints sampling.pixels sampling.runtime train.config
"""
"""What each room imports; NAME.* are the modules of a folder that holds rooms."""
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
FOLDERS = {name.rpartition(".")[0] for name in NAMES}
HALLS = {f for f in FOLDERS if any(other.startswith(f"{f}.") for other in FOLDERS)}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(text_of(path))


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Lists the full names that a file imports, wherever in the file; ours without blackpoint."""
    names: set[str] = set()
    for node in run_time_nodes(path):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Exports carry a copy of this one, with its neighbour.
            alone = path.name == "pixel_pipeline.py" and node.module == "pixel_codec"
            assert node.level == 0 or alone, f"{path}: imports are absolute"
            module = f"blackpoint.sampling.pixels.{node.module}" if alone else node.module or ""
            names.update({module, *(f"{module}.{alias.name}" for alias in node.names)})
    return frozenset(name.removeprefix("blackpoint.") for name in names)


@cache
def run_time_nodes(path: Path) -> list[ast.AST]:
    """Lists the nodes of a file but for what only a type checker reads."""
    nodes: list[ast.AST] = [tree_of(path)]
    for node in nodes:
        nodes.extend(child for child in ast.iter_child_nodes(node) if not _is_for_types(child))
    return nodes


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def modules_used(name: str) -> set[str]:
    return {used for used in imports_of(NAMES[name]) if used in NAMES} - {name}


def room_of(name: str) -> str:
    folder = name.rpartition(".")[0]
    return name if folder in HALLS else folder


def edges() -> dict[str, set[str]]:
    """Maps every room to the rooms that its modules import."""
    table: dict[str, set[str]] = {}
    for name in NAMES:
        used = table.setdefault(room_of(name), set())
        used |= {room_of(other) for other in modules_used(name)} - {room_of(name)}
    return table


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Returns the nodes of one cycle of a graph, or none."""
    left = dict(graph)
    while ends := [node for node, used in left.items() if not used & left.keys()]:
        for node in ends:
            del left[node]
    path: list[str] = []
    while left and (not path or path[-1] not in path[:-1]):
        path.append(min(left[path[-1]] & left.keys()) if path else min(left))
    return path[path.index(path[-1]) :] if path else []


def test_rooms_import_what_the_table_says() -> None:
    """A new edge is a decision: it is added to ROOMS, if it does not go up."""
    found: dict[str, set[str]] = {}
    for room, used in edges().items():
        name = room if room in FOLDERS else f"{room.rpartition('.')[0]}.*"
        others = {other if other in FOLDERS else f"{other.rpartition('.')[0]}.*" for other in used}
        found.setdefault(name, set()).update(others - {name})
    rows = re.sub(r"\n +", " ", ROOMS).splitlines()
    table = {room: set(used.split()) for room, _, used in (row.partition(":") for row in rows)}
    assert found == table


def test_every_import_of_ours_is_there() -> None:
    """mypy takes a module that is not there for one without types."""
    for path in SOURCES:
        for node in run_time_nodes(path):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("blackpoint."):
                name = str(node.module).removeprefix("blackpoint.")
                assert name in NAMES or name in FOLDERS, f"{relative(path)}: no {name}"


def test_no_module_and_no_room_is_in_a_cycle() -> None:
    assert cycle({name: modules_used(name) for name in NAMES}) == []
    assert cycle(edges()) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_name_of_before_is_imported() -> None:
    old = re.compile(rf"^\s*(?:from|import) (?:{'|'.join(PACKAGES)})\b.*", re.M)
    found = {relative(path): old.findall(text_of(path)) for path in MODULES}
    assert not {path: lines for path, lines in found.items() if lines}, "import from blackpoint.*"


def test_the_product_does_not_import_its_proofs() -> None:
    product = {name: path for name, path in NAMES.items() if not name.startswith(PROOF)}
    used = {name: {u for u in imports_of(p) if u.startswith(PROOF)} for name, p in product.items()}
    assert not {name: proofs for name, proofs in used.items() if proofs}


@pytest.mark.parametrize("room, below", [("files", ()), ("images", ("data.files.",))])
def test_rooms_of_sampling_are_below_everything(room: str, below: tuple[str, ...]) -> None:
    for path in (ROOT / "data" / room).glob("*.py"):
        names = {name for name in imports_of(path) if name in NAMES}
        assert all(name.startswith((f"data.{room}.", *below)) for name in names), f"{path}: {names}"
        assert not {"torch", "lightning", "diffusers"} & {n.split(".")[0] for n in imports_of(path)}


def test_the_library_in_two_names_waits_for_torch_and_never_imports_lightning() -> None:
    modules = [f"blackpoint.{name}" for name in NAMES if name.startswith("sampling.")]
    code = (
        "import importlib, sys, blackpoint.sampling as s\n"
        "assert 'torch' not in sys.modules\n"
        "from blackpoint.sampling import DiffusionModel, NoiseSchedule\n"
        "assert DiffusionModel.load and NoiseSchedule.scaled_linear and not hasattr(s, 'Nothing')\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "assert not {'lightning', 'pytorch_lightning', 'wandb'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


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


def test_the_code_grows_on_purpose_alone() -> None:
    lines = {name: len(text_of(path).splitlines()) for name, path in NAMES.items()}
    product = sum(count for name, count in lines.items() if not name.startswith(PROOF))
    assert product <= MOST_PRODUCT_LINES and sum(lines.values()) <= MOST_CODE_LINES


def test_rooms_are_small() -> None:
    sizes = Counter(name.rpartition(".")[0] for name in NAMES)
    large = {folder: size for folder, size in sizes.items() if size > MOST_MODULES}
    assert not large, "make a room of what belongs together"


def test_files_are_small_ascii_and_named_for_what_they_hold() -> None:
    for path in SOURCES:
        text, name = text_of(path), relative(path)
        assert text.isascii(), name
        limit = MOST_LINES if path in MODULES else 410
        assert len(text.splitlines()) <= limit, f"{name}: split the file, one concept each"
        assert path.stem not in ("utils", "util", "helpers", "common", "misc"), name
        if path.name != "__init__.py":
            assert ast.get_docstring(tree_of(path)), f"{name}: say what lives here"
        elif path.parent != ROOT / "sampling":
            assert text == "", f"{name}: package files stay empty, but for the library's two names"
