"""Options of the fine-tune's loss; free of torch.

The weights are in train/loss_weights.py, the learned one in train/uncertainty.py, the draws of t
and eps in train/draws.py.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.rules import check_ranges
from blackpoint.sampling.choices import PredictionType
from blackpoint.train.loss_weights import WEIGHTS

if TYPE_CHECKING:
    Weighting = str
else:
    Weighting = Literal[tuple(WEIGHTS)]
Timesteps = Literal["uniform", "stratified"]
ScaleWeights = Literal["inverse_resolution", "uniform"]
FloorWhere = Literal["noisy", "everywhere"]


@dataclass
class LossConfig:
    """The training target, the weight of every timestep, and how t and eps are drawn."""

    prediction_type: PredictionType = "v_prediction"
    """Training target of the network: v_prediction, epsilon, or sample (x0)."""
    weighting: Weighting = "uniform"
    """Weight of a timestep: 1 for all (lambda_t = 1 in the paper), or a function of its SNR."""
    floor: float | None = None
    """Least weight of a timestep whose SNR is below 1, for an error in v. null: with zero terminal
    SNR, where every weighting but uniform would be 0 at the last timestep, a third of the
    weighting's mean over the schedule (at most its value at SNR 1); 0, as published, without."""
    floor_where: FloorWhere = "noisy"
    """Timesteps that the floor lifts: noisy, of SNR below 1; or everywhere, null being 0.1 then:
    the rule that runs started before this key go on with."""
    snr_gamma: float = 5.0
    """Where min_snr and soft_min_snr stop growing with the SNR."""
    p2_k: float = 1.0
    """k of p2's 1 / (k + SNR)^gamma."""
    p2_gamma: float = 1.0
    """gamma of p2's 1 / (k + SNR)^gamma; 0 is the published loss of epsilon models."""
    sigmoid_bias: float = 0.0
    """Bias of sigmoid(bias - log SNR); above 0 low noise weighs more, below 0 high noise does."""
    pool_factors: list[int] = field(default_factory=lambda: [1])
    """Scales at which the error is squared: means over p x p latents, 1 being full size. [1, 2, 4]
    is a multi-scale loss (Hoogeboom et al. 2023), which they report to help above 256 px."""
    scale_weights: ScaleWeights = "inverse_resolution"
    """Weight of a scale: p, which is 1 over its resolution and 1 at full size, or 1 for all."""
    uncertainty: bool = False
    """Learn how uncertain each timestep is, u(t), and train w L / exp(u) + u (EDM2)."""
    uncertainty_learning_rate: float = 1e-3
    """Learning rate of u(t) after the warm-up; it has 16 parameters and must outrun the UNet."""
    timesteps: Timesteps = "uniform"
    """Draw t independently, or spread it evenly over any consecutive samples (stratified)."""
    terminal_share: float = 0.0
    """Share of samples that train the last timestep, beside those that draw it anyway."""
    offset_noise: float = 0.0
    """Standard deviation of a constant added to each channel of eps; not with zero SNR."""
    input_perturbation: float = 0.0
    """Noise added to eps in the network's input but not in its target (Ning et al. 2023: 0.1)."""

    def __post_init__(self) -> None:
        factors = self.pool_factors
        if factors[:1] != [1] or any(p >= q for p, q in zip(factors, factors[1:], strict=False)):
            raise UserError(
                f"loss.pool_factors={factors}: must begin with 1, full size, and rise; [1] is the "
                "plain loss, [1, 2, 4] a multi-scale one"
            )
        check_ranges(self, "loss.", floor=">= 0 and <= 1", snr_gamma="> 0", p2_k="> 0")
        check_ranges(self, "loss.", p2_gamma=">= 0", sigmoid_bias=">= -20 and <= 20")
        check_ranges(self, "loss.", uncertainty_learning_rate="> 0", terminal_share=">= 0 and < 1")
        check_ranges(self, "loss.", offset_noise=">= 0", input_perturbation=">= 0")
