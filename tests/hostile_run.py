"""Runs hostile inputs through the command's own entry, in one process, and judges what happened:

    python -m tests.hostile_run number=2000 output=docs/hostile_input.csv.gz

The laws: exit status 0 or 2, or 1 where finite weights give pixels that are not; no traceback; an
end within LIMIT_S of processor time; nothing written outside the output; nothing executed; a
bounded peak of memory; no control character printed; no markup of the input in a page. Rows are
kept as they are made, and the same command goes on.
"""

import contextlib
import csv
import faulthandler
import gzip
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

from blackpoint.data.files.notes import forget
from blackpoint.scripts.cli import main as command
from tests import hostile_inputs as files
from tests import hostile_models as models
from tests.hostile_inputs import CANARY, Assets, Kind

ROOT = Path(__file__).resolve().parents[1]
KINDS: dict[str, tuple[Kind, int]] = {
    "images": (files.images, 6),
    "tars": (files.tars, 6),
    "captions": (files.captions, 6),
    "tables": (files.tables, 6),
    "parquet": (files.parquets, 6),
    "yaml": (files.yamls, 8),
    "prompts": (files.prompts, 3),
    "index": (files.index, 5),
    "single files": (models.single_files, 4),
    "LoRA": (models.loras, 3),
    "folders": (models.folders, 4),
    "scheduler configs": (models.schedulers, 3),
    ".ckpt": (models.ckpts, 4),
    "searches": (models.searches, 4),
    "metrics.csv": (models.metrics, 4),
}
"""Readers, and how often each takes its turn."""
NOT_FINITE = "non-finite pixels"
LIMIT_S = 60.0
MOST_MB = 768
"""Above what the process holds at the start of a case: an image of 178 million pixels, the most
that is read, is 537 MB in RGB."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
OUTPUTS = ("out", "o", "search", "run/report.html", "shards/index", "home", "tmp")
"""What commands may write, of the working folder."""


@dataclass
class Outcome:
    """A row: one input, and the laws that it broke."""

    seed: int
    kind: str
    status: int
    seconds: float
    peak_mb: int
    broken: str
    printed: str


class Hung(BaseException):
    """A case that did not end; no `except Exception` takes it."""


class Watch:
    """Notes programs that are started, and files that are written outside the working folder."""

    def __init__(self) -> None:
        self.folder, self.seen = "", list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder:
            return
        if event in ("os.system", "os.exec", "pty.spawn") or (
            event in ("subprocess.Popen", "os.posix_spawn") and CANARY in str(arguments)
        ):
            self.seen.append(f"executed {str(arguments)[:80]}")
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        ):
            self._path(arguments[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._path(arguments[1])

    def _path(self, path: Any) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            text = os.path.abspath(os.fsdecode(path))
            if not text.startswith((self.folder, "/dev/", "/proc/self/")):
                self.seen.append(f"wrote {text}")


WATCH = Watch()


def case(seed: int, work: Path, assets: Assets) -> tuple[str, list[str]]:
    """Writes the input of a seed into the working folder; returns its kind and command line."""
    rng = random.Random(seed)
    (kind,) = rng.choices(list(KINDS), [weight for _, weight in KINDS.values()])
    for name in ("home", "tmp"):
        (work / name).mkdir()
    return kind, KINDS[kind][0](rng, work, assets)


def in_this_process(arguments: list[str]) -> tuple[int, str]:
    """Runs the command's entry; what it prints is returned."""
    printed = io.StringIO()
    here = contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed)
    with here[0], here[1], warnings.catch_warnings():
        status = command(arguments)
    return status, printed.getvalue()


def in_its_own_process(arguments: list[str]) -> tuple[int, str]:
    """Runs the command as a shell does."""
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "verb_process.py"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=10 * LIMIT_S,  # by the clock, on a busy machine
        )
    except subprocess.TimeoutExpired:
        raise Hung from None
    return done.returncode, done.stdout.decode("utf-8", "surrogateescape")


