"""A real SLURM on loopback: munge, a controller and two emulated nodes, as plain processes.

Needs Debian's slurmctld, slurmd, slurm-client and munge, and root. Nothing in /etc is used or
changed; everything lies in one short folder (unix sockets allow about 100 characters) and ends
with `stop`. Each emulated node advertises more CPUs and GPUs than the machine has.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

NUM_NODES = 2
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
SBIN = "/usr/sbin"
CONFIG = """\
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
SlurmdPort={node_port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=10
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
GresTypes=gpu
MailProg=/bin/true
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=30
MinJobAge=3600
SlurmdTimeout=60
MessageTimeout=20
InactiveLimit=0
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=abrupt Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=20 PreemptMode=OFF
"""
NODE = (
    "NodeName=node{number} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=64 Sockets=1 "
    "CoresPerSocket=64 ThreadsPerCore=1 RealMemory=64000 Gres=gpu:8 State=UNKNOWN"
)


def _path() -> str:
    return f"{os.environ.get('PATH', '/usr/bin:/bin')}:{SBIN}"


def why_not() -> str | None:
    """Returns why no cluster can be started here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return (
            f"{', '.join(missing)} not installed (apt install slurmctld slurmd slurm-client munge)"
        )
    return None if os.geteuid() == 0 else "the emulated nodes need root"


MARKS = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(why_not() is not None, reason=f"no SLURM: {why_not()}"),
    pytest.mark.xdist_group("slurm"),
]
"""Of every test that starts one."""


class Cluster:
    """The daemons and their client commands; `stop` ends all jobs and all daemons."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.root.chmod(0o755)
        ports = _free_ports(1 + NUM_NODES)
        nodes = [NODE.format(number=n + 1, port=ports[n + 1]) for n in range(NUM_NODES)]
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("SLURM")
        }
        self.environment |= {"SLURM_CONF": str(self.root / "slurm.conf"), "PATH": _path()}
        for folder in ("state", *(f"spool-node{n + 1}" for n in range(NUM_NODES))):
            (self.root / folder).mkdir()
        for number in range(8):
            (self.root / f"gpu{number}").touch()
        (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-7]\n")
        (self.root / "slurm.conf").write_text(
            CONFIG.format(root=self.root, port=ports[0], node_port=ports[1], nodes="\n".join(nodes))
        )
        key = self.root / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))

    def start(self) -> None:
        """Starts the daemons; returns when both nodes are idle."""
        root, conf = self.root, self.environment["SLURM_CONF"]
        paths = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid"}
        paths |= {"log-file": "munged.log", "seed-file": "munge.seed"}
        options = [f"--{name}={root / file}" for name, file in paths.items()]
        self.run("munged", "--force", *options)
        self.run("slurmctld", "-c", "-f", conf)
        for number in range(NUM_NODES):
            self.run("slurmd", "-f", conf, "-N", f"node{number + 1}")

        def idle() -> bool:
            states = self.run("sinfo", "-h", "-N", "-p", "debug", "-o", "%T", check=False)
            return states.split() == ["idle"] * NUM_NODES

        wait_until(idle, 300, lambda: (root / "slurmctld.log").read_text()[-2000:])

    def stop(self) -> None:
        """Ends every job and every daemon, and removes the folder."""
        self.run("scancel", *self._jobs(), check=False)
        deadline_s = time.monotonic() + 40
        while self._jobs() and time.monotonic() < deadline_s:
            time.sleep(0.2)
        for name in (*(f"node{n + 1}" for n in range(NUM_NODES)), "slurmctld", "munged"):
            _end(self.root / f"{name}.pid")
        shutil.rmtree(self.root, ignore_errors=True)

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """Runs a client command and returns what it printed."""
        answer = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=300
        )
        assert not check or answer.returncode == 0, f"{command}: {answer.stderr}"
        return answer.stdout

    def submit(self, *arguments: str, cwd: Path) -> str:
        """Submits a batch job and returns its id."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd).strip()

    def state(self, job: str) -> dict[str, str]:
        """Returns what `scontrol show job` says, by its names."""
        text = self.run("scontrol", "show", "job", job, check=False)
        return dict(re.findall(r"(\w+)=(\S+)", text))

    def wait_for_end(self, job: str, timeout_s: float) -> dict[str, str]:
        """Waits until a job is over, requeues included, and returns its last state."""

        def over() -> bool:
            return self.state(job).get("JobState") in (
                "COMPLETED",
                "FAILED",
                "CANCELLED",
                "TIMEOUT",
            )

        wait_until(over, timeout_s, lambda: self.state(job))
        return self.state(job)

    def _jobs(self) -> list[str]:
        return sorted(set(self.run("squeue", "-h", "-o", "%A", check=False).split()))


def wait_until(condition: Callable[[], object], timeout_s: float, describe: Callable) -> None:
    """Polls; fails with a description after the time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {describe()}"
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    """Finds ports below those that the system gives to whoever asks, so that they stay free."""
    ports: list[int] = []
    while len(ports) < count:
        with contextlib.suppress(OSError), socket.socket() as probe:
            port = random.randrange(10_000, 30_000)
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    return sorted(set(ports)) if len(set(ports)) == count else _free_ports(count)


def _end(pid_file: Path) -> None:
    """Ends the daemon that wrote the file: asks first, then insists."""
    try:
        pid = int(pid_file.read_text())
    except (OSError, ValueError):
        return
    for number, patience_s in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
        deadline_s = time.monotonic() + patience_s
        try:
            os.kill(pid, number)
            while time.monotonic() < deadline_s:
                os.kill(pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            return


def main(command: list[str]) -> int:
    """Runs a command beside a cluster of its own: `python -m tests.slurm_cluster COMMAND ...`."""
    reason = why_not()
    if reason or not command:
        print(reason or main.__doc__, file=sys.stderr)
        return 2
    cluster = Cluster()
    try:
        cluster.start()
        return subprocess.call(command, env=cluster.environment)
    finally:
        cluster.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
