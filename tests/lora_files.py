"""Adapters as their writers make them: peft's on a UNet, kohya's and diffusers' files."""

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict

from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv"]
CONVOLUTIONS += ["upsamplers.0.conv"]
ALL_BLOCKS: dict[str, Any] = {
    "block_out_channels": (8, 16, 32, 32),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "norm_num_groups": 4,
}
"""The block structure of SD 1.x and 2.x, narrow."""


def adapted_unet(
    folder: Path, rank: int = 8, alpha: float = 4, targets: list[str] | None = None, **more: Any
) -> UNet2DConditionModel:
    """Returns the UNet of a folder with adapters of peft whose up matrices are not zero."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    unet.requires_grad_(False)
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets or ATTENTION, **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rank)
        unet.add_adapter(settings)
        for name, tensor in unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(tensor, std=0.05)
            if "magnitude" in name:
                tensor.data.mul_(1 + 0.1 * torch.rand_like(tensor))
    return unet.eval()


def adapters(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """Returns peft's tensors of a UNet, names as peft saves them."""
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(unet)
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def write_lora_checkpoint(
    path: Path,
    unet: UNet2DConditionModel,
    base: Path,
    *,
    alpha: float = 4,
    current: dict[str, torch.Tensor] | None = None,
    process: Process | None = None,
) -> Path:
    """Writes what a .ckpt of a LoRA run holds of its weights; `current` are the raw ones."""
    state = {f"unet.{name}": tensor for name, tensor in adapters(unet).items()}
    process = process or Process(
        NoiseSchedule.scaled_linear().zero_terminal_snr(), "v_prediction", "trailing"
    )
    config = unet.peft_config["default"]
    lora = {"rank": config.r, "alpha": alpha, "dora": config.use_dora, "targets": ["to_q"]}
    record = {"base": str(base), "process": process.to_diffusers(), "lora": lora}
    stored: dict[str, Any] = {"state_dict": state, "blackpoint": record}
    if current is not None:
        stored["current_model_state"] = current
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(stored, path)
    return path


@torch.no_grad()
def unet_output(unet: Any, width: int = 32) -> torch.Tensor:
    """Evaluates a UNet on fixed inputs."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 6, width, generator=generator)
    output: torch.Tensor = unet(x, torch.tensor([999, 500]), text).sample
    return output
