"""The settings of `blackpoint evaluate study=stability`; free of torch, so its help is instant.

Qi et al. 2024 claim that a noise which inversion finds again gives a better image. The study asks
it of any checkpoint: does stability rank the noises of a prompt as quality does, and does choosing
or optimising a noise by it beat what costs as much?
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import OutputText, PathText
from blackpoint.sampling.choices import Attention, AutoDtype, Prompts, Tf32, Weights, check_seed
from blackpoint.sampling.search.algorithms.noise_optimisation import NoiseOptimisationConfig
from blackpoint.sampling.verifiers.load import ImageModelConfig, VerifierConfig

Optimisation = Literal["stability", "fixed_inverse", "reward"]
LEAST = {"num_optimisation_steps": 2, "batch_size": 1, "gradient_batch_size": 1, "seed": 0}


@dataclass
class SetMetricsConfig:
    """FID, KID and IS of the images whose noises are most and least stable."""

    features: ImageModelConfig = field(default_factory=ImageModelConfig)
    """FID and KID: features of images; with `reference`."""
    reference: PathText | None = None
    """FID and KID: folder of real pictures."""
    classifier: ImageModelConfig = field(default_factory=ImageModelConfig)
    """IS: logits of images."""
    num_images: int = 10
    """Images of each prompt in a set; at most num_noises / 2."""


@dataclass
class StabilityStudyConfig:
    """Whether stable noises are better noises: correlations, selection, optimisation, cost."""

    study: Literal["stability"] = "stability"
    """Which study: metrics, black_point or stability."""
    checkpoints: dict[str, PathText] = MISSING
    """Name -> checkpoint: a folder, hub id, run directory or .ckpt."""
    prompts: Prompts = MISSING
    """A prompt, a list of them (["a cat", "a dog"]), or a file: .txt (one a line), .jsonl, .csv,
    .tsv or .parquet."""
    quality: dict[str, VerifierConfig] = field(default_factory=dict)
    """What judges the images; the first is what the rival searches with, the others hold out."""
    stability: dict[str, VerifierConfig] = field(default_factory=dict)
    """Stability scores, all kind=stability; the first is the one that selects and that is
    optimised. Empty: naive DDIM at either end, cosine, residual and contraction of 3 fixed-point
    iterations, and partial round trips of a quarter and half of the steps."""
    output: OutputText = "runs/stability"
    """Folder to write; the same command there continues a study that was stopped."""
    num_noises: int = 100
    """K, noises of each prompt."""
    num_steps: list[int] = field(default_factory=lambda: [4, 10])
    """Sampling steps; the study is done at each number of them."""
    guidance_scale: float = 1.0
    """Guidance of all images; 1 is off, and halves the NFE of a step."""
    rival_guidance_scales: list[float] = field(default_factory=lambda: [1.0, 7.5])
    """Guidance of plain images that are compared with selection and optimisation."""
    guidance_rescale: float = 0.7
    """Share of the guided output's standard deviation that is set back; 0 to 1."""
    optimisations: list[Optimisation] = field(
        default_factory=lambda: ["stability", "fixed_inverse", "reward"]
    )
    """stability (gradient through the round trip), fixed_inverse (with the re-inverted noise held
    fixed) and reward (gradient of the first quality score)."""
    optimised_num_steps: list[int] = field(default_factory=list)
    """Numbers of steps at which gradients through runs are taken; all of num_steps if empty."""
    num_optimisation_steps: int = 100
    """Noises that an ascent evaluates, the one that it begins with included; the paper has 100."""
    optimisation: NoiseOptimisationConfig = field(default_factory=NoiseOptimisationConfig)
    """Noise optimisation; its gradient is set by `optimisations`."""
    sets: SetMetricsConfig = field(default_factory=SetMetricsConfig)
    """Metrics of sets; what is not given is left out."""
    measure_memory: bool = True
    """Run each method once more, on one prompt in a process of its own, for its peak memory."""
    limit: int | None = None
    """Take only so many prompts."""
    offset: int = 0
    """Leave out so many prompts at the start."""
    seed: int = 0
    """Decides every noise, together with prompt and candidate."""
    height: int | None = None
    """Height in px; the model's own if not set."""
    width: int | None = None
    """Width in px; the model's own if not set."""
    weights: Weights = "ema"
    """Which weights of a training checkpoint: their moving average or the last step's."""
    dtype: AutoDtype = "auto"
    """Number format of the model's weights. auto: bfloat16 on a GPU that computes in it, else
    float32."""
    tf32: Tf32 = "auto"
    """Compute float32 products and convolutions in TensorFloat-32 (10 bits of mantissa). auto: on a
    GPU of compute capability 8.0 or newer, and nowhere else."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, cuda, cuda:1, ..."""
    attention: Attention = "auto"
    """Attention kernel of the UNet: auto takes xformers where it runs, else sdpa (torch's own)."""
    channels_last: bool = False
    """Hold the convolutions' weights in channels-last order."""
    batch_size: int = 16
    """Noises run at once, of any prompts. Moves choices only among near-ties (docs/search.md)."""
    gradient_batch_size: int = 4
    """Noises whose gradients are taken at once; they need several times the memory."""

    def __post_init__(self) -> None:
        if self.num_noises < 2:
            raise UserError(
                f"num_noises={self.num_noises}: one noise has no rank and nothing to be chosen "
                "from; give at least 2, the paper's K is 100"
            )
        if isinstance(self.checkpoints, dict) and not self.checkpoints:
            raise UserError("checkpoints is empty: name one, such as checkpoints.mine=FOLDER")
        check_seed("seed", self.seed)
        self._check_quality()
        for name, each in self.stability.items():
            if each.kind != "stability":
                raise UserError(
                    f"stability.{name}.kind={each.kind} is no stability score; use kind=stability, "
                    "or name it under quality"
                )
        if not self.num_steps or len(set(self.num_steps)) < len(self.num_steps):
            raise UserError(f"num_steps={self.num_steps} must be one number or more, all different")
        if not set(self.optimised_num_steps) <= set(self.num_steps):
            raise UserError(
                f"optimised_num_steps={self.optimised_num_steps} must be among num_steps="
                f"{self.num_steps}"
            )
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        for number in self.num_steps:
            if number < 1:
                raise UserError(f"num_steps={self.num_steps}: {number} must be at least 1")
        for scale in (self.guidance_scale, *self.rival_guidance_scales):
            if scale < 0:
                raise UserError(f"a guidance scale of {scale} must be at least 0; 1 is off")
        self._check_sets()

    def _check_quality(self) -> None:
        if not self.quality:
            raise UserError(
                "quality is empty: name what judges the images, such as "
                "quality.aesthetic.kind=aesthetic quality.aesthetic.checkpoint=FILE"
            )
        for name, each in self.quality.items():
            if each.declared.needs != "image":
                raise UserError(
                    f"quality.{name}.kind={each.kind} does not judge a picture by itself; use "
                    "another kind"
                )
        both = sorted(self.quality.keys() & standard_names(self))
        if both:
            raise UserError(f"quality.{both[0]} is the name of a stability score; choose another")

    def _check_sets(self) -> None:
        sets = self.sets
        if not (sets.features.is_set or sets.classifier.is_set or sets.reference):
            return
        if sets.num_images < 1 or 2 * sets.num_images > self.num_noises:
            raise UserError(
                f"sets.num_images={sets.num_images} must be at least 1 and at most half of "
                f"num_noises={self.num_noises}, so that the most and the least stable differ"
            )
        if sets.features.is_set != (sets.reference is not None):
            raise UserError(
                "sets.features and sets.reference go together: FID and KID compare features with "
                "those of real pictures; give both or neither"
            )


def standard_names(config: StabilityStudyConfig) -> set[str]:
    """Returns the names of the stability scores that the study has."""
    return set(config.stability or standard_scores(config.num_steps[0] if config.num_steps else 4))


def standard_scores(num_steps: int) -> dict[str, VerifierConfig]:
    """Returns the stability scores that a study measures unless told otherwise."""

    def score(**settings: Any) -> VerifierConfig:
        return VerifierConfig(kind="stability", **settings)

    iterated = {"inversion": "fixed_point", "num_iterations": 3}
    return {
        "ddim": score(),
        "ddim_clean_time": score(model_time="clean"),
        "fixed_point": score(**iterated),
        "residual": score(**iterated, measure="residual"),
        "contraction": score(**iterated, measure="contraction"),
        "partial_half": score(partial_steps=max(1, num_steps // 2)),
        "partial_quarter": score(partial_steps=max(1, num_steps // 4)),
    }
