"""What the device that trains must be able to do, checked before a run writes anything."""

import torch

from sampling.errors import UserError
from train.config import Precision, TrainConfig
from train.optimizer import eight_bit_problem

# The format that the UNet's products are computed in; weights are held in float32 in every case.
COMPUTE_DTYPE: dict[Precision, torch.dtype] = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
TF32_CAPABILITY = (8, 0)


def training_device() -> torch.device:
    """Returns the kind of device that Lightning chooses by itself."""
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Raises UserError for more devices than there are, or what `device` lacks.

    That may be a precision, tf32 or an optimizer.
    """
    check_count(config, device)
    precision = config.trainer.precision
    if precision == "16-mixed" and device.type != "cuda":
        raise UserError(
            "trainer.precision=16-mixed needs a GPU (CUDA), and none is here; use 32-true or "
            "bf16-mixed"
        )
    if (
        precision == "bf16-mixed"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise UserError(
            f"trainer.precision=bf16-mixed needs a GPU that computes in bfloat16, and "
            f"{torch.cuda.get_device_name()} does not; use 16-mixed or 32-true"
        )
    if config.trainer.tf32:
        if device.type != "cuda":
            raise UserError(
                f"trainer.tf32=true needs a GPU (CUDA), and this run is on the {device.type}; "
                "leave it at false"
            )
        if torch.cuda.get_device_capability() < TF32_CAPABILITY:
            raise UserError(
                "trainer.tf32=true needs compute capability 8.0 or newer, and "
                f"{torch.cuda.get_device_name()} is older; leave it at false"
            )
    if config.optimizer.name == "adamw_8bit":
        problem = eight_bit_problem(device)
        if problem:
            raise UserError(
                f"optimizer.name=adamw_8bit cannot run here: {problem}; "
                "pip install 'blackpoint[eight-bit]', or use optimizer.name=adamw"
            )


def check_count(config: TrainConfig, device: torch.device) -> None:
    """Raises UserError for more devices than GPUs on this machine; of CPUs, any number will do."""
    devices = config.trainer.devices
    present = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type != "cpu" and devices > present:
        raise UserError(
            f"trainer.devices={devices} needs {devices} GPUs on each machine, and this process "
            f"sees {present}; set trainer.devices={present}. The training stays the same, for "
            f"batch_size={config.batch_size} counts the images of all GPUs; if memory runs out, "
            "halve batch_size and double trainer.accumulate_grad_batches. (Under SLURM, "
            "--gpus-per-task hides GPUs: use --gpus-per-node)"
        )


def set_tf32(enabled: bool) -> None:
    """Lets float32 products and convolutions on a GPU use TensorFloat-32, or forbids it.

    Torch forbids it for products and allows it for convolutions until told: both are set. These
    are the calls that sampling/export_check.py reads; torch refuses to mix them with
    `fp32_precision`.
    """
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.allow_tf32 = enabled
