"""The doctor: each thing that is broken on purpose has its row, its remedy, and no other's."""

import json
import os
import signal
import socket
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

import blackpoint.scripts.verbs.doctor as verb
from blackpoint.scripts.cli import main
from blackpoint.scripts.doctor import disk, machine, nodes, one_step, servers
from blackpoint.scripts.doctor.examine import answers
from blackpoint.scripts.doctor.row import Row
from tests.devices import fake_gpus

CPU = torch.device("cpu")
RECORD = json.loads(one_step.RECORD.read_text(encoding="utf-8"))


def rows_of(probe) -> dict[str, Row]:
    return {row.name: row for row in probe if isinstance(row, Row)}


# --- The table and its limit ---


def quick() -> Iterator[Row]:
    yield Row("quick", "green", "there")


def crashing() -> Iterator[Row | str]:
    yield Row("before", "green", "there")
    yield "kernel"
    os.kill(os.getpid(), signal.SIGSEGV)


def raising() -> Iterator[Row | str]:
    yield "torch"
    raise ImportError("libcudart.so.11.0: cannot open shared object file\nmore")


def silent() -> Iterator[Row | str]:
    yield "import"
    time.sleep(600)


def test_a_probe_that_crashes_raises_or_hangs_costs_its_own_row() -> None:
    probes = {"a": quick, "b": crashing, "c": raising}
    assert answers(probes, 300) == [
        Row("quick", "green", "there"),
        Row("before", "green", "there"),
        Row("kernel", "red", "crashes with SIGSEGV"),
        Row(
            "torch",
            "red",
            "fails: ImportError: libcudart.so.11.0: cannot open shared object file",
            "`python -c 'import torch'` may show more; install a build for this machine",
        ),
    ]


def test_what_gives_no_answer_is_killed_at_the_limit_and_named() -> None:
    start_s = time.monotonic()
    found = answers({"hung": silent, "hub": silent}, 0.5, optional=["hub"])
    assert time.monotonic() - start_s < 300
    assert [row.status for row in found] == ["red", "yellow"]
    assert all(row.finding == "no answer within 0.5 s" for row in found)
    assert "limit_s=3 " in found[0].remedy


