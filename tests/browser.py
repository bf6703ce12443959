"""A page in headless Chromium."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync --disable-quic "
    "--disable-background-networking --disable-component-update --enable-logging=stderr "
    "--virtual-time-budget=20000 --dump-dom"
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def loaded(page: Path | str, profile: Path) -> subprocess.CompletedProcess[str]:
    """Returns the document of a file or URL as standard output, once its scripts have run; what
    they log is standard error."""
    address = page if isinstance(page, str) else page.as_uri()
    return subprocess.run(
        [str(CHROMIUM), *OPTIONS.split(), f"--user-data-dir={profile}", address],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
