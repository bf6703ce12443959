"""The process that a run trains to: its base's, changed as the config says."""

import dataclasses

from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.weighting import check_sound


def fine_tuned_process(config: TrainConfig, base: Process) -> Process:
    """Returns the schedule, prediction type and spacing that the fine-tuned model will carry."""
    num_steps = base.schedule.num_steps
    scheme = dict(base.scheme)
    match config.schedule.betas:
        case "checkpoint":
            schedule = base.schedule
        case "scaled_linear":
            schedule = NoiseSchedule.scaled_linear(num_steps=num_steps)
            scheme = {"beta_schedule": "scaled_linear"}
        case "linear":
            schedule = NoiseSchedule.linear(num_steps=num_steps)
            scheme = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
        case "cosine_discrete":
            schedule = NoiseSchedule.cosine_discrete(num_steps=num_steps)
            scheme = {"beta_schedule": "squaredcos_cap_v2"}
        case "cosine_continuous":
            low, high = config.schedule.log_snr_min, config.schedule.log_snr_max
            assert low is not None and high is not None
            schedule = NoiseSchedule.cosine_continuous(low, high, num_steps)
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
