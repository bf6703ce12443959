"""Noise schedules: alpha_bar over T discrete timesteps, in float64.

    x_t = alpha_t x0 + sigma_t eps,   alpha_t = sqrt(alpha_bar_t),   sigma_t = sqrt(1 - alpha_bar_t)

A schedule is the pair (alpha, sigma). The ratio sigma / alpha is never stored: it is infinite at
the last step of a zero-terminal-SNR schedule (Lin et al. 2023, arXiv 2305.08891).
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.choices import Spacing

SD_BETA_START, SD_BETA_END, SD_NUM_STEPS = 0.00085, 0.012, 1000


def rescale_zero_terminal_snr(betas: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Rescales betas so that alpha_bar at the last step is exactly 0 and the first is unchanged.

    Source: Lin et al. 2023, Algorithm 1. Idempotent. The last beta becomes 1.
    """
    alpha = torch.cumprod(1 - betas.double(), 0).sqrt()
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return _betas_of(alpha.square())


def _betas_of(alpha_bar: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """alpha_bar_t for t in [0, T), float64, decreasing within [0, 1)."""

    alpha_bar: Float[Tensor, " T"]

    def __post_init__(self) -> None:
        bar = self.alpha_bar
        if bar.ndim != 1 or bar.dtype != torch.float64 or len(bar) < 2:
            raise UserError("alpha_bar must be a float64 vector of at least 2 steps")
        falling = bool((bar.diff() < 0).all())
        if not (torch.isfinite(bar).all() and falling and 0 < bar[0] < 1 and bar[-1] >= 0):
            raise UserError(
                "betas do not make a noise schedule: alpha_bar = prod(1 - beta) must fall at every "
                "step and stay within [0, 1); each beta must lie in (0, 1), the last may be 1"
            )

    @classmethod
    def from_betas(cls, betas: Float[Tensor, " T"]) -> "NoiseSchedule":
        """Takes betas as they are; only the last may be 1 (zero terminal SNR)."""
        return cls(torch.cumprod(1 - torch.as_tensor(betas, dtype=torch.float64), 0))

    @classmethod
    def scaled_linear(
        cls,
        beta_start: float = SD_BETA_START,
        beta_end: float = SD_BETA_END,
        num_steps: int = SD_NUM_STEPS,
    ) -> "NoiseSchedule":
        """Stable Diffusion's: sqrt(beta) rises linearly."""
        root = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64)
        return cls.from_betas(root.square())

    @classmethod
    def linear(
        cls, beta_start: float = 1e-4, beta_end: float = 0.02, num_steps: int = SD_NUM_STEPS
    ) -> "NoiseSchedule":
        """Ho et al. 2020: beta rises linearly."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64))

    @classmethod
    def cosine_discrete(
        cls, num_steps: int = SD_NUM_STEPS, max_beta: float = 0.999
    ) -> "NoiseSchedule":
        """Nichol and Dhariwal 2021: alpha_bar(u) = cos^2((u + .008) / 1.008 pi / 2), u = t / T."""
        u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
        return cls.from_betas((1 - bar[1:] / bar[:-1]).clamp(max=max_beta))

    cosine = cosine_discrete

    @classmethod
    def cosine_continuous(
        cls, log_snr_min: int | float, log_snr_max: int | float, num_steps: int = SD_NUM_STEPS
    ) -> "NoiseSchedule":
        """Hoogeboom et al. 2023: log SNR(u) = -2 log tan(pi u / 2), between two bounds.

        The angle runs evenly from that of `log_snr_max` at t = 0 to that of `log_snr_min` at
        t = T - 1; without bounds its ends would be SNR infinity and 0.
        """
        if not -math.inf < log_snr_min < log_snr_max < math.inf:
            raise UserError(
                f"log SNR bounds {log_snr_min} to {log_snr_max}: cosine_continuous needs two "
                "finite ones, the lower first; -15 and 15 are the paper's"
            )
        first, last = (math.atan(math.exp(-bound / 2)) for bound in (log_snr_max, log_snr_min))
        angle = torch.linspace(first, last, num_steps, dtype=torch.float64)
        return cls(angle.cos().square())

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Reads a diffusers scheduler_config: trained_betas, or a named scheme, and the rescale."""
        if config.get("trained_betas") is not None:
            schedule = cls.from_betas(torch.tensor(config["trained_betas"], dtype=torch.float64))
        else:
            name = config.get("beta_schedule", "linear")
            start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
            num_steps = config.get("num_train_timesteps", SD_NUM_STEPS)
            match name:
                case "scaled_linear":
                    schedule = cls.scaled_linear(start, end, num_steps)
                case "linear":
                    schedule = cls.linear(start, end, num_steps)
                case "squaredcos_cap_v2":
                    schedule = cls.cosine_discrete(num_steps)
                case _:
                    raise UserError(
                        f"beta_schedule={name!r} in the scheduler config is not known; use "
                        "scaled_linear, linear, squaredcos_cap_v2 or trained_betas"
                    )
        return schedule.zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule

    @property
    def num_steps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alpha_bar)

    @property
    def alpha(self) -> Float[Tensor, " T"]:
        return self.alpha_bar.sqrt()

    @property
    def sigma(self) -> Float[Tensor, " T"]:
        return (1 - self.alpha_bar).sqrt()

    @property
    def snr(self) -> Float[Tensor, " T"]:
        """alpha^2 / sigma^2; 0 at the last step of a zero-terminal-SNR schedule."""
        return self.alpha_bar / (1 - self.alpha_bar)

    @property
    def log_snr(self) -> Float[Tensor, " T"]:
        """Natural logarithm of the SNR; -inf where the SNR is 0."""
        return self.snr.log()

    @property
    def betas(self) -> Float[Tensor, " T"]:
        return _betas_of(self.alpha_bar)

    @property
    def is_zero_terminal_snr(self) -> bool:
        return self.alpha_bar[-1].item() == 0

    def is_close(self, other: "NoiseSchedule") -> bool:
        """Whether both have the same noise but for float32's rounding of alpha_bar, 1e-5."""
        ours, theirs = self.alpha_bar, other.alpha_bar
        return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-5, atol=1e-9)

    def zero_terminal_snr(self) -> "NoiseSchedule":
        """Rescales to zero terminal SNR (Lin et al. 2023, Algorithm 1): alpha[T-1] is exactly 0."""
        if self.is_zero_terminal_snr:
            return self
        return NoiseSchedule.from_betas(rescale_zero_terminal_snr(self.betas))

    def shifted(
        self,
        base_resolution: int | float,
        resolution: int | float,
        base_at_start: int | float | None = None,
    ) -> "NoiseSchedule":
        """Moves a schedule made for one resolution to another: pooled, it is the noise it was.

            log SNR'(t) = log SNR(t) + 2 log(base / resolution)

        Averaging s x s pixels multiplies the SNR by s^2 (Hoogeboom et al. 2023, section 3.1). With
        `base_at_start` the base moves with t, evenly in its logarithm: from `base_at_start` at
        t = 0 to `base_resolution` at T - 1 (the paper's interpolation, t low + (1 - t) high: a
        lower base at the end makes the end noisier). Resolutions are sides, of images or of
        latents: only their ratio counts. After the rescale to zero terminal SNR, which it keeps.
        """
        start = base_resolution if base_at_start is None else base_at_start
        if min(base_resolution, resolution, start) <= 0:
            raise UserError(
                f"resolutions {start:g}, {base_resolution:g} and {resolution:g} of a shift must be "
                "positive"
            )
        ends = torch.tensor([start, base_resolution], dtype=torch.float64).log()
        u = torch.linspace(0, 1, self.num_steps, dtype=torch.float64)
        factor = (torch.lerp(ends[0], ends[1], u).exp() / resolution).square()
        bar = factor * self.alpha_bar
        bar = bar / (bar + 1 - self.alpha_bar)
        if not (bar.diff() < 0).all():
            raise UserError(
                f"a shift from {start:g} at the start and {base_resolution:g} at the end to "
                f"{resolution:g} does not fall at every step; take resolutions nearer to each other"
            )
        return NoiseSchedule(bar)

    def with_terminal_alpha_bar(self, value: float) -> "NoiseSchedule":
        """Replaces the last alpha_bar; diffusers stands in 2^-24 for 0 in some schedulers.

        As there, it may exceed the one before it (rescaled linear betas: 4e-9 at T - 2).
        """
        bar = self.alpha_bar.clone()
        bar[-1] = value
        stand_in = copy.copy(self)
        stand_in.__dict__.update(alpha_bar=bar, _tables={})
        return stand_in

    def at(self, t: Int[Tensor, " B"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Returns (alpha_t, sigma_t) in float32, on the device of `t`, by tables kept there."""
        tables = self.__dict__.setdefault("_tables", {})
        if t.device not in tables:
            tables[t.device] = torch.stack([self.alpha, self.sigma]).float().to(t.device)
        alpha, sigma = tables[t.device][:, t]
        return alpha, sigma

    def timesteps(self, num_steps: int, spacing: Spacing, steps_offset: int = 1) -> list[int]:
        """Returns the sampling timesteps, noisiest first; 1 <= num_steps <= T."""
        match spacing:
            case "trailing":
                return self.trailing_timesteps(num_steps)
            case "leading":
                return self.leading_timesteps(num_steps, steps_offset)
            case "linspace":
                self._check_num_steps(num_steps)
                last = self.num_steps - 1
                gaps = max(num_steps - 1, 1)
                # A single step samples at 0 in diffusers (linspace(0, T-1, 1)); kept the same.
                steps = [round(Fraction(i * last, gaps)) for i in range(num_steps)]
                return steps[::-1]
        raise UserError(
            f"timestep_spacing={spacing!r} is not known; use trailing, leading or linspace"
        )

    def trailing_timesteps(self, num_steps: int) -> list[int]:
        """Returns round(T - i T / S) - 1 for i in [0, S), halves to even, in exact arithmetic.

        Source: Lin et al. 2023, section 3.3. Starts at T - 1. Written with floating-point steps the
        same list gains a timestep -1 for some S (61, 103, 121, ... of T = 1000).
        """
        self._check_num_steps(num_steps)
        total = self.num_steps
        return [round(Fraction(total * (num_steps - i), num_steps)) - 1 for i in range(num_steps)]

    def leading_timesteps(self, num_steps: int, steps_offset: int = 1) -> list[int]:
        """Returns i (T // S) + offset, as Stable Diffusion was published; misses T - 1.

        The offset shrinks where it would push the first timestep beyond T - 1 (S = T).
        """
        self._check_num_steps(num_steps)
        ratio = self.num_steps // num_steps
        offset = min(steps_offset, self.num_steps - 1 - (num_steps - 1) * ratio)
        return [i * ratio + offset for i in range(num_steps)][::-1]

    def _check_num_steps(self, num_steps: int) -> None:
        if not 1 <= num_steps <= self.num_steps:
            raise UserError(
                f"num_steps={num_steps} is outside 1..{self.num_steps}: the model was trained on "
                f"{self.num_steps} timesteps and each can be visited once"
            )
