"""The allocation of a SLURM job, read from the environment of its batch script."""

import os
import re
import shutil
import socket
import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from blackpoint.data.files.errors import UserError

INTERACTIVE_NAMES = ("bash", "interactive")
MIN_PORT, NUM_PORTS = 15_000, 10_000


@dataclass(frozen=True)
class Allocation:
    """Nodes, tasks and names of a job; `element` is "17_3" for element 3 of the array 17."""

    job: str
    array_job: str | None
    array_element: str | None
    restart: int
    num_nodes: int
    tasks_per_node: int
    node_list: str

    @property
    def element(self) -> str:
        """The name that scontrol knows this job by: of an array, this element alone."""
        return f"{self.array_job}_{self.array_element}" if self.array_job else self.job


def read_allocation(environment: Mapping[str, str]) -> Allocation:
    """Reads a job; raises UserError where it can't carry one process per GPU, or has no srun."""
    if "SLURM_JOB_ID" not in environment:
        raise UserError("this is no SLURM job (SLURM_JOB_ID is not set); submit it with sbatch")
    num_nodes = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
    name = environment.get("SLURM_JOB_NAME", "")
    if name in INTERACTIVE_NAMES:
        raise UserError(
            f"--job-name={name} tells Lightning that the job is interactive, and then its tasks do "
            "not find each other; give the job another name"
        )
    if shutil.which("srun") is None:
        raise UserError(
            f"srun is not on the PATH of {socket.gethostname()}; the tasks are started with it: "
            "load SLURM's module, or ask your administrators"
        )
    return Allocation(
        job=environment["SLURM_JOB_ID"],
        array_job=environment.get("SLURM_ARRAY_JOB_ID"),
        array_element=environment.get("SLURM_ARRAY_TASK_ID"),
        restart=int(environment.get("SLURM_RESTART_COUNT", "0")),  # not set at the first start
        num_nodes=num_nodes,
        tasks_per_node=_tasks_per_node(environment, num_nodes),
        node_list=environment.get("SLURM_JOB_NODELIST", ""),
    )


def _tasks_per_node(environment: Mapping[str, str], num_nodes: int) -> int:
    """Returns the tasks of every node; sbatch's options may contradict each other."""
    asked = environment.get("SLURM_NTASKS_PER_NODE")
    total = int(environment.get("SLURM_NTASKS", int(asked or "1") * num_nodes))
    if asked is not None and total != int(asked) * num_nodes:
        raise UserError(
            f"--ntasks={total} disagrees with --nodes={num_nodes} --ntasks-per-node={asked}, which "
            f"are {int(asked) * num_nodes} tasks; leave --ntasks out"
        )
    layout = environment.get("SLURM_TASKS_PER_NODE", str(total))  # such as 8(x2), or 8,4
    if not re.fullmatch(r"\d+(\(x\d+\))?", layout):
        raise UserError(
            f"the nodes got different numbers of tasks ({layout}); give --nodes and "
            "--ntasks-per-node, and leave --ntasks out"
        )
    return int(asked) if asked is not None else total // num_nodes


def expand(argument: str, allocation: Allocation) -> str:
    """Replaces %a, %A and %j as sbatch does in --output: element, array and job."""
    replaced = argument
    for pattern, value in (
        ("%a", allocation.array_element),
        ("%A", allocation.array_job),
        ("%j", allocation.job),
    ):
        if pattern in replaced and value is None:
            raise UserError(
                f"{argument}: {pattern} stands for an array's, and this job is none; submit with "
                "sbatch --array=..., or write a value"
            )
        replaced = replaced.replace(pattern, value or "")
    return replaced


def rendezvous(allocation: Allocation) -> dict[str, str]:
    """Returns MASTER_ADDR and MASTER_PORT, at which the tasks meet; what the user set stays.

    The first node's name must lead somewhere on every node: tasks that can't find it hang until
    the time limit. Where it does not resolve, SLURM's own address of the node is taken.
    """
    variables = {}
    if "MASTER_ADDR" not in os.environ:
        variables["MASTER_ADDR"] = (
            "127.0.0.1" if allocation.num_nodes == 1 else _first_address(allocation)
        )
    if "MASTER_PORT" not in os.environ:
        # Jobs of other clusters and folders may have the same number.
        seed = zlib.crc32(f"{Path.cwd()} {allocation.job}".encode())
        variables["MASTER_PORT"] = str(free_port(seed))
    return variables


def _first_address(allocation: Allocation) -> str:
    host = scontrol("show", "hostnames", allocation.node_list).split()[0]
    if _resolves(host):
        return host
    address = re.search(r"NodeAddr=(\S+)", scontrol("show", "node", host))
    if address and _resolves(address[1]):
        return address[1]
    raise UserError(
        f"MASTER_ADDR: the first node's name, {host}, does not resolve, and neither does SLURM's "
        "address of it; set MASTER_ADDR in the environment of sbatch"
    )


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def free_port(own: int) -> int:
    """Returns the job's own port, or the next one that nobody listens on: nodes are shared."""
    for offset in range(100):
        port = MIN_PORT + (own + offset) % NUM_PORTS
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
    raise UserError(f"MASTER_PORT: no free port near {port}; set MASTER_PORT")


def scontrol(*arguments: str) -> str:
    """Runs scontrol and returns its output; raises OSError or CalledProcessError."""
    answer = subprocess.run(
        ["scontrol", *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    return answer.stdout
