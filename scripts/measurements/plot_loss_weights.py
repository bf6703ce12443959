"""`python -m blackpoint.scripts.measurements.plot_loss_weights`: every loss weight over t, as a
picture and as tables.

Writes docs/loss_weights.png and docs/loss_weights.md, for Stable Diffusion's schedule rescaled to
zero terminal SNR, and shifted. All weights are those of an error in v
(`blackpoint.train.weighting`).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.sampling.statistics.table import Table
from blackpoint.train.loss_config import LossConfig
from blackpoint.train.weighting import error_per_v_error, floor_of, floored_v_weights, v_weights

DOCS = Path("docs")
SHOWN = {
    "uniform": LossConfig(),
    "min_snr, gamma 5": LossConfig(weighting="min_snr"),
    "soft_min_snr, gamma 5": LossConfig(weighting="soft_min_snr"),
    "p2, k 1, gamma 1 = sigmoid, bias 0": LossConfig(weighting="p2"),
    "p2, gamma 0 (plain eps loss)": LossConfig(weighting="p2", p2_gamma=0.0),
    "sigmoid, bias -2": LossConfig(weighting="sigmoid", sigmoid_bias=-2.0),
}
ZERO_SNR = NoiseSchedule.scaled_linear().zero_terminal_snr()
SCHEDULES = {"none": ZERO_SNR} | {
    f"64 -> {resolution}": ZERO_SNR.shifted(64, resolution) for resolution in (128, 256, 512)
}
SMALL = 0.01
NUM_LAST = 40  # timesteps in the right panel
LOWEST = 1e-7  # of the picture; w(T-2) of min_snr is 2e-7

TEXT = """# Loss weights at zero terminal SNR

Made by `python -m blackpoint.scripts.measurements.plot_loss_weights`; the weights are in
`train/loss_weights.py`.

![Every loss weight over t](loss_weights.png)

Every weight is written as w(t) of `E_t w(t) || v - v_hat ||^2`: an eps error is alpha times the v
error and an x0 error sigma times it, so a weight published for eps counts alpha^2 here and one for
x0 sigma^2. A network that predicts eps or x0 is trained with w / alpha^2 or w / sigma^2 of its own
error, so `loss.weighting=min_snr` is one objective whatever is predicted. `uniform` alone is 1 for
the network's own error: of eps that is w = alpha^2 here, of x0 sigma^2. Schedule: Stable
Diffusion's, T = {num_steps}, rescaled. Faint in the picture: as published; solid: with the floor.

{table}

**Reason.** At t = T - 1 the rescaled schedule has alpha = 0. Each weighting but `uniform` is
proportional to SNR there, that is 0: it switches off the one timestep that the rescale adds, where
the network must predict the image's mean (its black point) from noise and prompt alone. The plain
eps loss does so too, being alpha^2 in this space. The steps next to it fare hardly better:
w(T-2) of min_snr is {next_to_last:.0e}.

**What is done.** Where SNR < 1 the weight used is max(w, floor), and w elsewhere. `loss.floor=null`
is a third of the weighting's mean over its schedule: the last timestep learns at a third of the
mean pace, and the rest keeps its shape, under every shift:

{shifts}

- The weight has no step at SNR 1: the floor is at most w there (a limit that is reached by p2 with
  gamma > 1 and a small k alone). Every w has a single maximum over t, so what is lifted is one
  stretch, at the end.
- `loss.floor=NUMBER` is the least weight of an error in v where SNR < 1. Above w at SNR 1 it makes
  a step there. `loss.floor=0` with a weight that vanishes is refused.
- Without zero terminal SNR null is 0: every weight as published.
- Timesteps of SNR >= 1 are never lifted: with `loss.prediction_type=sample` w / sigma^2 of min_snr
  is at most {largest_x0:.3g}, its gamma; a floor of 0.1 at every t would make it {clean_floor:.1f}
  at t = 0.
- A run that was started when the floor held at every timestep (0.1 on a zero-SNR schedule) goes on
  with it: `loss.floor_where=everywhere`, which a resume sets by itself and says.

**Advice.** Keep `uniform` (lambda_t = 1, what Lin et al. trained with) unless you have measured a
gain. To train the last timestep more, `loss.terminal_share` draws it more often and leaves the
weights alone. soft_min_snr is the sigmoid weighting of bias log(gamma), and p2 with gamma 1 is
proportional to the one of bias log(k): those three are one family.

**Which logged losses compare.** None but `train/objective` has loss weights, so that runs of
different weights compare.

| metric | error of |
|---|---|
| `validation/loss`, `validation/loss_<range of log SNR>` | v, whatever the network predicts |
| `validation/epsilon_loss`, `validation/sample_loss` | the network's own output, if not v |
| `train/loss`, `train/loss_<range of log SNR>`, `train/loss_pool_<p>` | the network's own output |
| `train/objective` | the network's own output, with its weights |

So across prediction types the first row alone compares. The v error is an eps error / alpha^2, or
an x0 error / sigma^2: the noisiest samples dominate the one number of an eps model, the cleanest
that of an x0 model, so compare by range too. The best checkpoint is chosen by the error of the
network's own output. At alpha = 0 an eps prediction determines no v: an eps model at zero SNR
(`allow_unsound=true`) has no `validation/loss_terminal`, and its `validation/loss` leaves the last
timestep out.

