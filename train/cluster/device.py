"""What the device that trains must be able to do, checked before a run writes anything."""

import os
from collections.abc import Mapping
from dataclasses import replace

import torch

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.runtime.precision import computes_in_bfloat16, set_tf32, settle
from blackpoint.train.config.config import Precision, TrainConfig
from blackpoint.train.optimizer import eight_bit_problem
from blackpoint.train.records.first_process import note
from blackpoint.train.records.run_directory import FORMATS, RunRecord

# The format that the UNet's products are computed in; bf16-true holds what is trained in it too.
COMPUTE_DTYPE: dict[Precision, torch.dtype] = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "bf16-true": torch.bfloat16,
}


def training_device() -> torch.device:
    """Returns the device of this process: of GPUs the one that Lightning will give it.

    The first process, which runs before Lightning starts the others, is number 0 of its machine.
    """
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def local_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Returns the number of this process on its machine, by torchrun, Lightning or SLURM."""
    return int(environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID") or 0)


def prepare_device(config: TrainConfig, record: RunRecord) -> tuple[TrainConfig, torch.device]:
    """Returns the config as it is settled on the device of this process, and that device.

    A GPU becomes the process's own: nothing that is probed or loaded takes memory of another.
    Raises UserError for what the device lacks, or what the run in `record` was not begun in.
    """
    device = training_device()
    check_count(config, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    config = settled(config, record, device)
    check_device(config, device)
    set_tf32(config.trainer.tf32 is True)
    return config, device


def settled(config: TrainConfig, record: RunRecord, device: torch.device) -> TrainConfig:
    """Returns the config with what `auto` takes on `device` as its tf32 and encoder_dtype.

    Raises UserError where the run was begun in others. One without a record of them goes on as it
    was.
    """
    asked = {name: getattr(config.trainer, name) for name in FORMATS}
    kept, is_recorded = record.formats
    where = f"run_dir={record.run_dir}"
    formats = settle(where, asked, device, note, kept, is_recorded, "trainer.")
    return replace(config, trainer=replace(config.trainer, **formats))


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Raises UserError for a precision or an optimizer that `device` lacks."""
    precision = config.trainer.precision
    if precision == "16-mixed" and device.type != "cuda":
        raise UserError(
            "trainer.precision=16-mixed needs a GPU (CUDA), and none is here; use 32-true or "
            "bf16-mixed"
        )
    is_bfloat16 = COMPUTE_DTYPE[precision] == torch.bfloat16
    if is_bfloat16 and device.type == "cuda" and not computes_in_bfloat16(device):
        raise UserError(
            f"trainer.precision={precision} needs a GPU that computes in bfloat16, and "
            f"{torch.cuda.get_device_name(device)} does not; use 16-mixed or 32-true"
        )
    if config.optimizer.name == "adamw_8bit":
        problem = eight_bit_problem(device)
        if problem:
            raise UserError(
                f"optimizer.name=adamw_8bit cannot run here: {problem}; "
                "pip install -e '.[eight-bit]', or use optimizer.name=adamw"
            )


def check_count(config: TrainConfig, device: torch.device) -> None:
    """Raises UserError for more devices than GPUs on this machine; of CPUs, any number will do."""
    devices = config.trainer.devices
    present = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type != "cpu" and devices > present:
        raise UserError(
            f"trainer.devices={devices} needs {devices} GPUs on each machine, and this process "
            f"sees {present}; set trainer.devices={present}; the training stays the same, for "
            f"batch_size={config.batch_size} counts the images of all GPUs; if memory runs out, "
            "halve batch_size and double trainer.accumulate_grad_batches (under SLURM, "
            "--gpus-per-task hides GPUs: use --gpus-per-node)"
        )
    if device.type == "cuda" and (device.index or 0) >= present:
        raise UserError(
            f"this process is number {device.index} on its machine (LOCAL_RANK or SLURM_LOCALID) "
            f"and sees {present} GPUs; start one process for each of trainer.devices={devices}"
        )
