"""`blackpoint ARGUMENTS` in a process that has everything imported before it starts.

Python, torch and diffusers take seconds of a core to start. A server imports them once and forks:
a process of its own each, to be signalled and killed. What it starts itself starts as ever.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]
VERBS = [
    "blackpoint.scripts.verbs.train",
    "blackpoint.scripts.verbs.search",
    "blackpoint.scripts.verbs.evaluate",
    "blackpoint.scripts.verbs.data_encode",
    "blackpoint.scripts.verbs.sample",
    "blackpoint.scripts.verbs.data_pack",
    "blackpoint.scripts.verbs.export",
    "blackpoint.scripts.verbs.report",
]
MODULES = [
    "blackpoint.train.run",
    "blackpoint.train.encode.encode",
    "blackpoint.sampling.search.run",
    "blackpoint.sampling.evaluation.config",
    "blackpoint.sampling.sample",
    "blackpoint.data.pack.pack",
    "blackpoint.sampling.export.export",
    "blackpoint.scripts.verbs.report_results",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*VERBS, *MODULES])


class WarmVerb:
    """A command, or another module, with what of subprocess.Popen tests use.

    `before` is called in its process first; it must be a function that can be pickled. The process
    leads a group of its own. What it prints is added to `log`, or read by `communicate`.
    """

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
        module: str = "blackpoint.scripts.cli",
        log: str | None = None,
    ) -> None:
        self._output = tempfile.TemporaryDirectory(prefix="warm-verb-")
        outputs = (log, log) if log else (f"{self._output.name}/1", f"{self._output.name}/2")
        given = (module, arguments, os.environ | (environment or {}), outputs, before)
        self._process = FORKS.Process(target=_run, args=given)
        self._process.start()
        atexit.register(self.kill)  # of a test that failed; Python would wait for it
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = PATIENCE_S) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("warm verb", timeout)
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        """Returns what it printed, when it has ended."""
        self.wait()
        paths = [Path(self._output.name) / name for name in ("1", "2")]
        out, error = (path.read_text(errors="replace") if path.exists() else "" for path in paths)
        self._output.cleanup()
        return out, error


def in_warm_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a function returns in a process of its own; both must be picklable."""
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_send, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    assert receiver.poll(PATIENCE_S), f"not within {PATIENCE_S} s"
    result = receiver.recv()
    process.join()
    return result


def _send(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sender.send(function(*arguments))


def _run(
    module: str,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    outputs: tuple[str, str],
    before: Callable[[], None] | None,
) -> None:
    os.setpgid(0, 0)
    multiprocessing.set_start_method(None, force=True)  # the platform's, not this process's own
    gc.freeze()  # what was imported is no garbage
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(outputs, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = ["blackpoint", *arguments]
    if before is not None:
        before()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
