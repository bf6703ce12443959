"""Notes of an export's card on clients other than diffusers, each where it applies.

Single files hold no scheduler config, so a client guesses the prediction type and the schedule:

| client | SD 1 | SD 2 | zero terminal SNR |
|---|---|---|---|
| ComfyUI (comfy/supported_models.py) | epsilon | by a statistic of one bias | node only |
| Forge, reForge (backend/loader.py) | NAME.yaml | the statistic, or NAME.yaml | key ztsnr |
| A1111 | NAME.yaml | NAME.yaml | a setting; key ztsnr on its dev branch |

The keys `v_pred` and, in ComfyUI, `ztsnr` are read for SDXL alone.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule

Kind = Literal["SD 1", "SD 2", "pixel", "unknown"]

V_STATISTIC = 0.09
"""ComfyUI and Forge take an SD 2 UNet for v-prediction above this."""
KINDS: dict[tuple[Any, int], Kind] = {(768, 320): "SD 1", (1024, 320): "SD 2"}
"""By the width of the context and of the first block."""
COMFYUI_SAMPLING = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}
LDM_CONFIGS = {"SD 1": "v1-inference.yaml", "SD 2": "v2-inference.yaml"}

OWN_BETAS = (
    "Do not use them with this model. Its betas are its own (a resolution shift, or another "
    "scheme), and no key, node, yaml or setting of theirs takes betas: they would run Stable "
    "Diffusion's, so that every timestep has another amount of noise than the network was trained "
    "on. Use diffusers with the scheduler of this folder."
)
SINGLE_FILE = "diffusers' `from_single_file` does not restore this process: load the folder."
SCHEDULERS = (
    "**ComfyUI**, scheduler: `simple` or `sgm_uniform`, which are trailing. Not `ddim_uniform`, "
    "which never visits the last timestep; `karras` and `exponential` spend many of the steps next "
    "to it. Guidance rescale is the node `RescaleCFG`, 0.7."
)


@dataclass(frozen=True)
class Architecture:
    """The architecture that other clients take a UNet for."""

    kind: Kind
    statistic: float | None = None
    """SD 2: the standard deviation that ComfyUI and Forge decide the prediction type by."""

    @classmethod
    def of(cls, unet: Any, in_pixels: bool = False) -> "Architecture":
        """Reads a diffusers UNet: its context width and channels, and for SD 2 one bias."""
        if in_pixels:
            return cls("pixel")
        size = (unet.config.cross_attention_dim, unet.config.block_out_channels[0])
        kind: Kind = KINDS.get(size, "unknown")
        if kind != "SD 2":
            return cls(kind)
        # LDM: output_blocks.11.1.transformer_blocks.0.norm1.bias
        bias = unet.up_blocks[3].attentions[2].transformer_blocks[0].norm1.bias
        return cls(kind, torch.std(bias.detach().float(), unbiased=False).item())

    @property
    def guess(self) -> str:
        """The prediction type that ComfyUI and Forge take it for."""
        is_v = self.statistic is not None and self.statistic > V_STATISTIC
        return "v_prediction" if is_v else "epsilon"


UNKNOWN = Architecture("unknown")


def client_facts(process: Process, architecture: Architecture) -> list[str]:
    """Lists the notes."""
    if architecture.kind not in LDM_CONFIGS:
        return ["They do not know this UNet. Use diffusers, as above."]
    if not has_sd_betas(process):
        return [OWN_BETAS, SINGLE_FILE]
    kind, guess, zero_snr = (
        architecture.kind,
        architecture.guess,
        process.schedule.is_zero_terminal_snr,
    )
    is_guessed = process.prediction_type == guess
    parameterization = {"v_prediction": "v", "epsilon": "eps"}.get(process.prediction_type)
    is_published = process.prediction_type == "epsilon" and not zero_snr
    facts = {
        "ComfyUI and Forge guess the prediction type of SD 2 by the standard deviation of one bias "
        f"({architecture.statistic or 0:.3f} here; above {V_STATISTIC} means v). They take this "
        f"model for {guess}, but it is {process.prediction_type}: tell them.": (
            architecture.statistic is not None and not is_guessed
        ),
        f"**ComfyUI** reads no key for {kind}: put the node `ModelSamplingDiscrete` after the "
        f"loader, sampling `{COMFYUI_SAMPLING[process.prediction_type]}`, zsnr "
        f"`{str(zero_snr).lower()}`.": not is_guessed or zero_snr,
        SCHEDULERS: zero_snr,
        f"**A1111, Forge, reForge**: put LDM's `{LDM_CONFIGS[kind]}` beside the file, named as it "
        f'(`NAME.yaml`), with `model.params.parameterization: "{parameterization}"`.': (
            parameterization and not (is_guessed and guess == "epsilon")
        ),
        "**A1111, Forge, reForge** cannot run it: it predicts the sample.": (
            process.prediction_type == "sample"
        ),
        "**A1111, Forge, reForge**, zero terminal SNR: add an empty tensor under the key `ztsnr` "
        "to the file (Forge, reForge, A1111's dev branch); in A1111 from 1.8.0 on, set Noise "
        "schedule for sampling to Zero Terminal SNR.": (
            zero_snr and process.prediction_type == "v_prediction"
        ),
        SINGLE_FILE: not is_published,
    }
    return [fact for fact, is_so in facts.items() if is_so]


def has_sd_betas(process: Process) -> bool:
    """Whether the betas are Stable Diffusion's, as published or rescaled to zero terminal SNR.

    Other clients have these two in their code and no others.
    """
    published = NoiseSchedule.scaled_linear()
    ours = process.schedule.alpha_bar
    return any(
        ours.shape == schedule.alpha_bar.shape
        and torch.allclose(ours, schedule.alpha_bar, rtol=1e-5, atol=1e-9)
        for schedule in (published, published.zero_terminal_snr())
    )
