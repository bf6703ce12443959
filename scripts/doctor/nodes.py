"""Probes of the cluster: SLURM's defaults, and how the tasks of several nodes would meet."""

import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from blackpoint.scripts.cluster.slurm_allocation import MIN_PORT, NUM_PORTS, free_port
from blackpoint.scripts.doctor.row import Row

PATIENCE_S = 4.0
SIOCGIFADDR = 0x8915
"""Linux's request for the address of an interface."""


def slurm() -> Iterator[Row]:
    """Asks the controller for its version, partitions and what stops and requeues a job."""
    if shutil.which("sbatch") is None:
        remedy = "needed for slurm/*.sbatch alone: run on a login node, or load SLURM's module"
        yield Row("SLURM", "yellow", "sbatch is not on the PATH", remedy)
        return
    try:
        config = _output("scontrol", "show", "config")
        lines = _output("sinfo", "-h", "-o", "%P|%D|%l|%L|%G").splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        text = getattr(error, "stderr", None) or str(error)
        finding = f"sbatch is here, but the controller does not answer: {_first(text)}"
        yield Row("SLURM", "yellow", finding, "check SLURM_CONF, or run where jobs are submitted")
        return
    known = dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", config, re.MULTILINE))
    about = [f"{known.get('SLURM_VERSION', '?')} on {known.get('ClusterName', '?')}"]
    about += [f"{key} {known[key]}" for key in ("KillWait", "JobRequeue") if key in known]
    has_default = False
    for partition, num_nodes, limit, default, devices in (line.split("|") for line in lines):
        has_default |= partition.endswith("*")
        about.append(f"{partition} {num_nodes} nodes, time {default} (at most {limit}), {devices}")
    if has_default:
        yield Row("SLURM", "green", "; ".join(about))
    else:
        remedy = "set #SBATCH --partition in slurm/*.sbatch"
        yield Row("SLURM", "yellow", "; ".join([*about, "no default partition"]), remedy)


def nodes() -> Iterator[Row]:
    """Resolves this host as the first node of a job is, and talks to itself at a port of theirs."""
    host, cards = socket.gethostname(), ", ".join(interfaces())
    ports = f"{MIN_PORT} to {MIN_PORT + NUM_PORTS - 1}"
    remedy = (
        "matters for several nodes alone: set MASTER_ADDR to an address that the others reach, and "
        f"NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to its interface; open the ports {ports}"
    )
    try:
        address = str(socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0])
    except OSError as error:
        finding = f"{host} does not resolve: {error.strerror}; interfaces: {cards}"
        yield Row("several nodes", "yellow", finding, remedy)
        return
    port = free_port(0)
    with socket.create_server(("", port)):
        try:
            socket.create_connection((address, port), PATIENCE_S).close()
        except OSError as error:
            finding = f"{host} ({address}), port {port}: {error}; interfaces: {cards}"
            yield Row("several nodes", "yellow", finding, remedy)
            return
    finding = f"{host} is {address}, and answers at port {port}; interfaces: {cards}"
    if address.startswith("127."):
        yield Row("several nodes", "yellow", f"{finding}; others do not reach 127.*", remedy)
    else:
        yield Row("several nodes", "green", f"{finding}; other nodes need the ports {ports}")


def interfaces() -> Iterator[str]:
    """Yields the names of the interfaces but loopback, with address, speed, or that it is down."""
    for _, name in socket.if_nameindex():
        if name == "lo":
            continue
        about, folder = [], Path("/sys/class/net") / name
        with suppress(OSError, ImportError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            import fcntl  # of Unix

            asked = struct.pack("256s", name.encode()[:15])
            about.append(socket.inet_ntoa(fcntl.ioctl(s.fileno(), SIOCGIFADDR, asked)[20:24]))
        with suppress(OSError, ValueError):
            if (folder / "operstate").read_text().strip() == "down":
                about.append("down")
            speed = int((folder / "speed").read_text())
            about += [f"{speed / 1e3:g} Gbit/s"] if speed > 0 else []
        yield f"{name} ({', '.join(about)})" if about else name


def _output(*command: str) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=PATIENCE_S
    ).stdout


def _first(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0] if lines else "no reason given"
