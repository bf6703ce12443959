"""The process of a checkpoint: schedule, prediction type, timestep spacing, final alpha_bar.

It travels inside the checkpoint, as a diffusers scheduler_config, and nothing that samples takes it
from elsewhere.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from sampling.errors import UserError
from sampling.prediction import PredictionType
from sampling.samplers import END_AT_FINAL_ALPHA_BAR, SamplingGrid
from sampling.schedule import NoiseSchedule, Spacing

log = logging.getLogger(__name__)

EXPORT_TOLERANCE = 1e-5
SCHEME_KEYS = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")


@dataclass(frozen=True)
class Process:
    """What the network was trained to predict, and on which noise."""

    schedule: NoiseSchedule
    prediction_type: PredictionType = "v_prediction"
    timestep_spacing: Spacing = "trailing"
    steps_offset: int = 1
    scheme: dict[str, Any] = field(default_factory=dict)  # the named betas it started from
    set_alpha_to_one: bool = True
    """Whether DDIM ends at clean data, alpha_bar 1, rather than at the schedule's first alpha_bar;
    diffusers' name and default. Stable Diffusion 1 and 2 were published with False."""

    def unsound(self) -> str | None:
        """Names what cannot work at zero terminal SNR, with the remedy; None where all is well."""
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
        reason = self.unsound()
        if reason and not allow_unsound:
            raise UserError(f"{reason}. allow_unsound=true runs it all the same, for a comparison")

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
        found = torch.cumprod(1 - self.schedule.betas.float(), 0)[:-1].double()
        error = ((found - exact) / exact).abs().max().item()
        if not (error <= EXPORT_TOLERANCE and found[0] < 1 and (found.diff() < 0).all()):
            raise UserError(
                "this noise schedule can't be exported: diffusers multiplies betas in float32, and "
                f"its alpha_bar would be {error:.1g} off or stand still; choose a shift nearer to "
                "1 or narrower log SNR bounds"
            )

    def timesteps(self, num_steps: int) -> list[int]:
        """Returns the sampling timesteps of this checkpoint, noisiest first."""
        return self.schedule.timesteps(num_steps, self.timestep_spacing, self.steps_offset)

    def final_alpha_bar(self, sampler: str) -> float:
        """Returns the alpha_bar that a sampler's last step goes to."""
        if self.set_alpha_to_one or sampler not in END_AT_FINAL_ALPHA_BAR:
            return 1.0
        return self.schedule.alpha_bar[0].item()

    def grid(self, num_steps: int, sampler: str = "ddim") -> SamplingGrid:
        """Returns the noise levels that a sampler of this checkpoint walks."""
        timesteps = self.timesteps(num_steps)
        return SamplingGrid.of(self.schedule, timesteps, self.final_alpha_bar(sampler))

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "Process":
        """Reads a scheduler_config of any diffusers scheduler class.

        A key that is absent means what it means to DDIMScheduler.from_config, whatever the class.
        """
        if "timestep_scaling" in config:
            raise UserError(
                "the scheduler config has the key timestep_scaling, which diffusers ignores "
                "silently; the right name is timestep_spacing: rename it in scheduler_config.json"
            )
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in ("v_prediction", "epsilon", "sample"):
            raise UserError(
                f"prediction_type={prediction_type!r} in the scheduler config is not one of "
                "v_prediction, epsilon, sample"
            )
        spacing = config.get("timestep_spacing", "leading")
        if spacing not in ("trailing", "leading", "linspace"):
            raise UserError(
                f"timestep_spacing={spacing!r} in the scheduler config is not one of "
                "trailing, leading, linspace"
            )
        if config.get("final_sigmas_type", "zero") != "zero":
            log.warning(
                "note: final_sigmas_type=%s in the scheduler config is not kept: every sampler "
                "but ddim ends at clean data, as with zero",
                config["final_sigmas_type"],
            )
        return cls(
            schedule=NoiseSchedule.from_diffusers(config),
            prediction_type=cast(PredictionType, prediction_type),
            timestep_spacing=cast(Spacing, spacing),
            # StableDiffusionPipeline corrects an older config's 0 to 1, with a warning
            steps_offset=max(1, int(config.get("steps_offset", 1))),
            scheme={key: config[key] for key in SCHEME_KEYS if key in config},
            set_alpha_to_one=bool(config.get("set_alpha_to_one", True)),
        )

    def to_diffusers(self) -> dict[str, Any]:
        """Writes a complete DDIMScheduler config, with trained_betas where no scheme is equal."""
        config: dict[str, Any] = {
            "_class_name": "DDIMScheduler",
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
