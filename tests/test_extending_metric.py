"""A metric is added as docs/extending.md says: its file, and its line in the table of metrics."""

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.evaluation import config as metrics
from blackpoint.sampling.evaluation.rows import read_images
from blackpoint.sampling.evaluation.run import evaluate_to_folder
from blackpoint.sampling.runtime.tasks import Task
from blackpoint.scripts.config import load
from blackpoint.scripts.config_fields import fields_of
from tests.evaluations import arguments, metric, write_prompts

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
PACKAGE = metrics.__name__.rpartition(".")[0]
BESIDE = "    brightness: BrightnessConfig = field(default_factory=BrightnessConfig)\n"


def module(name: str, path: Path, source: str, patch: pytest.MonkeyPatch) -> ModuleType:
    """Writes a module and imports it under a name."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, name, made)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The config of evaluations with the page's metric."""
    section = PAGE.read_text().partition("## An evaluation metric")[2].partition("\n## ")[0]
    code, line = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert sum(bool(each.strip()) for each in (code + line).splitlines()) < 15
    folder = tmp_path / "package"
    folder.mkdir()
    module(f"{PACKAGE}.contrast", folder / "contrast.py", code, monkeypatch)
    source = inspect.getsource(metrics)
    assert source.count(BESIDE) == 1
    source = source.replace(BESIDE, line + BESIDE)
    where = source.index("\nfrom ", source.index("import")) + 1
    source = f"{source[:where]}from {PACKAGE}.contrast import ContrastConfig\n{source[where:]}"
    return module(f"{PACKAGE}.extended", folder / "metrics.py", source, monkeypatch)


def test_a_metric_is_one_file_and_one_line(
    pipeline: Path, tmp_path: Path, extended: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = fields_of(extended.MetricsConfig)["contrast.enabled"]
    assert (key.default, key.meaning) == (False, "Measure it.")
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    given = arguments(pipeline, prompts, tmp_path / "out", "num_images=1")
    evaluate_to_folder(load(metrics.MetricsConfig, given), Task())
    generator = f"{PACKAGE}.generate.ImageGenerator.generate"
    monkeypatch.setattr(generator, None)  # the pictures are there
    config = load(extended.MetricsConfig, [*given, "contrast.enabled=true"])
    summary = evaluate_to_folder(config, Task())
    assert summary is not None
    rows = read_images(tmp_path / "out")
    for row in rows:
        pixels = np.asarray(Image.open(tmp_path / "out" / row["file"]), dtype=float) / 255
        assert row["contrast"] == pytest.approx(pixels.std(ddof=1), abs=1e-5)
    found = metric(summary, "contrast").estimate
    assert found.n == 5
    assert found.value == pytest.approx(np.mean([row["contrast"] for row in rows]))
    also = ["verifiers.contrast.kind=luminance", "verifiers.contrast.target=0"]
    config = load(extended.MetricsConfig, [*given, "contrast.enabled=true", *also])
    with pytest.raises(UserError, match="contrast is measured by another metric; rename it"):
        evaluate_to_folder(config, Task())
