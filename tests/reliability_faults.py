"""Kills, and faults: disks, storage, servers, clocks, memory, numbers, other processes, nodes."""

import contextlib
import ctypes
import functools
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.interrupted_verb import interrupt_at_change
from tests.reliability_processes import lost_node, rank, two_jobs, worker
from tests.reliability_trials import FORKED, KILLED, TRAININGS, Bench, Row, Trial, drawn_verb, run
from tests.reliability_verbs import NUM_STEPS
from tests.shard_server import (
    Fault,
    Handler,
    ShardServer,
    answers,
    cut_short,
    drops_after,
    serving,
    stalls_after,
)

FIRST_SEED = 1000
"""Seeds of faults; below are those of kills."""
DISK_BYTES = 48 << 20


# --- Kills ---


def kill(bench: Bench, seed: int) -> Row:
    """Kills a command at a moment of its own, unless it is over before."""
    rng = random.Random(seed)
    trial = Trial(bench, drawn_verb(rng), rng)
    trial.is_forked = trial.name != "sweep" and rng.random() < 0.97
    whole = trial.whole()
    if trial.is_forked and rng.random() < 0.5:
        number = rng.randint(1, whole.num_changes)
        delay_s = rng.choice([0.0, rng.uniform(0, 0.02)])
        moment = f"{1000 * delay_s:.1f} ms after change {number} of {whole.num_changes}"
        given = (9, number, str(bench.work / "counter"), bench.aim(trial), delay_s)
        (bench.work / "counter").write_bytes(b"")
        process = trial.start(before=partial(interrupt_at_change, *given))
    else:
        is_group, after_s = rng.random() < 0.5, rng.uniform(0, whole.seconds)
        whom = "all its processes" if is_group else "the first process"
        moment = f"{after_s:.2f} of {whole.seconds:.2f} s, {whom}"
        process = trial.start()
        while process.poll() is None and time.monotonic() - process.begun_s < after_s:
            time.sleep(0.005)
        process.kill(is_group)
    is_killed = trial.end(process, allowed=(0, KILLED)) == KILLED
    trial.settle()
    return trial.row(seed, "SIGKILL" if is_killed else "none", moment)


# --- Storage ---


def build_library(work: Path) -> Path:
    """Compiles what is preloaded for stalls and clocks."""
    work.mkdir(parents=True, exist_ok=True)
    library, source = work / "faults.so", Path(__file__).with_name("faults.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library, source], check=True)
    return library


@contextlib.contextmanager
def disk(place: Path, kind: str) -> Iterator[None]:
    """Mounts a small disk at the place of the output."""
    image = place.with_name("disk.img")
    if kind == "ext4":
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        run("mkfs.ext4", "-q", "-b", "1024", "-m", "0", str(image))
        run("mount", "-o", "loop", str(image), str(place))
    else:
        run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(place))
    try:
        yield
    finally:
        run("umount", "-l", str(place))
        image.unlink(missing_ok=True)


def full_disk(bench: Bench, seed: int) -> Row:
    """The disk fills at a random byte of the output; it is freed, and the command starts again."""
    rng = random.Random(seed)
    trial = Trial(bench, drawn_verb(rng), rng)
    whole, kind = trial.whole(), rng.choice(["ext4", "tmpfs"])
    num_bytes = rng.randrange(int(1.3 * whole.num_bytes))
    ballast = bench.place / "ballast"
    with disk(bench.place, kind):
        free = os.statvfs(bench.place)
        with ballast.open("wb") as file:
            used = free.f_bavail * free.f_frsize - num_bytes
            os.posix_fallocate(file.fileno(), 0, max(used, 1))
        trial.end(trial.start(), allowed=(0, 1))
        ballast.unlink()
        trial.settle()
    return trial.row(seed, "full disk", f"{kind} with {num_bytes} of {whole.num_bytes} bytes")


def stall_at(folder: str, call: int, seconds: float) -> None:
    """Has the storage below a folder stop answering in this process, from its n-th call on."""
    given = folder.encode(), ctypes.c_long(call), ctypes.c_double(seconds)
    ctypes.CDLL(None).faults_stall(*given)


