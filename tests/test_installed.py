"""Laws of an installed blackpoint: one name in site-packages, with all that commands name."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("assets", "configs", "data", "sampling", "scripts", "train")
FILES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")
SMALL_DEMO = (
    *("max_steps=2", "num_train_images=40", "num_held_out_images=8", "num_images=11"),
    *("reference_images=20", "num_steps=2", "num_processes=1", "search_candidates=2"),
)


@pytest.mark.slow
def test_wheel_and_sdist_run_the_demo_away_from_the_checkout(tmp_path: Path) -> None:
    """In an environment that holds blackpoint alone and borrows the other packages of this one."""
    source, work, environment = (tmp_path / name for name in ("source", "work", "environment"))
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.pyc"))
    for file in FILES:
        shutil.copyfile(ROOT / file, source / file)

    def build(kind: str, folder: Path) -> Path:
        code = (
            f"import setuptools.build_meta as build; print(build.build_{kind}({str(tmp_path)!r}))"
        )
        command = [sys.executable, "-c", code]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return next(tmp_path.glob("*.tar.gz" if kind == "sdist" else "*.whl"))

    with tarfile.open(build("sdist", source)) as sdist:
        sdist.extractall(tmp_path / "unpacked", filter="data")
    wheel = build("wheel", next((tmp_path / "unpacked").iterdir()))  # all of it is in the sdist
    with zipfile.ZipFile(wheel) as content:
        tops = {name.partition("/")[0] for name in content.namelist()}
    assert {top.partition("-")[0] for top in tops} == {"blackpoint"}

    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    places = {"base": str(environment), "platbase": str(environment)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=places))
    # A line with a path, unlike that folder itself, does not run its .pth files: no checkout.
    (site / "borrowed.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(wheel)], check=True, capture_output=True)
    work.mkdir()
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(command: Path, *arguments: str) -> str:
        done = subprocess.run(
            [str(command), *arguments], cwd=work, env=clean, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "import blackpoint.scripts.cli as cli; print(cli.__file__)"
    assert run(python, "-c", code).startswith(str(site))
    blackpoint = environment / "bin" / "blackpoint"
    assert run(blackpoint, "--version").startswith("blackpoint ")
    out = run(blackpoint, "demo", *SMALL_DEMO)
    assert "report: " in out and (work / "runs" / "demo" / "report.html").is_file()
    assert (work / "runs" / "demo" / "before_after.png").is_file()
    given = ["checkpoint=runs/demo", "prompts=a white eight on a black background", "num_steps=2"]
    run(blackpoint, "sample", *given, "output=sampled")
    assert (work / "sampled" / "grid.png").is_file()
    run(blackpoint, "search", *given, "output=found", "budget_nfe=8", "guidance_scale=1",
        "verifiers.black.kind=luminance")  # fmt: skip
    assert (work / "found" / "winners.jsonl").is_file()
