"""What programs other than diffusers make of a model's single file: one row per client.

A single file holds weights and no scheduler config. A client learns the prediction type and the
noise schedule from signs in the file or beside it, each from others, or from its user. CLIENTS says
from which, with the version and the evidence. The card of an export, the report beside a single
file and docs/clients.md are made of it, and tests/test_card_clients.py has the clients' own rules
judge written files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from blackpoint.sampling.checkpoints.prediction_evidence import V_STATISTIC
from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule

Kind = Literal["SD 1", "SD 2", "SDXL", "pixel", "unknown"]
KNOWN_KINDS: tuple[Kind, ...] = ("SD 1", "SD 2", "SDXL")
Sign = Literal["yaml", "statistic", "v_pred", "ztsnr", "base"]
"""What tells a client: NAME.yaml, the spread of one bias, an empty tensor of that name, or nothing
but that it is an SD 2."""

KINDS: dict[tuple[Any, int], Kind] = {(768, 320): "SD 1", (1024, 320): "SD 2", (2048, 320): "SDXL"}
"""By the width of the context and of the first block."""
LDM_TYPES = {"epsilon": "eps", "v_prediction": "v"}
TYPE_NAMES = {"epsilon": "epsilon", "v_prediction": "v-prediction"}
SIGN_NAMES: dict[Sign, str] = {
    "yaml": "NAME.yaml beside the file",
    "statistic": f"the standard deviation of one bias above {V_STATISTIC}",
    "v_pred": "the key `v_pred`",
    "ztsnr": "the key `ztsnr`",
    "base": "it takes any SD 2 for one",
}

TRAILING = "the steps begin at the last timestep, where the SNR is zero, and are even"
K_DIFFUSION = (
    f"Schedule type `Simple` or `SGM Uniform`: {TRAILING}. `DDIM` never visits it; `Karras` and "
    "`Exponential` spend many of the steps next to it."
)


@dataclass(frozen=True)
class Client:
    """One client: what it recognises by itself, and what its user must choose.

    The texts are for all kinds; {sampling}, {prediction} and {zsnr} are the model's own.
    """

    name: str
    version: str
    evidence: str
    signs_of_v: Mapping[Kind, tuple[Sign, ...]]
    """By kind: signs by which it takes a file for v-prediction; for epsilon without one."""
    signs_of_zero_snr: Mapping[Kind, tuple[Sign, ...]] = field(default_factory=dict)
    """By kind: signs by which it takes a file for one with zero terminal SNR."""
    set_type: Mapping[str, str] = field(default_factory=dict)
    """By prediction type: how its user sets it; a type that is not here can't be set."""
    set_zero_snr: str = ""
    """How its user sets zero terminal SNR; empty where it can't be set."""
    scheduler: str = ""
    """Scheduler and guidance for zero terminal SNR."""