def stalled_storage(bench: Bench, seed: int) -> Row:
    """Reads, writes and syncs below the output are not answered for 30 s."""
    rng = random.Random(seed)
    trial = Trial(bench, drawn_verb(rng, FORKED), rng)
    trial.whole()
    call = rng.randint(1, 400)
    while True:
        process = trial.start(before=partial(stall_at, f"{bench.place}/", call, 30.0))
        trial.end(process, allowed=(0,))
        if "faults: stalled" in process.output() or trial.broken or call == 1:
            break
        bench.clear()  # it makes fewer calls
        trial.seconds, trial.statuses, call = 0.0, [], max(call // 2, 1)
    trial.compare()
    return trial.row(seed, "stalled storage", f"30 s from call {call} on")


# --- Time ---


def jump(after_s: float, by_s: float) -> None:
    ctypes.CDLL(None).faults_jump(ctypes.c_double(after_s), ctypes.c_double(by_s))


def clock(bench: Bench, seed: int) -> Row:
    """The wall clock jumps by a day; times of files, which the kernel gives, do not."""
    rng = random.Random(seed)
    trial = Trial(bench, drawn_verb(rng, FORKED), rng)
    by_s, after_s = rng.choice([-86400.0, 86400.0]), rng.uniform(0, 0.8 * trial.whole().seconds)
    trial.end(trial.start(before=partial(jump, after_s, by_s)), allowed=(0,))
    trial.compare()
    return trial.row(seed, "clock", f"{by_s:+.0f} s after {after_s:.2f} s")


# --- Servers ---


def passes(handler: Handler, part: bytes) -> bool:
    return False


def is_slow(handler: Handler, part: bytes) -> bool:
    """Sends 2 kB at a time, twenty times a second."""
    handler.head(handler.status, len(part), **handler.extra)
    for start in range(0, len(part), 2000):
        handler.wfile.write(part[start : start + 2000])
        time.sleep(0.05)
    return True


def html(handler: Handler, part: bytes) -> bool:
    """Answers as a portal does that wants a login: a page, and status 200."""
    page = b"<!DOCTYPE html><title>Sign in</title><p>Please sign in to use this network." * 9
    handler.head(200, len(page), kind="text/html")
    handler.wfile.write(page)
    return True


def server_fault(rng: random.Random, kind: str, num_bytes: int) -> Fault:
    match kind:
        case "drops":
            return drops_after(rng.randrange(num_bytes))
        case "cuts short":
            return cut_short(rng.randrange(num_bytes))
        case "is silent":
            return stalls_after(rng.randrange(num_bytes), never)
        case "status 503":
            return answers(503)
    return {"HTML": html, "is slow": is_slow}[kind]


class Never:
    """An event that ends soon after the client has given up."""

    def wait(self, timeout: float) -> None:
        time.sleep(90)


never: Any = Never()


def shard_server(bench: Bench, seed: int) -> Row:
    """A server answers some requests badly, or all of them until it is mended."""
    rng = random.Random(seed)
    name = rng.choice([*TRAININGS, *TRAININGS, "data encode"])
    trial = Trial(bench, name, rng, expected=Trial(bench, name, rng).whole())
    kinds = [
        "drops",
        "cuts short",
        "is slow",
        "is silent",
        "status 503",
        "HTML",
        "HTML until",
        "down",
    ]
    kind, num_passed = rng.choice(kinds), rng.randint(0, 6)
    with serving(bench.assets.shards) as server:
        url = f"{server.url}/shard-{{000000..000000}}.tar"
        key = "source" if name == "data encode" else "data.shards"
        trial.values = {key: url}
        if name != "data encode":
            cache = {"data.cache_gigabytes": rng.choice([0.0, 1.0])}
            trial.values |= {"data.cache_dir": str(bench.work / f"cache-{seed}"), **cache}
        size = (bench.assets.shards / "shard-000000.tar").stat().st_size
        server.faults = [passes] * num_passed
        if kind in ("HTML until", "down"):
            break_for_good(server, kind, num_passed)
        else:
            number = 1 if kind == "is silent" else rng.randint(1, 4)
            server.faults += [server_fault(rng, kind, min(size, 1500)) for _ in range(number)]
        allowed = (0, 1, 75) if kind in ("HTML until", "down") else (0,)
        trial.end(trial.start(), allowed=allowed)
        server.faults.clear()
        server.is_down = False
        trial.settle()
    return trial.row(seed, "shard server", f"{kind}, after {num_passed} good answers")


def break_for_good(server: ShardServer, kind: str, num_passed: int) -> None:
    def down(handler: Handler, part: bytes) -> bool:
        server.is_down = handler.close_connection = True
        return True

    server.faults += [down] if kind == "down" else [html] * 10_000


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """A port that takes connections, and never says a word."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        yield listening.getsockname()[1]


def tracker(bench: Bench, seed: int) -> Row:
    """wandb is configured, and down for the whole run: refuses, is silent, or answers 500."""
    rng = random.Random(seed)
    name, kind = rng.choice(TRAININGS), rng.choice(["refuses", "is silent", "status 500"])
    plain = Trial(bench, name, rng).whole()
    trial = Trial(bench, name, rng, {"wandb.enabled": True}, expected=plain)
    with contextlib.ExitStack() as stack:
        port = 9
        if kind == "is silent":
            port = stack.enter_context(silent_port())
        elif kind == "status 500":
            server = stack.enter_context(serving(bench.work))
            server.status = 500  # type: ignore[attr-defined]
            port = server.server_address[1]
        environment = {"WANDB_MODE": "online", "WANDB_API_KEY": "x" * 40}
        environment["WANDB_BASE_URL"] = f"http://127.0.0.1:{port}"
        trial.end(trial.start(environment=environment), allowed=(0,))
        trial.compare()
    return trial.row(seed, "wandb down", kind)


# --- What is computed, and what was saved ---


def spoil_step(step: int) -> None:
    """Makes one value of a step's target NaN."""
    from blackpoint.train.module import FineTuner

    original = FineTuner.predict

    @functools.wraps(original)
    def predict(self: Any, batch: Any, draws: Any) -> tuple[Tensor, Tensor]:
        output, target = original(self, batch, draws)
        if self.global_step == step:
            target[1, 0, 0, 0] = torch.nan
        return output, target

    FineTuner.predict = predict  # type: ignore[method-assign]


def not_finite(bench: Bench, seed: int) -> Row:
    """A batch gives NaN once, as a faulty device does."""
    rng = random.Random(seed)
    trial, step = Trial(bench, rng.choice(TRAININGS), rng), rng.randrange(NUM_STEPS)
    trial.whole()
    trial.end(trial.start(before=partial(spoil_step, step)), allowed=(1,))
    trial.again()
    return trial.row(seed, "NaN batch", f"in step {step + 1}")


def kill_in_step(step: int) -> None:
    from blackpoint.train.module import FineTuner

    original = FineTuner.training_step

    def training_step(self: Any, batch: Any, batch_index: int) -> Any:
        if self.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, batch, batch_index)

    FineTuner.training_step = training_step  # type: ignore[method-assign]


