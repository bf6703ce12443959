"""Keeps tests off the network and off each other's cores, and runs the slow ones last.

Shapes and types that the mathematical core annotates are checked at every call.
"""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

gc.disable()  # until all is imported: a fifth of the time goes into looking for garbage

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

CORE = ("schedule", "prediction", "noise", "guidance", "samplers", "conditioning", "model")
install_import_hook([f"blackpoint.sampling.{name}" for name in CORE], "beartype.beartype")


# The same examples everywhere, and none too slow: a busy machine must not fail a law.
settings.register_profile("anywhere", settings.get_profile("ci"), deadline=None)
settings.register_profile(
    "thorough", deadline=None, max_examples=1000, print_blob=True, derandomize=False
)
settings.load_profile("anywhere")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not __import__("torch").cuda.is_available():
        pytest.skip("there is no GPU (CUDA) here")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Collects garbage from here on, but not among what was imported: a quarter of a second."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _fresh_notes() -> None:
    """What one test had said once, another may expect to be said."""
    from blackpoint.data.files.notes import forget

    forget()


@pytest.fixture(autouse=True)
def _no_launcher() -> Iterator[None]:
    """What Lightning tells its processes would make a later test's take themselves for one."""
    yield
    assert not {"LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} & set(os.environ)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny random pipeline folder, which no test changes."""
    from tests.tiny_pipeline import make_tiny_pipeline  # after the hook above, and only if needed

    yield from unchanged(make_tiny_pipeline(tmp_path_factory.mktemp("pipeline")))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Shards of twelve tiny captioned images, which no test changes."""
    from tests.tiny_run import make_tiny_shards

    yield from unchanged(make_tiny_shards(tmp_path_factory.mktemp("images")))


def unchanged(folder: Path) -> Iterator[Path]:
    def files() -> dict[str, int]:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        # A reader may note anew at what times it saw the same shards.
        return {str(p): p.stat().st_mtime_ns for p in paths if p.name != "stamps.json"}

    before = files()
    yield folder
    assert files() == before
