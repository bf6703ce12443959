"""No verb imports what it does not use, so that help and light verbs answer at once.

The laws are on what is imported, not on seconds; `make bench` measures those.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blackpoint.scripts.bench.startup import required_keys
from blackpoint.scripts.cli import VERBS
from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_run import make_tiny_shards

ROOT = Path(__file__).resolve().parents[1]
# What takes a second or more to import, or belongs to one verb alone.
TORCH = {"torch", "torchvision", "torchmetrics", "diffusers", "transformers", "accelerate"}
TRAINING = {"lightning", "pytorch_lightning", "wandb", "webdataset", "bitsandbytes"}
PLOTS = {"matplotlib"}
CODE = """
import sys
from blackpoint.scripts.cli import main
status = main(sys.argv[1:])
print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}))
sys.exit(status)
"""


def imported_by(*arguments: str) -> set[str]:
    """Runs a command line in a fresh interpreter and returns the packages that it imported."""
    result = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split()[1:])


def test_help_of_the_command_imports_no_library_at_all() -> None:
    imported = imported_by("--help")
    assert imported & (TORCH | TRAINING | PLOTS | {"numpy", "PIL", "omegaconf", "rich"}) == set()


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_imports_nothing_heavy(verb: str) -> None:
    assert imported_by(*verb.split(), "--help") & (TORCH | TRAINING | PLOTS | {"pyarrow"}) == set()


@pytest.mark.parametrize("verb", VERBS)
def test_print_config_imports_no_model_and_no_trainer(verb: str) -> None:
    """Checks of a schedule may take torch; nothing takes diffusers, Lightning or wandb."""
    imported = imported_by(*verb.split(), *required_keys(verb), "--print-config")
    assert imported & ((TORCH - {"torch"}) | TRAINING | PLOTS) == set()


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        pixels = np.full((16, 16, 3), 80 * number, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a gray square")
    return folder


def test_packing_and_checking_shards_never_import_torch(image_folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    packed = imported_by("data", "pack", f"source={image_folder}", f"output={shards}")
    checked = imported_by("data", "check", f"shards={shards}")
    assert (packed | checked) & (TORCH | TRAINING | PLOTS) == set()


def test_encoding_imports_no_trainer(tmp_path: Path) -> None:
    """Importing blackpoint.data.module would: it is a LightningDataModule."""
    base, shards = make_tiny_pipeline(tmp_path / "base"), make_tiny_shards(tmp_path / "images", 3)
    settings = {"source": shards, "checkpoint": base, "output": tmp_path / "latents"}
    settings |= {"resolution": 16, "num_workers": 0}
    imported = imported_by("data", "encode", *(f"{k}={v}" for k, v in settings.items()))
    assert imported & (TRAINING | PLOTS) == set()


def test_sampling_imports_no_trainer(tmp_path: Path) -> None:
    base = make_tiny_pipeline(tmp_path / "base")
    settings = {"checkpoint": base, "output": tmp_path / "out", "prompts": "a gray eight"}
    settings |= {"num_steps": 1, "device": "cpu"}
    imported = imported_by("sample", *(f"{key}={value}" for key, value in settings.items()))
    assert imported & (TRAINING | PLOTS) == set()


def test_report_imports_no_model_and_no_trainer(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.csv").write_text("step,name,value\n1,train/loss,0.5\n2,train/loss,0.4\n")
    assert imported_by("report", f"run_dir={run_dir}") & (TORCH | TRAINING) == set()
