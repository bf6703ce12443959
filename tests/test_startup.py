"""No verb imports what it does not use, so that help and light verbs answer at once.

The laws are on what is imported, not on seconds; `make bench` measures those.
"""

import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blackpoint.data.files.imports import uncollected
from blackpoint.scripts.bench.startup import required_keys
from blackpoint.scripts.cli import VERBS
from tests.tiny_pipeline import make_tiny_pipeline

ROOT = Path(__file__).resolve().parents[1]
# What takes a second or more to import, or belongs to one verb alone.
TORCH = {"torch", "torchvision", "torchmetrics", "diffusers", "transformers", "accelerate"}
TRAINING = {"lightning", "pytorch_lightning", "wandb", "webdataset", "bitsandbytes"}
PLOTS = {"matplotlib"}
LIBRARIES = TORCH | TRAINING | PLOTS | {"numpy", "PIL", "omegaconf", "rich"}
CODE = """
import json, sys
from blackpoint.scripts.cli import main
for arguments in json.loads(sys.argv[1]):
    status = main(arguments)
    packages = sorted({name.partition(".")[0] for name in sys.modules})
    print("imported:", json.dumps([status, packages]))
"""


def assert_imports_none(commands: Sequence[tuple[Sequence[object], set[str]]]) -> None:
    """Runs command lines in one fresh interpreter, each with packages that it must not import.

    What an earlier one may import, a later one must be free to: only the first import is seen.
    """
    lines = json.dumps([[str(argument) for argument in arguments] for arguments, _ in commands])
    result = subprocess.run(
        [sys.executable, "-c", CODE, lines], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    outcomes = [line for line in result.stdout.splitlines() if line.startswith("imported: ")]
    for (arguments, forbidden), outcome in zip(commands, outcomes, strict=True):
        status, packages = json.loads(outcome.removeprefix("imported: "))
        assert status == 0, (arguments, result.stderr)
        assert set(packages) & forbidden == set(), arguments


def test_no_command_imports_what_it_does_not_use(tmp_path: Path) -> None:
    """Help imports no library, packing no torch, a config no model, encoding no trainer.

    Checks of a schedule, in a config, may take torch. A data set for encoding is no
    LightningDataModule.
    """
    base = make_tiny_pipeline(tmp_path / "base")
    source, shards = tmp_path / "images", tmp_path / "shards"
    source.mkdir()
    for number in range(3):
        pixels = np.full((16, 16, 3), 80 * number, np.uint8)
        Image.fromarray(pixels).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text("a gray square")
    heavy = TORCH | TRAINING | PLOTS
    encode = [f"source={shards}", f"checkpoint={base}", f"output={tmp_path / 'latents'}"]
    sample = [f"checkpoint={base}", f"output={tmp_path / 'out'}", "prompts=a gray eight"]
    assert_imports_none(
        [
            (["--help"], LIBRARIES),
            *(([*verb.split(), "--help"], heavy | {"pyarrow"}) for verb in VERBS),
            (["data", "pack", f"source={source}", f"output={shards}"], heavy),
            (["data", "check", f"shards={shards}"], heavy),
            *(
                ([*verb.split(), *required_keys(verb), "--print-config"], heavy - {"torch"})
                for verb in VERBS
            ),
            (["data", "encode", *encode, "resolution=16", "num_workers=0"], TRAINING | PLOTS),
            (["sample", *sample, "num_steps=1", "device=cpu"], TRAINING | PLOTS),
        ]
    )


def test_report_imports_no_model_and_no_trainer(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.csv").write_text("step,name,value\n1,train/loss,0.5\n2,train/loss,0.4\n")
    assert_imports_none([(["report", f"run_dir={run_dir}"], TORCH | TRAINING)])


def test_the_collector_runs_after_imports_and_leaves_them_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frozen = gc.get_freeze_count()
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == frozen  # all had been imported
    with uncollected():
        monkeypatch.setitem(sys.modules, "imported_now", sys)
    assert gc.isenabled() and gc.get_freeze_count() > frozen
