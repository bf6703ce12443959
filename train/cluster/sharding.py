"""One model over several processes: `trainer.strategy=fsdp`, fully sharded data parallelism.

Of every weight, gradient, optimizer state and average each of N processes holds some rows, 1/N. The
weights of a block are gathered where it is computed, forward and backward, and let go of after it;
gradients are summed over the processes, each of which keeps and steps its own rows (Zhao et al.
2023; torch's fully_shard, whose tensors are DTensors). The arithmetic is that of DDP but for the
order of sums.

Checkpoints are folders, which all processes write, each its shares (their format: SHARDED_STATE);
any number of processes can read them.
"""

import os
import shutil
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor import empty as empty_sharded

from blackpoint.data.files.whole_file import flush_to_disk, remove_whole
from blackpoint.sampling.checkpoints.loading import SHARDED_STATE, read_ckpt, replaced

SHARES = "shares"
"""Of a sharded checkpoint: size and CRC-32 of each file of shares."""
OWNED = ("state_dict", "current_model_state", "optimizer_states")
"""Of a checkpoint: what is sharded."""
FILE_BYTES = 128 * 2**20
"""Of a process's file of shares, about: it is built in memory."""


class ShardedStrategy(DDPStrategy):
    """Lightning's DDP without its wrapper: what the module owns is sharded before all else."""

    mesh: DeviceMesh

    def setup_environment(self) -> None:
        super().setup_environment()
        assert self.lightning_module is not None
        self.mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for module in self.lightning_module.children():
            shard(module, self.mesh)

    def configure_ddp(self) -> None:
        """Wraps nothing: the sharded modules sum their gradients themselves."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, filepath)  # in every process

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_shares(Path(checkpoint_path), self.mesh)


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves this process its rows of each parameter; diffusers' unsplit blocks are gathered one by
    one, and all the rest at once."""
    blocks = getattr(module, "_no_split_modules", None) or ()
    for part in reversed(list(module.modules())):  # the inner ones first
        if part is module or type(part).__name__ in blocks:
            fully_shard(part, mesh=mesh, reshard_after_forward=True)


def takes_part(trainer: Trainer) -> bool:
    """Whether this process must run the model where one process shows what all have trained."""
    return trainer.is_global_zero or isinstance(trainer.strategy, ShardedStrategy)


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor that may be sharded, gathered: every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def own_rows(tensor: Tensor) -> Tensor:
    """Returns this process's rows of a tensor that may be sharded, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(checkpoint: dict[str, Any]) -> bool:
    """Whether what a checkpoint is to hold is spread over the processes."""
    return any(isinstance(one, DTensor) for one in checkpoint.get("state_dict", {}).values())


def write_shares(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes the folder of a sharded checkpoint, in every process; whole or not at all.

    Raises OSError where a process can't write.
    """
    tensors: dict[str, Tensor] = {}

    def taken(name: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        tensors[name] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    state = replaced(checkpoint, taken)
    rank, unfinished = dist.get_rank(), path.with_name(f".{path.name}.tmp")
    if rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    files = _file_numbers(tensors)
    writer = HuggingFaceStorageWriter(str(unfinished), files, save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except CheckpointException as error:  # of all processes, in each
        raise next(iter(error.failures.values()))[0] from None
    names = unfinished.glob(f"shard-{rank + 1:05d}-*")
    own = {file.name: [file.stat().st_size, checksum(file)] for file in names}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    if rank == 0:
        state[SHARES] = {name: sums for one in gathered for name, sums in one.items()}
        torch.save(state, unfinished / SHARDED_STATE)
        flush_to_disk([unfinished / SHARDED_STATE])
        if path.exists():  # damaged
            remove_whole(path)
        os.replace(unfinished, path)


def read_shares(path: Path, mesh: DeviceMesh) -> dict[str, Any]:
    """Returns a checkpoint of any strategy with this process's rows, copied."""

    def cut(_: str, tensor: Tensor) -> Tensor:
        if not tensor.ndim:  # a number
            return tensor
        return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None).clone()

    if path.is_dir():
        rows = partial(empty_sharded, device_mesh=mesh, placements=[Shard(0)])
        return read_ckpt(path, "", allocate=lambda one: rows(one.shape, dtype=one.dtype))
    stored = read_ckpt(path)
    owned = {key: replaced(stored[key], cut) for key in OWNED if key in stored}
    return stored | owned | {SHARES: {}}


def damaged_share(path: Path) -> str | None:
    """Returns what is wrong with the shares of a folder whose state is whole, or None."""
    for name, (size, wanted) in read_ckpt(path)[SHARES].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or checksum(file) != wanted:
            return f"{name} has changed since it was written"
    return None


def checksum(path: Path) -> int:
    """Returns the CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        for block in iter(lambda: file.read(2**22), b""):
            value = zlib.crc32(block, value)
    return value


def _file_numbers(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Returns the number, from 1, of the file that each tensor's rows go to, alike in all."""
    numbers, num_bytes = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + num_bytes // (FILE_BYTES * dist.get_world_size())
        num_bytes += tensor.numel() * tensor.itemsize
    return numbers