COMFYUI_NODE = (
    "After the loader, the node `ModelSamplingDiscrete` with sampling `{sampling}`, zsnr `{zsnr}`."
)
DIFFUSERS_SCHEDULER = (
    "After `from_single_file`: `pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, "
    "{scheduler})`."
)
INVOKEAI_TYPE = "In the model manager, prediction type `{prediction}`."
CLIENTS = (
    Client(
        name="ComfyUI",
        version="0.3.64",
        evidence="comfy/supported_models.py; files loaded by it, UNet and DDIM walk compared",
        signs_of_v={"SD 1": (), "SD 2": ("statistic",), "SDXL": ("v_pred",)},
        signs_of_zero_snr={"SDXL": ("ztsnr",)},
        set_type={"epsilon": COMFYUI_NODE, "v_prediction": COMFYUI_NODE},
        set_zero_snr=COMFYUI_NODE,
        scheduler=(
            f"Scheduler `simple` or `sgm_uniform`: {TRAILING}. `ddim_uniform` never visits it; "
            "`karras` and `exponential` spend many of the steps next to it. Guidance rescale: node "
            "`RescaleCFG`, 0.7."
        ),
    ),
    Client(
        name="Forge",
        version="of 2025-06",
        evidence="backend/loader.py, huggingface_guess, modules_forge; read",
        signs_of_v={"SD 1": ("yaml",), "SD 2": ("yaml", "statistic"), "SDXL": ("yaml", "v_pred")},
        signs_of_zero_snr=dict.fromkeys(KNOWN_KINDS, ("ztsnr",)),
        scheduler=K_DIFFUSION,
    ),
    Client(
        name="reForge",
        version="of 2026-03",
        evidence="modules_forge/forge_loader.py; read",
        signs_of_v={"SD 1": ("yaml",), "SD 2": ("yaml", "statistic"), "SDXL": ("v_pred",)},
        signs_of_zero_snr=dict.fromkeys(KNOWN_KINDS, ("ztsnr",)),
        scheduler=K_DIFFUSION,
    ),
    Client(
        name="A1111",
        version="1.10.1",
        evidence=(
            "modules/sd_models_config.py, sd_samplers_common.py, sd_schedulers.py; read. Pull "
            "requests 14145 (the setting), 16567 (keys, on the branch dev)"
        ),
        signs_of_v=dict.fromkeys(KNOWN_KINDS, ("yaml",)),
        set_zero_snr=(
            "Settings, Sampler parameters: Noise schedule for sampling `Zero Terminal SNR` (1.8.0 "
            "or newer; the branch dev reads the key `ztsnr`)."
        ),
        scheduler=K_DIFFUSION,
    ),
    Client(
        name="diffusers",
        version="0.42.1",
        evidence="loaders/single_file.py; run on every exported file",
        signs_of_v=dict.fromkeys(KNOWN_KINDS, ()),
        set_type={"epsilon": DIFFUSERS_SCHEDULER, "v_prediction": DIFFUSERS_SCHEDULER},
        set_zero_snr=DIFFUSERS_SCHEDULER,
        scheduler="`guidance_rescale=0.7`. A folder keeps the scheduler: `from_pretrained`.",
    ),
    Client(
        name="InvokeAI",
        version="of 2026",
        evidence="backend/model_manager/configs/main.py, denoise_latents.py; read. Issue 7495",
        signs_of_v={"SD 1": (), "SD 2": ("base",), "SDXL": ()},
        set_type={"epsilon": INVOKEAI_TYPE, "v_prediction": INVOKEAI_TYPE},
        set_zero_snr=(
            "Not possible with a single file: import the diffusers folder (`blackpoint export "
            "output=FOLDER`), whose scheduler config it reads."
        ),
        scheduler="CFG Rescale Multiplier 0.7.",
    ),
)

OWN_BETAS = (
    "Do not use them with this model. Its betas are its own (a resolution shift, or another "
    "scheme), and no key, node, yaml or setting of theirs takes betas: they would run Stable "
    "Diffusion's, so that every timestep has another amount of noise than the network was trained "
    "on. Use diffusers with the scheduler of this folder."
)
SIZES_UNKNOWN = (
    "No client but blackpoint knows a UNet of these widths; diffusers reads the file with "
    "config=FOLDER, a diffusers folder of this model."
)
NOT_SET = "It has no setting for this: use another client, or diffusers."


@dataclass(frozen=True)
class Architecture:
    """The architecture that other clients take a UNet for."""

    kind: Kind
    statistic: float | None = None
    """SD 2: the standard deviation that ComfyUI and Forge decide the prediction type by."""
    is_xl: bool = False
    """Whether it has SDXL's conditions, of whatever widths."""

    @classmethod
    def of(cls, unet: Any, in_pixels: bool = False) -> "Architecture":
        """Reads a diffusers UNet: its context width and channels, and for SD 2 one bias."""
        if in_pixels:
            return cls("pixel")
        size = (unet.config.cross_attention_dim, unet.config.block_out_channels[0])
        kind: Kind = KINDS.get(size, "unknown")
        if kind != "SD 2":
            return cls(kind, is_xl=of_xl(unet.config))
        bias = unet.up_blocks[3].attentions[2].transformer_blocks[0].norm1.bias  # STATISTIC
        return cls(kind, torch.std(bias.detach().float(), unbiased=False).item())

    @property
    def guess(self) -> str:
        """The prediction type that those take an SD 2 for whom nothing else tells."""
        is_v = self.statistic is not None and self.statistic > V_STATISTIC
        return "v_prediction" if is_v else "epsilon"


UNKNOWN = Architecture("unknown")


def of_xl(unet: Mapping[str, Any]) -> bool:
    """Whether a UNet's config is of an SDXL: it takes a second text and sizes."""
    return bool(unet["addition_embed_type"] == "text_time")


def signs_of(process: Process, architecture: Architecture) -> set[Sign]:
    """Lists the signs of a single file as `blackpoint export` writes it."""
    signs: dict[Sign, bool] = {
        "yaml": process.prediction_type == "v_prediction",
        "statistic": architecture.guess == "v_prediction",
        "v_pred": process.prediction_type == "v_prediction",
        "ztsnr": process.schedule.is_zero_terminal_snr,
        "base": architecture.kind == "SD 2",
    }
    return {sign for sign, is_there in signs.items() if is_there}


