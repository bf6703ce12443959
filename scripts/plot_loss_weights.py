"""`python -m scripts.plot_loss_weights`: every loss weight over t, as a picture and as a table.

Writes docs/loss_weights.png and docs/loss_weights.md, for Stable Diffusion's schedule rescaled to
zero terminal SNR. All weights are those of an error in v (`train.weighting`).
"""

from pathlib import Path

import torch
from torch import Tensor

from sampling.schedule import NoiseSchedule
from train.loss_config import LossConfig
from train.weighting import ZERO_SNR_FLOOR, v_weights

DOCS = Path("docs")
SHOWN = {
    "uniform": LossConfig(),
    "min_snr, gamma 5": LossConfig(weighting="min_snr"),
    "soft_min_snr, gamma 5": LossConfig(weighting="soft_min_snr"),
    "p2, k 1, gamma 1 = sigmoid, bias 0": LossConfig(weighting="p2"),
    "p2, gamma 0 (plain eps loss)": LossConfig(weighting="p2", p2_gamma=0.0),
    "sigmoid, bias -2": LossConfig(weighting="sigmoid", sigmoid_bias=-2.0),
}
SMALL = 0.01
NUM_LAST = 40  # timesteps in the right panel
LOWEST = 1e-7  # of the picture; w(T-2) of min_snr is 2e-7

TEXT = """# Loss weights at zero terminal SNR

Made by `python -m scripts.plot_loss_weights`; the weights are in `train/weighting.py`.

![Every loss weight over t](loss_weights.png)

The loss of every run is `E_t w(t) || v - v_hat ||^2`, whatever the network predicts: an eps error
is alpha times the v error and an x0 error sigma times it, so a weight published for eps counts
alpha^2 here and one for x0 sigma^2. Schedule: Stable Diffusion's, T = {num_steps}, rescaled.

{table}

**Reason.** At t = T - 1 the rescaled schedule has alpha = 0. Each weighting but `uniform` is
proportional to SNR there, that is 0: it switches off the one timestep that the rescale adds, where
the network must paint the image's mean (its black point) from noise and prompt alone. The plain eps
loss does so too, being alpha^2 in this space. The steps next to it fare hardly better:
w(T-2) of min_snr is {next_to_last:.0e}.

**What is done.** The weight used is max(w, floor). `loss.floor` is {floor} by default on such a
schedule: about a third of min_snr's mean weight, so that the last timestep learns at a third of the
mean pace while the middle of the schedule keeps its published weight; and 0, the published form, on
a schedule without zero terminal SNR. `loss.floor=0` with a weight that vanishes is refused.

**Advice.** Keep `uniform` (lambda_t = 1, what Lin et al. trained with) unless you have measured a
gain. To train the last timestep more, `loss.terminal_share` draws it more often and leaves the
weights alone. A floor overrules a weight whose mean is below it, as sigmoid's with a negative bias:
give such a weight a smaller `loss.floor`. soft_min_snr is the sigmoid weighting of bias log(gamma),
and p2 with gamma 1 is proportional to the one of bias log(k): those three are one family.

**Learned uncertainty** (`loss.uncertainty=true`, Karras et al. 2024) has no fixed curve: it trains
w L / exp(u(t)) + u(t), and its weight w / exp(u(t)) is positive at T - 1. u sees t / T, as log SNR
is infinite there.

**Offset noise** is refused with zero terminal SNR: it shifts the mean of eps in training, and
sampling starts from noise without that shift; the rescale has removed what it stood in for.
**Input perturbation** (Ning et al. 2023) is allowed: it adds noise to the input and none to the
target, and at T - 1 the target is -x0, so an ideal model's answer there depends on no noise at all.
"""


def main() -> None:
    """Writes the picture and the table."""
    schedule = NoiseSchedule.scaled_linear().zero_terminal_snr()
    weights = {name: v_weights(loss, schedule) for name, loss in SHOWN.items()}
    DOCS.mkdir(exist_ok=True)
    plot(weights, DOCS / "loss_weights.png")
    text = TEXT.format(
        num_steps=schedule.num_steps,
        table=table(weights),
        next_to_last=weights["min_snr, gamma 5"][-2].item(),
        floor=ZERO_SNR_FLOOR,
    )
    (DOCS / "loss_weights.md").write_text(text, encoding="utf-8")
    print(text)


def table(weights: dict[str, Tensor]) -> str:
    """Lays out what each weight leaves of the schedule, before and after the floor."""
    lines = [
        "| weighting | w(T-1) | timesteps with w < .01 | mean w | with the floor: w(T-1) | mean w "
        "| timesteps that it lifts |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, w in weights.items():
        floored = w.clamp(min=ZERO_SNR_FLOOR)
        small, lifted = ((w < limit).double().mean().item() for limit in (SMALL, ZERO_SNR_FLOOR))
        lines.append(
            f"| {name} | {w[-1].item():g} | {small:.1%} | {w.mean().item():.4f} "
            f"| {floored[-1].item():g} | {floored.mean().item():.4f} | {lifted:.1%} |"
        )
    return "\n".join(lines)


def plot(weights: dict[str, Tensor], path: Path) -> None:
    """Draws the weights over all timesteps and, beside them, over the last ones."""
    from matplotlib.figure import Figure

    num_steps = len(next(iter(weights.values())))
    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    whole, last = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    styles = ("-", "-", "--", "-.", ":", (0, (5, 1, 1, 1)))
    for number, (name, w) in enumerate(weights.items()):
        vanishes = w[-1].item() <= 0
        shown = torch.where(w > 0, w, torch.full_like(w, torch.nan))
        for axes, start in ((whole, 0), (last, num_steps - NUM_LAST)):
            t = range(start, num_steps)
            marker = "." if axes is last else None
            axes.plot(
                t, shown[start:], linestyle=styles[number], marker=marker, markersize=4, label=name
            )
        if vanishes:
            last.plot(num_steps - 1, LOWEST, "v", color=last.lines[-1].get_color(), clip_on=False)
    for axes in (whole, last):
        axes.axhline(ZERO_SNR_FLOOR, color="black", linewidth=1)
        axes.set_yscale("log")
        axes.set_ylim(LOWEST, 3)
        axes.set_xlabel("timestep t")
        axes.grid(alpha=0.3)
    whole.text(num_steps, ZERO_SNR_FLOOR * 1.1, f"floor {ZERO_SNR_FLOOR}", ha="right")
    whole.set_ylabel("weight w(t) of an error in v")
    whole.set_title("SD's schedule, rescaled to zero terminal SNR")
    whole.legend(loc="lower left")
    last.set_title(f"the last {NUM_LAST} timesteps")
    last.annotate(
        "w = 0 at t = T - 1,\nall but uniform",
        (num_steps - 1, LOWEST),
        (num_steps - NUM_LAST, LOWEST * 8),
        arrowprops={"arrowstyle": "->"},
    )
    figure.savefig(path)


if __name__ == "__main__":
    main()
