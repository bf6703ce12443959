"""How much the first prediction of a run depends on its noise: 0 for an ideal zero-SNR model.

At t = T - 1 with zero terminal SNR the input is noise alone, which says nothing about the image, so
the ideal x0-prediction is E[x0 | prompt] whatever the noise (Lin et al. 2023, section 3.1). Where
alpha_T > 0 the input leaks the image's low frequencies, and the prediction follows the noise. For
data N(m, s^2) the ideal prediction's deviation over x_T ~ N(0, 1) is

    alpha s^2 / (alpha^2 s^2 + sigma^2)

which is alpha_T = .068 for SD's schedule and s = 1.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.plain import read_json
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.evaluation.rows import column_digest
from blackpoint.sampling.noise import derive_seed
from blackpoint.sampling.pipelines.painter import Painter

if TYPE_CHECKING:
    from blackpoint.sampling.evaluation.config import MetricsConfig

FILE = "noise_invariance.json"
DECIMALS = 8


@dataclass(frozen=True)
class KeptDependences:
    """The deviations of an evaluation's first prompts, in its folder."""

    folder: Path
    config: "MetricsConfig"
    prompts: Sequence[str]
    """All of the evaluation."""

    @property
    def _texts(self) -> list[str]:
        return list(self.prompts[: self.config.brightness.invariance_prompts])

    @property
    def _settings(self) -> str:
        sizes = {"height": self.config.height, "width": self.config.width}
        settings = asdict(self.config.brightness) | sizes
        return column_digest([self._texts, self.config.seed, settings])

    def read(self) -> list[float] | None:
        """Returns the deviations where they are known, or there are none."""
        if not self._texts:
            return []
        kept = read_json(self.folder / FILE)
        return list(kept["deviations"]) if kept.get("settings") == self._settings else None

    def measure(self, model: Painter) -> list[float]:
        """Measures the deviations and keeps them."""
        names = ("seed", "height", "width", "batch_size", "clip_skip", "max_tokens")
        options = {name: getattr(self.config, name) for name in names}
        noises = self.config.brightness.invariance_noises
        measured = noise_dependence(model, self._texts, noises, **options)
        values = [round(value, DECIMALS) for value in measured.tolist()]
        content = {"settings": self._settings, "deviations": values}
        write_whole(self.folder / FILE, json.dumps(content) + "\n")
        return values


@torch.no_grad()
def noise_dependence(
    model: Painter,
    prompts: Sequence[str],
    num_noises: int = 16,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 16,
    clip_skip: int = 0,
    max_tokens: int | None = None,
) -> Float[Tensor, " n"]:
    """Returns, for each prompt, the deviation over noises of the x0-prediction at t = T - 1.

    Root mean square over the elements of the latent, in units of scaled latents (whose data have a
    deviation near 1); no guidance. Noise k is the same for all prompts.
    """
    if num_noises < 2:
        raise UserError(f"num_noises={num_noises}: a deviation needs at least 2")
    seeds = [derive_seed(seed, "invariance", k) for k in range(num_noises)]
    noise, last = model.noise(seeds, height, width), model.process.noisiest
    deviations = []
    for prompt in prompts:
        condition = model.encode_prompts([prompt], clip_skip, max_tokens)
        parts = []
        for part in noise.split(batch_size):
            rows = condition[torch.zeros(len(part), dtype=torch.long, device=model.device)]
            parts.append(model.denoiser(rows)(part.to(model.device), last).x0.double().cpu())
        deviations.append(torch.cat(parts).var(dim=0).mean().sqrt())
    return torch.stack(deviations)