**Learned uncertainty** (`loss.uncertainty=true`, Karras et al. 2024) has no fixed curve: it trains
w L / exp(u(t)) + u(t), and its weight w / exp(u(t)) is positive at T - 1. u sees t / T, as log SNR
is infinite there.

**Offset noise** is refused with zero terminal SNR: it shifts the mean of eps in training, and
sampling starts from noise without that shift; the rescale has removed what it stood in for.
**Input perturbation** (Ning et al. 2023) is allowed: it adds noise to the input and none to the
target, and at T - 1 the target is -x0, so an ideal model's answer there depends on no noise at all.
"""


def main() -> None:
    """Writes the picture and the tables."""
    DOCS.mkdir(exist_ok=True)
    plot(DOCS / "loss_weights.png")
    min_snr = SHOWN["min_snr, gamma 5"]
    per_v = error_per_v_error("sample", ZERO_SNR)
    text = TEXT.format(
        num_steps=ZERO_SNR.num_steps,
        table=table().markdown().rstrip(),
        shifts=shift_table().markdown().rstrip(),
        next_to_last=v_weights(min_snr, ZERO_SNR)[-2].item(),
        largest_x0=(floored_v_weights(min_snr, ZERO_SNR) / per_v).max().item(),
        clean_floor=0.1 / per_v[0].item(),
    )
    (DOCS / "loss_weights.md").write_text(text, encoding="utf-8")
    print(text)


def table() -> Table:
    """Lays out what each weight leaves of the schedule, before and after the floor."""
    lines = []
    for name, loss in SHOWN.items():
        w = v_weights(loss, ZERO_SNR)
        used, floor, lifted = _floored(loss, ZERO_SNR)
        small = (w < SMALL).double().mean().item()
        whole = (w.mean().item(), floor, used.mean().item(), lifted)
        lines.append((name, w[-1].item(), small, *whole))
    columns = {"weighting": "", "w(T-1)": "g", "timesteps with w < .01": ".1%", "mean w": ".4f"}
    columns |= {"floor = w(T-1) with it": "", "mean w with it": ".4f"}
    return Table.of(columns | {"timesteps that it lifts": ".1%"}, lines)


def shift_table() -> Table:
    """Lays out the floor under each shift: its size, what it lifts, and what is left above it."""
    lines = []
    for name, loss in list(SHOWN.items())[1:]:
        for shift, schedule in SCHEDULES.items():
            used, floor, lifted = _floored(loss, schedule)
            lines.append((name, shift, floor, lifted, (used.max() / used[-1]).item()))
    columns = {"weighting": "", "shift": "", "floor": "", "timesteps that it lifts": ".1%"}
    return Table.of(columns | {"largest w / floor": ".1f"}, lines)


def _floored(loss: LossConfig, schedule: NoiseSchedule) -> tuple[Tensor, str, float]:
    """Returns the weights with their floor, the floor as text, and the share that it lifts."""
    used = floored_v_weights(loss, schedule)
    lifted = (used > v_weights(loss, schedule)).double().mean().item()
    return used, f"{floor_of(loss, schedule):.4f}" if lifted else "none", lifted


def plot(path: Path) -> None:
    """Draws the weights over all timesteps and, beside them, over the last ones."""
    from matplotlib.figure import Figure

    num_steps = ZERO_SNR.num_steps
    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    whole, last = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    styles: tuple[Any, ...] = ("-", "-", "--", "-.", ":", (0, (5, 1, 1, 1)))
    for number, (name, loss) in enumerate(SHOWN.items()):
        published, used = v_weights(loss, ZERO_SNR), floored_v_weights(loss, ZERO_SNR)
        shown = torch.where(published > 0, published, torch.full_like(published, torch.nan))
        for axes, start in ((whole, 0), (last, num_steps - NUM_LAST)):
            t, style, color = range(start, num_steps), styles[number], f"C{number}"
            marker = "." if axes is last else None
            axes.plot(t, shown[start:], linestyle=style, color=color, marker=marker, alpha=0.3)
            axes.plot(t, used[start:], linestyle=style, color=color, label=name)
        if published[-1].item() <= 0:
            last.plot(num_steps - 1, LOWEST, "v", color=f"C{number}", alpha=0.3, clip_on=False)
    for axes in (whole, last):
        axes.set_yscale("log")
        axes.set_ylim(LOWEST, 3)
        axes.set_xlabel("timestep t")
        axes.grid(alpha=0.3)
    snr_1 = int((ZERO_SNR.snr >= 1).sum())
    whole.axvline(snr_1, color="black", linewidth=1)
    whole.text(snr_1 + 8, 1.5, "SNR < 1")
    whole.set_ylabel("weight w(t) of an error in v")
    whole.set_title("SD's schedule, rescaled to zero terminal SNR; faint: as published")
    whole.legend(loc="lower left")
    last.set_title(f"the last {NUM_LAST} timesteps")
    last.annotate(
        "published: w = 0 at t = T - 1,\nall but uniform",
        (num_steps - 1, LOWEST),
        (num_steps - NUM_LAST, LOWEST * 8),
        arrowprops={"arrowstyle": "->"},
    )
    figure.savefig(path)


if __name__ == "__main__":
    main()
