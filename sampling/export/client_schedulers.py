"""Notes of an export's card on diffusers' schedulers (diffusers 0.42): one fact each.

Every function takes the process and returns a statement, or "" where it is not so.
tests/test_card_schedulers.py runs the installed schedulers on each.
"""

from collections.abc import Sequence

import numpy as np
from diffusers import DDIMScheduler

from blackpoint.sampling.process import Process

RIGHT_AT_ZERO_SNR = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "DDPMScheduler",
)
"""diffusers schedulers that act on `rescale_betas_zero_snr` and are for any model."""

DROP_ZERO_SNR = (
    "HeunDiscreteScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
)
"""diffusers schedulers that drop `rescale_betas_zero_snr` without a word."""

MOST_STEPS = 200
"""The card speaks of numbers of steps up to this."""


def scheduler_facts(process: Process) -> list[str]:
    """Lists the notes on schedulers, "" where one does not apply."""
    return [
        incompatibility_note(process),
        keep_zero_snr(process),
        drop_zero_snr(process),
        ddim_leaves_the_list(process),
        surplus_timestep(process),
        ancestral_ddim(process),
        final_alpha_bar(process),
    ]


def incompatibility_note(process: Process) -> str:
    """A process can be allowed that cannot work."""
    reason = process.incompatibility()
    return f"This model cannot be sampled right: {reason}." if reason else ""


def keep_zero_snr(process: Process) -> str:
    """Some schedulers act on the flag."""
    if not process.schedule.is_zero_terminal_snr or process.incompatibility():
        return ""
    unknown = ["EulerAncestralDiscreteScheduler"] if process.prediction_type == "sample" else []
    names = ", ".join(f"`{name}`" for name in RIGHT_AT_ZERO_SNR if name not in unknown)
    return f"Take one of these, which keep the zero terminal SNR: {names}."


def drop_zero_snr(process: Process) -> str:
    """The others drop the flag; the consequence depends on how the betas are written."""
    if not process.schedule.is_zero_terminal_snr:
        return ""
    names = ", ".join(name.removesuffix("Scheduler") for name in DROP_ZERO_SNR)
    consequence = (
        "compute NaN with this model's `trained_betas`, or stop with an error"
        if process.to_diffusers()["trained_betas"] is not None
        else "sample other noise levels than this model was trained on"
    )
    return (
        f"Not these: {names}. They drop `rescale_betas_zero_snr` silently and {consequence}. (LCM "
        "and TCD keep it, but are for distilled models.)"
    )


def ddim_leaves_the_list(process: Process) -> str:
    """DDIM steps by T // S whatever its list says."""
    total = process.schedule.num_steps
    step = f"it steps by {total} // num_inference_steps"
    match process.timestep_spacing:
        case "trailing":
            even = listed([steps for steps in range(10, 101) if total % steps == 0])
            return (
                f"DDIM: take a number of steps that divides {total} ({even}). With another {step}, "
                "which is not its timestep list, and can end before all noise is gone. The other "
                "schedulers follow the list."
            )
        case "linspace":
            return f"Not DDIM: {step}, which is not its timestep list. The others follow the list."
        case _:
            return ""


def surplus_timestep(process: Process) -> str:
    """Rounding appends a timestep to some trailing lists."""
    steps = surplus_steps(process)
    if not steps:
        return ""
    return (
        f"DDIM and DDPM: not {listed(steps)} steps. There diffusers' list has a surplus timestep "
        "-1, which they read as the noisiest: the image is lost."
    )


def surplus_steps(process: Process, most: int = MOST_STEPS) -> list[int]:
    """Returns the numbers of steps whose trailing list of diffusers ends with timestep -1."""
    if process.timestep_spacing != "trailing":
        return []
    total = process.schedule.num_steps
    counts = range(1, min(most, total) + 1)
    return [steps for steps in counts if len(np.arange(total, 0, -total / steps)) > steps]


def ancestral_ddim(process: Process) -> str:
    """DDIM with eta 1 takes the root of a rounding error, which differs between processors."""
    if not process.schedule.is_zero_terminal_snr or process.timestep_spacing == "leading":
        return ""
    steps = nan_steps(process)
    here = f"; where this was written, at {listed(steps)} steps" if steps else ""
    return (
        "DDIM with eta=1 gives NaN at some numbers of steps, on each processor at others: a "
        f"rounding error makes a variance of its first step negative{here} ({len(steps)} of those "
        f"up to {MOST_STEPS}). Take `DDPMScheduler`, or eta at most 0.99."
    )


def nan_steps(process: Process, most: int = MOST_STEPS) -> list[int]:
    """Returns the numbers of steps where diffusers' DDIM with eta 1 is NaN on this processor.

    Its first step goes from alpha_bar_t = 0 to alpha_bar_u with variance v = 1 - alpha_bar_u, and
    takes the root of v - sqrt(v)^2, which float32 rounds below 0 for some v. At any other step the
    variance is truly less than v.
    """
    scheduler = DDIMScheduler.from_config(process.to_diffusers())
    total, nan = process.schedule.num_steps, []
    first_number = 2 if process.timestep_spacing == "linspace" else 1  # linspace(1) is t = 0
    for steps in range(first_number, min(most, total) + 1):
        level = total - 1 - total // steps
        bar = scheduler.alphas_cumprod[level] if level >= 0 else scheduler.final_alpha_cumprod
        if 1 - bar - ((1 - bar) ** 0.5) ** 2 < 0:
            nan.append(steps)
    return nan


def final_alpha_bar(process: Process) -> str:
    """DDIM alone has `set_alpha_to_one`."""
    if process.set_alpha_to_one:
        return ""
    sigma = process.schedule.sigma[0].item()
    return (
        f"`set_alpha_to_one` is false: DDIM ends at the first noise level (sigma {sigma:.2g}); "
        "Euler, DPM++ and UniPC end at clean data."
    )


def listed(numbers: Sequence[int]) -> str:
    """Writes increasing numbers as a list, three or more in a row as a range."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    )
