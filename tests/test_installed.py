"""Laws of an installed blackpoint: one name in site-packages, with all that commands name."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("assets", "configs", "data", "sampling", "scripts", "train")


@pytest.mark.slow
def test_a_wheel_samples_and_trains_away_from_the_checkout(tmp_path: Path) -> None:
    source, site, work = (tmp_path / name for name in ("source", "site", "work"))
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.pyc"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copyfile(ROOT / file, source / file)
    build = "import setuptools.build_meta as build; build.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"blackpoint"}

    work.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=work,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    code = "import blackpoint.scripts.cli as cli; print(cli.__file__)"
    assert run("-c", code).startswith(str(site))
    blackpoint = str(site / "blackpoint" / "scripts" / "verb_process.py")
    sample = ["checkpoint=assets/tiny_sd", "prompts=a white eight", "num_steps=2", "output=out"]
    run(blackpoint, "sample", *sample)
    assert (work / "out" / "grid.png").is_file()
    run(blackpoint, "train", "configs/tiny_zero_snr.yaml", "trainer.max_steps=1", "run_dir=run")
