"""The process that a run trains to: its base's, changed as the config says."""

import dataclasses
from typing import Any

from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import SD_BETA_END, SD_BETA_START, NoiseSchedule
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.config.schedule_config import ScheduleConfig
from blackpoint.train.weighting import check_sound

SCHEMES: dict[str, dict[str, Any]] = {
    "scaled_linear": {
        "beta_schedule": "scaled_linear",
        "beta_start": SD_BETA_START,
        "beta_end": SD_BETA_END,
    },
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine_discrete": {"beta_schedule": "squaredcos_cap_v2"},
}
"""Named betas, with their constants, as diffusers' keys."""


def fine_tuned_process(config: TrainConfig, base: Process) -> Process:
    """Returns the schedule, prediction type and spacing that the fine-tuned model will carry."""
    schedule, scheme = _schedule_of(config.schedule, base)
    if config.schedule.zero_terminal_snr:
        schedule = schedule.zero_terminal_snr()
    shift = config.schedule.shift
    if shift.base_resolution is not None:
        resolution = config.data.resolution if shift.resolution == "auto" else shift.resolution
        schedule = schedule.shifted(shift.base_resolution, float(resolution), shift.base_at_start)
    process = dataclasses.replace(
        base,
        schedule=schedule,
        prediction_type=config.loss.prediction_type,
        timestep_spacing=config.schedule.timestep_spacing,
        steps_offset=1,
        scheme=scheme,
        set_alpha_to_one=True,  # the last step ends clean
        omits_cleanest=False,  # and is at the cleanest timestep of the list
    )
    # Again, now of the schedule itself: a base may be zero-terminal where the config is not.
    process.check_sound(config.allow_unsound)
    process.check_exportable()
    check_sound(config.loss, schedule, config.allow_unsound)
    return process


def _schedule_of(config: ScheduleConfig, base: Process) -> tuple[NoiseSchedule, dict[str, Any]]:
    """Returns the schedule that config.betas names, and its keys in a diffusers config."""
    num_steps = base.schedule.num_steps
    if config.betas in SCHEMES:
        scheme = SCHEMES[config.betas]
        return NoiseSchedule.from_diffusers(scheme | {"num_train_timesteps": num_steps}), scheme
    if config.betas == "checkpoint":
        return base.schedule, dict(base.scheme)
    low, high = config.log_snr_min, config.log_snr_max
    assert config.betas == "cosine_continuous" and low is not None and high is not None
    return NoiseSchedule.cosine_continuous(low, high, num_steps), dict(base.scheme)
