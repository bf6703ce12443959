"""Reads a diffusers scheduler_config.json as the scheduler class that it names would.

A key that is absent has the default of that class in the installed diffusers: Euler and DPM++ take
timestep_spacing=linspace, Heun its own betas. A class that is no process of ours (flow matching,
consistency models, EDM) is refused by name, and so is a key that its class would pass over though
it decides on the noise.
"""

import inspect
import logging
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.rules import is_number, require

log = logging.getLogger(__name__)

ON_THE_LIST = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "LMSDiscreteScheduler",
)
"""Classes that visit S timesteps, in leading and linspace down to the cleanest."""
ABOVE_THE_CLEANEST = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)
"""Classes that make leading and linspace lists of S + 1 timesteps and leave the cleanest out."""
WHERE_THE_CLASS_IS = "as scheduler in model_index.json and as _class_name in scheduler_config.json"
SAME_DEFAULTS = {"DPMSolverSDEScheduler": "KDPM2AncestralDiscreteScheduler"}
"""Classes whose keys can't be asked for without another package (torchsde), and one with the same
defaults."""
ALWAYS_LINSPACE = ("DPMSolverSinglestepScheduler",)
MAX_TRAIN_TIMESTEPS = 1_000_000
SPACINGS = ("trailing", "leading", "linspace")
PREDICTION_TYPES = ("v_prediction", "epsilon", "sample")
PLAIN: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "thresholding": False,
    "lambda_min_clipped": -math.inf,
    "final_sigmas_type": "zero",
}
"""Keys of a solver that samplers do not follow, and the value that changes nothing."""
OTHER_PROCESS = {"use_flow_sigmas": True, "timestep_type": "continuous"}
"""Values that make another process of a class that is known here."""


def read_scheduler_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns every key of the class that `config` names, `_class_name` among them; checked.

    Without `_class_name` it is DDIMScheduler. Raises UserError naming the key or the class.
    """
    name = class_name_of(config)
    defaults = _defaults(name)
    written = {key: value for key, value in config.items() if not key.startswith("_")}
    if "timestep_scaling" in written:
        raise UserError(
            "the scheduler config has the key timestep_scaling, which diffusers ignores "
            "silently; the right name is timestep_spacing: rename it in scheduler_config.json"
        )
    if written.get("steps_offset", 0) is None:
        del written["steps_offset"]
    settings = {**defaults, **written, "_class_name": name}
    total = settings["num_train_timesteps"]
    if isinstance(total, float) and total.is_integer():
        settings["num_train_timesteps"] = int(total)
    if name in ALWAYS_LINSPACE:
        settings["timestep_spacing"] = "linspace"
    _check_values(settings)
    if settings.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in defaults:
        raise UserError(
            f"rescale_betas_zero_snr=true in the scheduler config is ignored by {name}, so that it "
            "is not known on which noise the model was trained; if it was on zero terminal SNR, "
            f"name DDIMScheduler {WHERE_THE_CLASS_IS}, else write false in scheduler_config.json"
        )
    for key, value in OTHER_PROCESS.items():
        if key in defaults and settings[key] == value:
            raise UserError(
                f"{key}={value} in the scheduler config makes another process than noise by betas "
                "on whole timesteps; the checkpoint cannot be used here"
            )
    _tell(settings, {key: settings[key] for key in PLAIN if key in defaults}, written)
    return settings


def class_name_of(config: Mapping[str, Any]) -> str:
    """Returns the diffusers class that a scheduler config names; UserError for one not taken."""
    written = config.get("_class_name", "DDIMScheduler")
    name = str(written).removeprefix("Flax")
    if name not in (*ON_THE_LIST, *ABOVE_THE_CLEANEST):
        raise UserError(
            f"the scheduler config is of {written}, which is none of the classes that are "
            "read here (DDIMScheduler, EulerDiscreteScheduler, ...); weights that were trained on "
            f"noise by betas can have one of those {WHERE_THE_CLASS_IS}; all others cannot be used "
            "here"
        )
    return name


@cache
def _defaults(name: str) -> dict[str, Any]:
    """Returns the keys of a diffusers scheduler class with their defaults."""
    import diffusers  # seconds, and configs that import this module need none of it

    kind = getattr(diffusers, SAME_DEFAULTS.get(name, name))
    parameters = inspect.signature(kind.__init__).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key != "self"}


def _check_values(settings: Mapping[str, Any]) -> None:
    """Raises UserError for a value that is not the number, list or word it should be."""
    total, offset = settings["num_train_timesteps"], settings.get("steps_offset", 0)
    is_total = is_number(total, int) and 2 <= total <= MAX_TRAIN_TIMESTEPS
    whole = f"a whole number from 2 to {MAX_TRAIN_TIMESTEPS}"
    _require(is_total, "num_train_timesteps", total, whole)
    for key in ("beta_start", "beta_end"):
        is_beta = is_number(settings[key]) and 0 < settings[key] <= 1
        _require(is_beta, key, settings[key], "a number above 0 and up to 1")
    is_offset = is_number(offset, int) and offset >= 0
    _require(is_offset, "steps_offset", offset, "a whole number from 0 on")
    for key in ("rescale_betas_zero_snr", "set_alpha_to_one"):
        value = settings.get(key, False)
        _require(isinstance(value, bool), key, value, "true or false")
    betas = settings["trained_betas"]
    if betas is not None:
        are_numbers = isinstance(betas, list | tuple) and all(map(is_number, betas))
        _require(are_numbers, "trained_betas", betas, "null or a list of numbers")
        many = f"a list of num_train_timesteps={total} numbers"
        _require(len(betas) == total, "trained_betas", betas, many)
    for key, words in (("prediction_type", PREDICTION_TYPES), ("timestep_spacing", SPACINGS)):
        if settings[key] not in words:
            raise UserError(
                f"{key}={settings[key]!r} in the scheduler config is not one of {', '.join(words)}"
            )


def _require(holds: bool, key: str, value: Any, rule: str) -> None:
    remedy = "correct it in scheduler_config.json (numbers stand there without quotes)"
    require(holds, key, value, f"{rule}; {remedy}", "in the scheduler config")


def _tell(
    settings: Mapping[str, Any], solver: Mapping[str, Any], written: Mapping[str, Any]
) -> None:
    """Notes keys of the config that are not followed, and a spacing that is not the one written."""
    spacing = settings["timestep_spacing"]
    if spacing != written.get("timestep_spacing", "leading"):
        log.warning(
            "note: the scheduler config is of %s, which takes timestep_spacing=%s",
            settings["_class_name"],
            spacing,
        )
    for key, value in solver.items():
        if value == PLAIN[key] or (value is None and PLAIN[key] is False):
            continue
        if key == "final_sigmas_type":
            meaning = "every sampler but ddim ends at clean data, as with zero"
        else:
            meaning = f"samplers work as with {PLAIN[key]}".replace("False", "false")
        log.warning("note: %s=%s in the scheduler config is not kept: %s", key, value, meaning)