def corrupted(bench: Bench, seed: int) -> Row:
    """A run is killed, and its newest checkpoint damaged."""
    rng = random.Random(seed)
    trial, step = Trial(bench, rng.choice(TRAININGS), rng), rng.randrange(4, NUM_STEPS)
    trial.whole()
    trial.end(trial.start(before=partial(kill_in_step, step)), allowed=(KILLED,))
    newest = max((trial.out / "checkpoints").glob("step_*.ckpt"))
    content = bytearray(newest.read_bytes())
    start = rng.randrange(len(content))
    how = rng.choice(["one bit", "cut off", "zeros", "emptied"])
    if how == "one bit":
        content[start] ^= 1 << rng.randrange(8)
    elif how == "zeros":
        content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    newest.write_bytes(content[: {"cut off": start, "emptied": 0}.get(how, len(content))])
    trial.again()
    return trial.row(seed, "corrupted checkpoint", f"{how} at byte {start} of {newest.name}")


FAULTS: dict[str, Callable[[Bench, int], Row]] = {
    "full disk": full_disk,
    "stalled storage": stalled_storage,
    "shard server": shard_server,
    "wandb down": tracker,
    "clock": clock,
    "two jobs": two_jobs,
    "worker killed": worker,
    "rank killed": rank,
    "NaN batch": not_finite,
    "corrupted checkpoint": corrupted,
    "lost node": lost_node,
}
