"""The process of a checkpoint: schedule, prediction type, timestep spacing, final alpha_bar.

It travels inside the checkpoint, as a diffusers scheduler_config, and nothing that samples takes it
from elsewhere.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.scheduler_config import (
    ABOVE_THE_CLEANEST,
    read_scheduler_config,
)
from blackpoint.sampling.grid import Prediction, SamplingGrid
from blackpoint.sampling.prediction import PredictionType, to_eps, to_x0
from blackpoint.sampling.samplers import SAMPLERS
from blackpoint.sampling.schedule import NoiseSchedule, Spacing

log = logging.getLogger(__name__)

EXPORT_TOLERANCE = 1e-5
SCHEME_KEYS = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")


@dataclass(frozen=True)
class Process:
    """The prediction type and noise schedule that a network was trained with."""

    schedule: NoiseSchedule
    prediction_type: PredictionType = "v_prediction"
    timestep_spacing: Spacing = "trailing"
    steps_offset: int = 1
    scheme: dict[str, Any] = field(default_factory=dict)  # the named betas it started from
    set_alpha_to_one: bool = True
    """Whether DDIM ends at clean data, alpha_bar 1, rather than at the schedule's first alpha_bar;
    diffusers' name and default. Stable Diffusion 1 and 2 were published with False."""
    omits_cleanest: bool = False
    """Whether the leading or linspace list of S timesteps of a multistep sampler is one of S + 1
    without the cleanest, as such solvers of diffusers (DPM++, UniPC, DEIS, SA) make it."""

    @property
    def noisiest(self) -> int:
        """The last timestep, T - 1."""
        return self.schedule.num_steps - 1

    def incompatibility(self) -> str | None:
        """Names a conflict with zero terminal SNR, with the remedy; None without one."""
        if not self.schedule.is_zero_terminal_snr:
            return None
        if self.prediction_type == "epsilon":
            return (
                "prediction_type=epsilon with zero terminal SNR: x0 = (x_t - sigma eps) / alpha "
                "divides by 0 at the last timestep; use v_prediction (or sample)"
            )
        if self.timestep_spacing == "leading":
            return (
                "timestep_spacing=leading with zero terminal SNR: sampling would never visit the "
                "last timestep, the one that the rescale is for; use trailing"
            )
        return None

    def check_sound(self, allow_unsound: bool = False) -> None:
        """Raises UserError for an unsound process unless it is allowed."""
        reason = self.incompatibility()
        if reason and not allow_unsound:
            raise UserError(f"{reason}; allow_unsound=true runs it all the same, for a comparison")

    def not_exported(self) -> str | None:
        """Says why no export passes its comparison with diffusers; None where one does."""
        if self.schedule.is_zero_terminal_snr and self.prediction_type == "epsilon":
            return (
                "epsilon-prediction with zero terminal SNR is not exported: x0 is a division by 0 "
                "at the last timestep, in diffusers too, and the comparison with it would fail"
            )
        return None

    def check_exportable(self) -> None:
        """Raises UserError where diffusers, which multiplies betas in float32, finds other noise.

        That is alpha_bar more than 1e-5 off, relative, or not falling: steps without noise. At
        T - 1 diffusers has a stand-in of its own.
        """
        exact = self.schedule.alpha_bar[:-1]
        rounded = torch.cumprod(1 - self.schedule.betas.float(), 0)[:-1].double()
        error = ((rounded - exact) / exact).abs().max().item()
        if not (error <= EXPORT_TOLERANCE and rounded[0] < 1 and (rounded.diff() < 0).all()):
            raise UserError(
                "this noise schedule can't be exported: diffusers multiplies betas in float32, and "
                f"its alpha_bar would be {error:.1g} off or stand still; choose a shift nearer to "
                "1 or narrower log SNR bounds"
            )

    def timesteps(self, num_steps: int, sampler: str = "ddim") -> list[int]:
        """Returns the timesteps that a sampler of this checkpoint visits, noisiest first."""
        spacing, offset = self.timestep_spacing, self.steps_offset
        omits = self._lists_as_multistep() and SAMPLERS[sampler].is_multistep
        if omits and num_steps < self.schedule.num_steps:
            return self.schedule.timesteps(num_steps + 1, spacing, offset)[:-1]
        return self.schedule.timesteps(num_steps, spacing, offset)

    def _lists_as_multistep(self) -> bool:
        """Whether the list of a multistep solver is another than that of all other classes."""
        return self.omits_cleanest and self.timestep_spacing != "trailing"

    def final_alpha_bar(self, sampler: str) -> float:
        """Returns the alpha_bar that a sampler's last step goes to."""
        if self.set_alpha_to_one or not SAMPLERS[sampler].ends_at_final_alpha_bar:
            return 1.0
        return self.schedule.alpha_bar[0].item()

    def grid(self, num_steps: int, sampler: str = "ddim") -> SamplingGrid:
        """Returns the noise levels that a sampler of this checkpoint walks."""
        timesteps = self.timesteps(num_steps, sampler)
        return SamplingGrid.of(self.schedule, timesteps, self.final_alpha_bar(sampler))

    def reader(self) -> Callable[[Tensor, Tensor, int], Prediction]:
        """Returns the function (network output, x_t, t) -> x0 and eps."""
        kind = self.prediction_type
        alphas, sigmas = self.schedule.alpha.tolist(), self.schedule.sigma.tolist()

        def read(output: Tensor, x_t: Tensor, t: int) -> Prediction:
            alpha, sigma = alphas[t], sigmas[t]
            return Prediction(
                to_x0(kind, output, x_t, alpha, sigma), to_eps(kind, output, x_t, alpha, sigma)
            )

        return read

    def respaced(self, spacing: Spacing | None) -> "Process":
        """Returns it with other sampling timesteps; None: its own."""
        return replace(self, timestep_spacing=spacing or self.timestep_spacing)

    def respacing_note(self, spacing: Spacing | None) -> str | None:
        """Says that `respaced` gives other timesteps; None where it does not."""
        if spacing in (None, self.timestep_spacing):
            return None
        return (
            f"sampled with timestep_spacing={spacing}; the checkpoint says {self.timestep_spacing}"
        )

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any], is_xl: bool = False) -> "Process":
        """Reads a scheduler_config of any diffusers scheduler class that has such a process.

        A key that is absent means what it means to that class
        (sampling/checkpoints/scheduler_config.py). steps_offset is 1 whatever it says, as
        StableDiffusionPipeline makes it; StableDiffusionXLPipeline takes it as it is.
        """
        settings = read_scheduler_config(config)
        return cls(
            schedule=NoiseSchedule.from_diffusers(settings),
            prediction_type=cast(PredictionType, settings["prediction_type"]),
            timestep_spacing=cast(Spacing, settings["timestep_spacing"]),
            steps_offset=int(settings.get("steps_offset", 0)) if is_xl else 1,
            scheme={key: settings[key] for key in SCHEME_KEYS if key in config},
            set_alpha_to_one=settings.get("set_alpha_to_one", True),
            omits_cleanest=settings["_class_name"] in ABOVE_THE_CLEANEST,
        )

    @classmethod
    def of_checkpoint(
        cls, checkpoint: str | Path, config: Mapping[str, Any], is_xl: bool = False
    ) -> "Process":
        """Reads the scheduler config of a checkpoint, which errors name; notes an unsound one."""
        try:
            process = cls.from_diffusers(config, is_xl)
        except UserError as error:
            raise UserError(f"checkpoint={checkpoint}: {error}") from None
        if reason := process.incompatibility():
            log.warning("note: %s: %s", checkpoint, reason)
        return process

    def to_diffusers(self) -> dict[str, Any]:
        """Writes a complete scheduler config, with trained_betas where no scheme is equal.

        Of DDIMScheduler, or of DPM++ where that visits other timesteps.
        """
        multistep = self._lists_as_multistep()
        kind = "DPMSolverMultistepScheduler" if multistep else "DDIMScheduler"
        config: dict[str, Any] = {
            "_class_name": kind,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            **self.scheme,
            "clip_sample": False,
            "clip_sample_range": 1.0,
            "dynamic_thresholding_ratio": 0.995,
            "num_train_timesteps": self.schedule.num_steps,
            "prediction_type": self.prediction_type,
            "rescale_betas_zero_snr": self.schedule.is_zero_terminal_snr,
            "sample_max_value": 1.0,
            "set_alpha_to_one": self.set_alpha_to_one,
            "steps_offset": self.steps_offset,
            "thresholding": False,
            "timestep_spacing": self.timestep_spacing,
            "trained_betas": None,
        }
        scheme = NoiseSchedule.from_diffusers(config).alpha_bar
        if scheme.shape != self.schedule.alpha_bar.shape or not torch.allclose(
            scheme, self.schedule.alpha_bar, rtol=1e-9, atol=1e-12
        ):
            config["trained_betas"] = self.schedule.betas.tolist()
        return config