def test_status_is_1_where_a_row_is_red_and_0_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row("disk .", "green", "40 GB"), Row("hub", "yellow", "silent", "unset the proxy")]
    monkeypatch.setattr(verb, "examine", lambda config: rows)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "green   disk .  40 GB\nyellow  hub     silent\n" in printed
    assert "-> unset the proxy\n" in printed and "1 green, 1 yellow, 0 red; " in printed
    rows.append(Row("torch", "red", "1.13"))
    assert main(["doctor", "json=true"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "red" and found["rows"][1]["remedy"] == "unset the proxy"
    assert main(["doctor", "limit_s=0"]) == 2 and main(["doctor", "room_gb=inf"]) == 2


@pytest.mark.slow
def test_every_part_has_a_row_here(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["doctor", "limit_s=600", "json=true", f"paths=[{tmp_path}]"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    for name in ("python", "packages", "step on cpu", f"disk {tmp_path}"):
        assert rows[name]["status"] != "red", rows[name]
    assert {"torch", "xformers", "bitsandbytes", "wandb", "hub", "SLURM", "several nodes"} <= set(
        rows
    )
    assert all(row["remedy"] for row in rows.values() if row["status"] != "green")
    assert not list(tmp_path.iterdir())


# --- Packages, torch, GPUs and kernels ---


def test_packages_that_are_too_old_or_missing_are_named_with_what_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = machine.importlib.metadata.version

    def other(name: str) -> str:
        if name == "lightning":
            raise machine.importlib.metadata.PackageNotFoundError
        return "1.13.1+cu117" if name == "torch" else version(name)

    assert rows_of(machine.packages())["packages"].status == "green"
    monkeypatch.setattr(machine.importlib.metadata, "version", other)
    found = rows_of(machine.packages())["packages"]
    assert found.status == "red"
    assert "torch 1.13.1+cu117" in found.finding and "lightning not installed" in found.finding
    assert "'torch>=" in found.remedy and "'lightning>=" in found.remedy
    monkeypatch.setattr(machine.platform, "python_version", lambda: "3.8.19")
    found = rows_of(machine.packages())["python"]
    assert found.status == "red" and ">=3.10" in found.remedy


def torch_row(monkeypatch: pytest.MonkeyPatch, folder: Path, cuda: str | None, cards: int) -> Row:
    """Returns the first row where torch is built for `cuda` and the machine has so many cards."""
    for number in range(cards):
        (folder / str(number)).mkdir(parents=True)
    monkeypatch.setattr(machine, "GPU_FOLDER", str(folder))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = next(row for row in machine.torch_and_step() if isinstance(row, Row))
    assert found.name == "torch"
    return found


@pytest.mark.parametrize(
    "cuda, cards, status, words",
    [
        (None, 2, "red", "no CUDA, but this machine has 2 NVIDIA GPUs"),
        ("13.0", 1, "red", "the NVIDIA GPUs are not usable: UserWarning: driver too old"),
        ("13.0", 0, "yellow", "no NVIDIA GPU here"),
    ],
)
def test_a_torch_that_does_not_fit_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str, cards: int, status: str, words: str
) -> None:
    def is_available() -> bool:
        if cards and cuda:
            machine.warnings.warn("driver too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    found = torch_row(monkeypatch, tmp_path / "gpus", cuda, cards)
    assert found.status == status and words in found.finding and found.remedy


def test_gpus_have_their_memory_and_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, count=2)
    card = types.SimpleNamespace(name="Card", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    memory = [(24 * 2**30, 24 * 2**30), (6 * 2**30, 24 * 2**30)]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: memory[device.index])

    def compare(device: torch.device) -> Row:
        if device.type == "cuda":
            raise RuntimeError("no kernel image is available for execution on the device\nmore")
        return Row("step on cpu", "green", "")

    monkeypatch.setattr(one_step, "compare", compare)
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    found = rows_of(machine.torch_and_step())
    assert found["gpu 0"].status == "green" and "24.0 GiB, capability 7.5" in found["gpu 0"].finding
    assert found["gpu 1"].status == "yellow" and "6.0 GiB free" in found["gpu 1"].finding
    assert found["step on cuda:0"].status == "red"
    assert "no kernel image" in found["step on cuda:0"].finding
    assert found["xformers"].status == "green" and "not installed" in found["xformers"].finding


def test_kernels_are_run_and_their_failure_is_red_beside_a_gpu_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: name)
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(machine, "_attention_problem", lambda device: "no operator")
    monkeypatch.setattr(machine, "_eight_bit_problem", lambda device: None)
    monkeypatch.setattr(one_step, "compare", lambda device: Row("step", "green", ""))
    found = rows_of(machine.torch_and_step())
    status = "red" if torch.cuda.is_available() else "yellow"
    assert found["xformers"].status == status and "no operator" in found["xformers"].finding
    assert "attention=sdpa" in found["xformers"].remedy
    assert found["bitsandbytes"].status == "green" and not found["bitsandbytes"].remedy


# --- One step ---


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_step_is_the_recorded_one(device: str) -> None:
    assert one_step.compare(torch.device(device)).status == "green"


def test_the_tolerance_lies_between_rounding_and_another_computation() -> None:
    """float32 is far below it; bfloat16, whose mantissa TF32's exceeds by 3 bits, is far above."""
    exact = one_step.largest_difference(one_step.one_step(CPU, torch.float64), RECORD)
    single = one_step.largest_difference(one_step.one_step(CPU), RECORD)
    half = one_step.largest_difference(one_step.one_step(CPU, torch.bfloat16), RECORD)
    assert exact < 1e-12 and single < one_step.TOLERANCE / 10 and half > 10 * one_step.TOLERANCE


def test_another_result_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {kind: [1.001 * value for value in RECORD[kind]] for kind in ("loss", "output")}
    monkeypatch.setattr(one_step, "one_step", lambda device: changed)
    found = one_step.compare(CPU)
    assert found.status == "red" and "1e-03 off the record" in found.finding


# --- Disks ---


def test_a_disk_with_room_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    (found,) = disk.disk(str(tmp_path / "not" / "there"), room_gb=1e-6)
    assert found.status in ("green", "yellow") and "MB/s" in found.finding
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_red_and_one_at_the_edge_is_yellow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edge = types.SimpleNamespace(free=20 * 10**9)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: edge)
    monkeypatch.setattr(disk, "speeds", lambda folder: (1000.0, 1000.0))
    assert next(disk.disk(str(tmp_path), 20)).status == "green"
    found = next(disk.disk(str(tmp_path), 20.1))
    assert found.status == "yellow" and "20.0 GB free" in found.finding and "room" in found.remedy
    monkeypatch.undo()
    # The kernel's own "no space left on device".
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: open("/dev/full", "w+b"))  # noqa: SIM115
    found = next(disk.disk(str(tmp_path), 1e-6))
    assert found.status == "red" and "No space left on device" in found.finding
    assert "make room" in found.remedy


def test_a_slow_disk_is_told_what_saving_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "speeds", lambda folder: (50.0, 1000.0))
    found = next(disk.disk(str(tmp_path), 1e-6))
    assert found.status == "yellow" and "take 276 s to save" in found.remedy