def judge(
    seed: int, assets: Assets, runner: Callable[[list[str]], tuple[int, str]] = in_this_process
) -> Outcome:
    """Makes and runs the case of a seed in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        work = Path(folder).resolve()
        kind, arguments = case(seed, work, assets)
        before = contents(work)
        forget()
        WATCH.seen.clear()
        start_s, start_mb = time.process_time(), reset_peak_mb()
        broken: list[str] = []
        with inside(work), limit():
            try:
                WATCH.folder = f"{work}/"
                status, printed = runner(arguments)
            except Hung:
                status, printed = -1, ""
                broken.append(f"no end in {LIMIT_S:g} s")
            finally:
                WATCH.folder = ""
        seconds, peak_mb = time.process_time() - start_s, peak() - start_mb
        broken += laws(work, before, status, printed) + sorted(set(WATCH.seen))
        if peak_mb > MOST_MB:
            broken.append(f"{peak_mb} MB")
        last = printed.strip().splitlines()[-1:] or [""]
        shown = last[0].encode("unicode_escape").decode()[:200]
        text = "; ".join(broken).encode("unicode_escape").decode()
        return Outcome(seed, kind, status, round(seconds, 2), peak_mb, text, shown)


def laws(work: Path, before: dict[Path, float], status: int, printed: str) -> list[str]:
    """Returns the laws that are broken."""
    broken = []
    if "Traceback" in printed:
        broken.append(f"traceback {printed.split('Traceback')[1][-600:]}")
    if status not in (0, 2) and (status, NOT_FINITE in printed) != (1, True):
        broken.append(f"status {status}")
    if status == 2 and not printed.strip():
        broken.append("refused without a word")
    if any(not c.isprintable() and c not in "\n\t\r" for c in printed):
        odd = sorted({c for c in printed if not c.isprintable() and c not in "\n\t\r"})
        broken.append(f"control characters {odd!r}")
    if list(work.rglob(CANARY)):
        broken.append("executed")
    for path, changed in contents(work).items():
        name = str(path.relative_to(work))
        if before.get(path) != changed and not name.startswith(OUTPUTS):
            broken.append(f"wrote {name}")
        if path.suffix == ".html" and before.get(path) != changed:
            broken += markup(path.read_text(encoding="utf-8"))
    return broken


def markup(page: str) -> list[str]:
    """Returns what of the inputs stands in a page as markup."""
    found = ["<script>alert(7331)", "<img src=x", "</style></title>"]
    return [f"markup {text}" for text in found if text in page]


def contents(work: Path) -> dict[Path, float]:
    return {path: path.lstat().st_mtime_ns for path in work.rglob("*") if not path.is_dir()}


@contextlib.contextmanager
def inside(work: Path) -> Iterator[None]:
    """Has the working folder as current one, and as home and place of temporary files."""
    names = {"HOME": "home", "TMPDIR": "tmp", "XDG_CACHE_HOME": "home/.cache"}
    there, saved = Path.cwd(), {name: os.environ.get(name) for name in names}
    os.environ |= {name: str(work / folder) for name, folder in names.items()}
    tempfile.tempdir = None
    os.chdir(work)
    try:
        yield
    finally:
        os.chdir(there)
        tempfile.tempdir = None
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@contextlib.contextmanager
def limit() -> Iterator[None]:
    """Ends what takes too long: by an exception, and if that is not heard, with the process."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hung

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    faulthandler.dump_traceback_later(20 * LIMIT_S, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        faulthandler.cancel_dump_traceback_later()


def reset_peak_mb() -> int:
    """Starts the measure of this process's peak anew; returns what it holds, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def run(number: int, output: Path, processes: bool = False, first: int = 0) -> list[Outcome]:
    """Judges the seeds from `first`, but for those whose rows are there; returns all rows."""
    rows = {row.seed: row for row in read(output)}
    with tempfile.TemporaryDirectory(prefix="hostile-assets-") as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            assets = Assets.make(Path(folder))
        runner = in_its_own_process if processes else in_this_process
        for seed in range(first, first + number):
            if seed not in rows:
                rows[seed] = judge(seed, assets, runner)
                append(output, rows[seed])
    return [rows[seed] for seed in range(first, first + number)]


def read(path: Path) -> list[Outcome]:
    if not path.exists():
        return []
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = {"seed": int, "status": int, "peak_mb": int, "seconds": float}
    kinds = {field.name: numbers.get(field.name, str) for field in fields(Outcome)}
    return [Outcome(**{name: kinds[name](row[name]) for name in kinds}) for row in rows]


def append(path: Path, row: Outcome) -> None:
    """Adds a member to the gzip file, whole at once."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Outcome)])
    if not path.exists():
        writer.writeheader()
    writer.writerow(asdict(row))
    with path.open("ab") as file:
        file.write(gzip.compress(text.getvalue().encode(), mtime=0))


def table(rows: list[Outcome]) -> str:
    """Returns a Markdown table: for each reader, how its inputs ended."""
    lines = [
        "| reader | inputs | taken (0) | refused (2) | failed (1) | broken laws | longest, s | "
        "peak, MB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for kind in [*KINDS, "all"]:
        mine = [row for row in rows if kind in (row.kind, "all")]
        status = Counter(row.status for row in mine)
        num_broken = sum(bool(row.broken) for row in mine)
        if mine:
            longest, largest = max(r.seconds for r in mine), max(r.peak_mb for r in mine)
            counts = f"{len(mine)} | {status[0]} | {status[2]} | {status[1]} | {num_broken}"
            lines.append(f"| {kind} | {counts} | {longest:.1f} | {largest} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Is the command; returns 1 where a law is broken."""
    given = dict(argument.split("=", 1) for argument in arguments)
    output = Path(given.get("output", "hostile_input.csv.gz"))
    number, first = int(given.get("number", 2000)), int(given.get("first", 0))
    rows = run(number, output, given.get("processes") == "true", first)
    print(table(rows))
    for row in rows:
        if row.broken:
            print(f"seed {row.seed}, {row.kind}: {row.broken}")
    return int(any(row.broken for row in rows))


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    sys.exit(main(sys.argv[1:]))