def client_notes(client: Client, process: Process, architecture: Architecture) -> list[str]:
    """Says what a client takes the model's single file for, and what its user must choose."""
    signs, kind = signs_of(process, architecture), architecture.kind
    tells_v = [sign for sign in client.signs_of_v[kind] if sign in signs]
    tells_zero = [sign for sign in client.signs_of_zero_snr.get(kind, ()) if sign in signs]
    taken_for = "v_prediction" if tells_v else "epsilon"
    has_zero = process.schedule.is_zero_terminal_snr
    type_by = f" ({SIGN_NAMES[tells_v[0]]})" if tells_v else ""
    schedule_by = f" with zero terminal SNR ({SIGN_NAMES[tells_zero[0]]})" if tells_zero else ""
    is_right = taken_for == process.prediction_type
    notes = [f"Takes it for {TYPE_NAMES[taken_for]}{type_by}{schedule_by or ', not zero SNR'}."]
    if is_right and has_zero == bool(tells_zero):
        notes[0] = notes[0].removesuffix(".") + ": right, nothing to set."
    if not is_right:
        notes.append(client.set_type.get(process.prediction_type, NOT_SET))
    if has_zero and not tells_zero:
        notes.append(client.set_zero_snr or NOT_SET)
    if has_zero:
        notes.append(client.scheduler)
    values = values_of(process)
    return [note.format(**values) for note in dict.fromkeys(notes) if note]


def values_of(process: Process) -> dict[str, str]:
    """Returns what stands in braces in the texts of a client."""
    settings = diffusers_settings(process).items()
    return {
        "sampling": {"epsilon": "eps"}.get(process.prediction_type, process.prediction_type),
        "prediction": process.prediction_type,
        "zsnr": str(process.schedule.is_zero_terminal_snr).lower(),
        "scheduler": ", ".join(f"{name}={value!r}" for name, value in settings),
    }


def client_facts(process: Process, architecture: Architecture) -> list[str]:
    """Lists the notes of a folder's card on other clients."""
    if architecture.kind not in KNOWN_KINDS:
        return ["They do not know this UNet. Use diffusers, as above."]
    if not has_sd_betas(process):
        return [OWN_BETAS]
    if reason := not_carried(process):
        return [f"They have no such model: {reason}. Use diffusers, as above."]
    return [
        "They take single files: `blackpoint export checkpoint=THIS_FOLDER "
        "output=NAME.safetensors` writes one, with what tells them, and this list beside it.",
        *(
            f"**{client.name}** {client.version}: "
            + " ".join(client_notes(client, process, architecture))
            + f" ({client.evidence})"
            for client in CLIENTS
        ),
    ]


def not_carried(process: Process) -> str | None:
    """Names what of a process no single file tells any client; None where it tells all."""
    if process.prediction_type not in LDM_TYPES:
        return "it predicts the sample, which no sign of a single file says"
    if not has_sd_betas(process):
        return (
            "its betas are its own (a resolution shift, or another scheme), and a single file says "
            "no more than zero terminal SNR or not: every client, this one too, would sample it "
            "with Stable Diffusion's noise"
        )
    if reason := process.incompatibility():
        return reason
    return None


def diffusers_settings(process: Process) -> dict[str, Any]:
    """Returns what a diffusers scheduler must be told after `from_single_file`."""
    config = process.to_diffusers()
    names = (
        *("prediction_type", "rescale_betas_zero_snr", "timestep_spacing", "set_alpha_to_one"),
        *("steps_offset", "clip_sample"),
    )
    return {name: config[name] for name in names}


def as_carried(process: Process) -> Process:
    """Returns the process with Stable Diffusion's own betas, which readers of a file take."""
    schedule = NoiseSchedule.scaled_linear()
    if process.schedule.is_zero_terminal_snr:
        schedule = schedule.zero_terminal_snr()
    return replace(process, schedule=schedule, scheme={})


def has_sd_betas(process: Process) -> bool:
    """Whether the betas are Stable Diffusion's, as published or rescaled to zero terminal SNR.

    Other clients have these two in their code and no others.
    """
    published = NoiseSchedule.scaled_linear()
    return any(map(process.schedule.is_close, (published, published.zero_terminal_snr())))
