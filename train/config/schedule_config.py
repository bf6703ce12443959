"""The noise schedule that a model is fine-tuned to, as its config says it; free of torch.

Order: betas, then the rescale to zero terminal SNR, then the shift (train/target_process.py).
"""

from dataclasses import dataclass, field
from typing import Literal

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.rules import check_ranges
from blackpoint.sampling.choices import Spacing

Betas = Literal["checkpoint", "scaled_linear", "linear", "cosine_discrete", "cosine_continuous"]


@dataclass
class ShiftConfig:
    """The shift of log SNR by 2 log(base / resolution) (Hoogeboom et al. 2023, section 3.1)."""

    base_resolution: int | None = None
    """Side, in px or in latents, that the schedule was made for; the lower, the noisier every t.
    Not set: no shift."""
    resolution: int | str = "auto"
    """Side that is trained, in the same unit; auto: data.resolution, in px."""
    base_at_start: int | None = None
    """Base at t = 0, from which it moves evenly (in its logarithm) to base_resolution at the last
    timestep. The paper's interpolation, t low + (1 - t) high, has the higher base here and the
    lower as base_resolution (256 and 32 at 512 px). Not set: one base at every t."""

    def __post_init__(self) -> None:
        check_ranges(self, "schedule.shift.", base_resolution=">= 1", base_at_start=">= 1")
        if isinstance(self.resolution, int):
            check_ranges(self, "schedule.shift.", resolution=">= 1")
        elif self.resolution != "auto":
            raise UserError(
                f"schedule.shift.resolution={self.resolution}: is neither a number nor auto"
            )
        if self.base_resolution is None and (
            self.base_at_start is not None or self.resolution != "auto"
        ):
            raise UserError(
                "schedule.shift.base_resolution is not set, so nothing would be shifted; it is the "
                "resolution that the schedule was made for, such as 512 (px) for SD 1.5"
            )


@dataclass
class ScheduleConfig:
    """The noise schedule that the model is fine-tuned to; it travels in every checkpoint."""

    betas: Betas = "checkpoint"
    """Where the betas come from: the checkpoint's own, or a named scheme with SD's constants."""
    log_snr_min: float | None = None
    """Lowest log SNR of cosine_continuous, at the last timestep; the paper has -15."""
    log_snr_max: float | None = None
    """Highest log SNR of cosine_continuous, at t = 0; the paper has 15."""
    zero_terminal_snr: bool = True
    """Rescale the betas so that the last timestep is pure noise (Lin et al. 2023, Algorithm 1)."""
    shift: ShiftConfig = field(default_factory=ShiftConfig)
    """Shift to another resolution, after the rescale."""
    timestep_spacing: Spacing = "trailing"
    """Timesteps that samplers of the result visit; trailing starts at the last one."""

    def __post_init__(self) -> None:
        bounds = (self.log_snr_min, self.log_snr_max)
        if self.betas == "cosine_continuous" and None in bounds:
            raise UserError(
                "schedule.betas=cosine_continuous needs schedule.log_snr_min and "
                "schedule.log_snr_max: without bounds its ends are SNR 0 and infinity; the paper "
                "has -15 and 15"
            )
        if self.betas != "cosine_continuous" and bounds != (None, None):
            raise UserError(
                "schedule.log_snr_min and log_snr_max are bounds of schedule.betas="
                f"cosine_continuous; {self.betas} has none: drop them"
            )