def test_a_place_below_a_file_is_red(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = next(disk.disk(str(tmp_path / "file" / "run"), 1))
    assert found.status == "red" and "is a file" in found.finding


# --- Servers ---

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No proxy, no mode and no key but those that a test sets."""
    for name in (*PROXIES, *map(str.upper, PROXIES), "WANDB_MODE", "WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    return monkeypatch


@pytest.fixture
def silent_port() -> Iterator[int]:
    """The port of a server that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_proxy_that_answers_nothing_is_red_and_named_without_its_password(
    online: pytest.MonkeyPatch, silent_port: int
) -> None:
    online.setattr(servers, "PATIENCE_S", 0.2)
    online.setenv("https_proxy", f"http://me:secret@127.0.0.1:{silent_port}")
    online.setenv("WANDB_API_KEY", "0" * 40)
    for probe in (servers.hub, servers.wandb):
        (found,) = probe()
        assert found.status == "red" and "https_proxy" in found.remedy
        assert f"through the proxy 127.0.0.1:{silent_port}: nothing within 0.2 s" in found.finding
        assert "secret" not in str(found)


def test_without_network_the_remedy_is_to_do_without(
    online: pytest.MonkeyPatch, silent_port: int
) -> None:
    online.setattr(servers, "PATIENCE_S", 0.2)
    online.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent_port}")
    (found,) = servers.hub()
    assert found.status == "yellow" and "HF_HUB_OFFLINE=1" in found.remedy
    online.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    (found,) = servers.hub()
    assert found.status == "yellow" and "Connection refused" in found.finding
    online.setenv("HF_HUB_OFFLINE", "1")
    assert next(servers.hub()).status == "green"
    online.setenv("WANDB_MODE", "offline")
    assert next(servers.wandb()).status == "green"


class Api(BaseHTTPRequestHandler):
    """Both servers: knows one key, and sends HTML where asked for more."""

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == "Bearer good"
        self.reply(200 if known else 401, json.dumps({"name": "ann"}))

    def do_POST(self) -> None:
        if self.path.startswith("/html"):
            return self.reply(200, "<html>please log in</html>")
        known = self.headers["Authorization"] == "Basic YXBpOmdvb2Q="  # api:good
        viewer = {"username": "ann"} if known else None
        return self.reply(200, json.dumps({"data": {"viewer": viewer}}))

    def reply(self, status: int, text: str) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


def test_keys_and_tokens_are_tried(online: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    online.setattr("huggingface_hub.constants.ENDPOINT", address)
    online.setenv("WANDB_BASE_URL", address)
    (found,) = servers.hub()
    assert found.status == "green" and "no token" in found.finding
    assert next(servers.wandb()).status == "yellow"
    for key, status in (("good", "green"), ("bad", "red")):
        online.setattr("huggingface_hub.get_token", partial(str, key))
        online.setenv("WANDB_API_KEY", key)
        for found in (*servers.hub(), *servers.wandb()):
            assert found.status == status, found
            assert ("to ann" if status == "green" else "again") in found.finding + found.remedy
    online.setenv("WANDB_BASE_URL", f"{address}/html")
    (found,) = servers.wandb()
    assert found.status == "yellow" and "something else than its API" in found.finding
    server.shutdown()
    server.server_close()


# --- The cluster ---

CONFIG = (
    "SLURM_VERSION           = 22.05.8\nClusterName = loop\nKillWait  = 30 sec\nJobRequeue = 1\n"
)


def slurm_row(folder: Path, monkeypatch: pytest.MonkeyPatch, partition: str, status: int) -> Row:
    """Returns the row beside commands of SLURM that answer so."""
    folder.mkdir()
    for name, text in {
        "sbatch": "",
        "scontrol": CONFIG,
        "sinfo": f"{partition}|2|1:00|1:00|gpu:8",
    }.items():
        (folder / name).write_text(
            f"#!/bin/sh\ncat <<'END'\n{text}\nEND\necho gone >&2\nexit {status}\n"
        )
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    (found,) = nodes.slurm()
    return found


def test_without_slurm_a_remedy_and_with_it_its_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = slurm_row(tmp_path / "1", monkeypatch, "gpu*", 0)
    assert found.status == "green" and "22.05.8 on loop; KillWait 30 sec" in found.finding
    assert "gpu* 2 nodes" in found.finding and "gpu:8" in found.finding
    found = slurm_row(tmp_path / "2", monkeypatch, "gpu", 0)
    assert found.status == "yellow" and "--partition" in found.remedy
    found = slurm_row(tmp_path / "3", monkeypatch, "gpu", 1)
    assert found.status == "yellow" and "does not answer: gone" in found.finding
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = nodes.slurm()
    assert found.status == "yellow" and found.finding == "sbatch is not on the PATH"


def test_a_host_that_others_do_not_find_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    (found,) = nodes.nodes()
    assert found.status == "yellow" and "others do not reach 127.*" in found.finding
    assert "MASTER_ADDR" in found.remedy and "15000 to 24999" in found.remedy
    monkeypatch.setattr(socket, "gethostname", lambda: "not-there.invalid")
    (found,) = nodes.nodes()
    assert found.status == "yellow" and "does not resolve" in found.finding
