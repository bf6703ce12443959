"""What tells a single file's prediction type and zero terminal SNR, since no config goes with it.

In this order: what the user says; the empty tensors v_pred and ztsnr, as ComfyUI, OneTrainer and
this package write them; ModelSpec metadata (Stability-AI/ModelSpec 1.0.1, and ComfyUI's
modelspec.predict_key); NAME.yaml beside the file, of latent-diffusion or, for SDXL, of
generative-models; for SD 2.x the statistic by which ComfyUI and Forge know v; SD 1.x and XL were
published with epsilon.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from yaml import YAMLError

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.single_file_contents import V_MARKER
from blackpoint.sampling.choices import PredictionType

STATISTIC = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
"""The bias whose standard deviation is above V_STATISTIC in SD 2.x with v-prediction."""
V_STATISTIC = 0.09
MODELSPEC_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
ARCHITECTURE = "modelspec.architecture"
OF_ARCHITECTURE: dict[str, PredictionType] = {
    "stable-diffusion-v2-768-v": "v_prediction",
    "stable-diffusion-v2-512": "epsilon",
}
WORDS: dict[str, PredictionType] = {
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "vpred": "v_prediction",
    "v_pred": "v_prediction",
    "epsilon": "epsilon",
    "eps": "epsilon",
    "x0": "sample",
    "sample": "sample",
}
PARAMETERIZATIONS: dict[str, PredictionType] = {
    "v": "v_prediction",
    "eps": "epsilon",
    "x0": "sample",
}
SCALINGS: dict[str, PredictionType] = {"VScaling": "v_prediction", "EpsScaling": "epsilon"}
"""Classes of generative-models' denoiser_scaling, which tell what SDXL predicts."""
CHOICE = "single_file.prediction_type=v_prediction or single_file.prediction_type=epsilon"


@dataclass(frozen=True)
class Evidence:
    """What a UNet predicts, and what says so."""

    prediction_type: PredictionType
    source: str


def prediction_of(
    path: Path,
    keys: Iterable[str],
    metadata: Mapping[str, str],
    is_sd2: bool,
    said: PredictionType | None,
    tensor: Callable[[str], Tensor],
    is_xl: bool = False,
) -> Evidence | None:
    """Returns the first evidence, by the order above; None for an SD 2.x that nothing tells.

    `tensor` reads a weight of the file.
    """
    keys = set(keys)
    if said is not None:
        return Evidence(said, f"single_file.prediction_type={said}")
    if V_MARKER in keys:
        return Evidence("v_prediction", f"its key {V_MARKER}")
    found = _of_metadata(path, metadata) or _of_yaml(path.with_suffix(".yaml"))
    if found is not None:
        return found
    if not is_sd2:
        name = f"Stable Diffusion {'XL' if is_xl else '1.x'}"
        return Evidence("epsilon", f"{name} as published; the file says nothing")
    if STATISTIC in keys:
        deviation = tensor(STATISTIC).float().std(unbiased=False).item()
        if deviation > V_STATISTIC:
            return Evidence(
                "v_prediction",
                f"the statistic of ComfyUI and Forge ({deviation:.3g} is above {V_STATISTIC})",
            )
    return None


def undecided_error(path: Path) -> UserError:
    """Returns the error for an SD 2.x file of which nothing tells what its UNet predicts."""
    return UserError(
        f"checkpoint={path} is a Stable Diffusion 2.x, of which there are both kinds, and nothing "
        f"tells whether its UNet predicts v or epsilon; set {CHOICE} (the models of 768 px predict "
        "v, those of 512 px, called base, epsilon)"
    )


def _of_metadata(path: Path, metadata: Mapping[str, str]) -> Evidence | None:
    for key in MODELSPEC_KEYS:
        if word := metadata.get(key, "").strip().lower():
            if word not in WORDS:
                raise UserError(
                    f"checkpoint={path}: {key}={word!r:.40} in its metadata is no prediction type "
                    f"that is known here; set {CHOICE}"
                )
            return Evidence(WORDS[word], f"{key} in its metadata")
    name = metadata.get(ARCHITECTURE, "").strip().lower()
    if name in OF_ARCHITECTURE:
        return Evidence(OF_ARCHITECTURE[name], f"{ARCHITECTURE}={name} in its metadata")
    return None


def _of_yaml(path: Path) -> Evidence | None:
    """Reads the config of latent-diffusion or generative-models; None where there is none, or a
    YAML of something else."""
    if not path.is_file():
        return None
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} beside the checkpoint can't be read as YAML ({reason}); mend it, or remove it "
            f"and set {CHOICE}"
        ) from error
    parameters = _at(config, "model", "params")
    if not isinstance(parameters, dict):
        return None
    if "denoiser_config" in parameters:
        places = ("denoiser_config", "params", "scaling_config", "target")
        name = str(_at(parameters, *places)).rpartition(".")[2]
        if name not in SCALINGS:
            raise UserError(
                f"{path}: scaling_config.target={name!r:.60} is none of {', '.join(SCALINGS)}; "
                f"correct it, or set {CHOICE}"
            )
        return Evidence(SCALINGS[name], f"{path.name} beside it")
    word = str(parameters.get("parameterization", "eps"))  # the default of latent-diffusion
    if word not in PARAMETERIZATIONS:
        raise UserError(
            f"{path}: parameterization={word!r:.40} is none of {', '.join(PARAMETERIZATIONS)}; "
            f"correct it, or set {CHOICE}"
        )
    return Evidence(PARAMETERIZATIONS[word], f"{path.name} beside it")


def _at(config: Any, *keys: str) -> Any:
    """Returns what stands in a mapping of mappings; None where a key is missing."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config
