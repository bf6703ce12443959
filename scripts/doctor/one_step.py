"""One training step of the embedded model, compared with its record: does this installation
compute what ours does?

The UNet of assets/tiny_sd, the published betas with zero terminal SNR, v-prediction:

    x_t = alpha_t x0 + sigma_t eps,   L = mean((v - UNet(x_t, t))^2),   v = alpha_t eps - sigma_t x0

assets/one_step.json holds L, the norm of its gradient and some values of the output, computed in
float64 by `python -m blackpoint.scripts.miniature.record_one_step`. Here it is computed in float32.
"""

import json
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from blackpoint.data.files.paths import CODE_ROOT
from blackpoint.sampling.prediction import add_noise, training_target
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.scripts.doctor.row import Row

RECORD = CODE_ROOT / "assets" / "one_step.json"
UNET = CODE_ROOT / "assets" / "tiny_sd" / "unet"
TIMESTEPS = (0, 333, 666, 999)
NUM_VALUES, TOKENS = 64, 8
TOLERANCE = 1e-4
"""Of the largest recorded value of each kind; float32 is within a hundredth of it, TF32 is not."""


def load_unet(device: torch.device, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """Loads the embedded model's UNet."""
    unet = UNet2DConditionModel.from_pretrained(UNET, low_cpu_mem_usage=False)
    return unet.to(device, dtype)


def one_step(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, list[float]]:
    """Returns the loss, its gradient's norm and 64 values of the output of a batch of four."""
    unet, generator = load_unet(device, dtype), torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    shape = (len(TIMESTEPS), 4, 32, 32)
    x0, eps, context = draw(*shape), draw(*shape), draw(len(TIMESTEPS), TOKENS, 64)
    t = torch.tensor(TIMESTEPS)
    schedule = NoiseSchedule.scaled_linear().zero_terminal_snr()
    alpha, sigma = (
        values[t].view(-1, 1, 1, 1).to(device, dtype) for values in (schedule.alpha, schedule.sigma)
    )
    x_t = add_noise(x0, eps, alpha, sigma)
    output = unet(x_t, t.to(device), context, return_dict=False)[0]
    target = training_target("v_prediction", x0, eps, alpha, sigma)
    loss = (target - output).square().mean()
    loss.backward()
    norms = [p.grad.double().norm() for p in unet.parameters() if p.grad is not None]
    values = output.detach().double().flatten()
    return {
        "loss": [loss.item()],
        "gradient_norm": [torch.stack(norms).norm().item()],
        "output": values[:: len(values) // NUM_VALUES][:NUM_VALUES].tolist(),
    }


def largest_difference(found: dict[str, list[float]], record: dict[str, Any]) -> float:
    """Returns the largest difference from the record, over the largest value of its kind."""
    return max(
        max(abs(a - b) for a, b in zip(found[kind], record[kind], strict=True))
        / max(map(abs, record[kind]))
        for kind in found
    )


def compare(device: torch.device) -> Row:
    """Repeats the step on a device, without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    difference = largest_difference(one_step(device), record)
    name = f"step on {device}"
    if difference <= TOLERANCE:
        return Row(name, "green", f"loss and gradient are the recorded ones to {difference:.0e}")
    finding = f"loss, gradient or output is {difference:.0e} off the record (at most {TOLERANCE})"
    remedy = "this torch or diffusers computes something else here: install other versions of them"
    return Row(name, "red", finding, remedy)
