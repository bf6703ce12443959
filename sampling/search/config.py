"""The configuration of `blackpoint search`; free of torch, so that its help is instant."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import OutputText, PathText
from blackpoint.sampling.choices import Attention, AutoDtype, Prompts, Tf32, Weights, check_seed
from blackpoint.sampling.runtime.tracking import WandbConfig
from blackpoint.sampling.search.algorithm_configs import (
    FkSteeringConfig,
    HalvingConfig,
    NoiseOptimisationConfig,
    PathsConfig,
    RandomSearchConfig,
    ZeroOrderConfig,
)
from blackpoint.sampling.verifiers.load import VerifierConfig

Algorithm = Literal["random", "zero_order", "paths", "halving", "fk_steering", "noise_optimisation"]
EnsembleRule = Literal["mean_rank", "z_score", "minimum", "weighted_sum"]
WHOLE = ("random", "zero_order")
STOCHASTIC = "sampler=euler_ancestral, or sampler=ddim with eta above 0"


@dataclass
class DiversityConfig:
    """Features whose mean distance between winners, beside the plain images, tells diversity."""

    checkpoint: PathText | None = None
    """A transformers folder or hub id, such as facebook/dinov2-base; pixels of thumbnails if
    neither this nor module is set."""
    module: str | None = None
    """Import path package.module:name of a module of images in [0, 1] to features."""


@dataclass
class SearchConfig:
    """From prompts to the best picture that a budget of network evaluations finds for each."""

    checkpoint: PathText = MISSING
    """What to sample: a folder, hub id, run directory or .ckpt."""
    prompts: Prompts = MISSING
    """A prompt, a list of them (["a cat", "a dog"]), or a file: .txt (one a line), .jsonl, .csv,
    .tsv or .parquet."""
    output: OutputText = MISSING
    """Folder to write; the same command there continues a search that was stopped."""
    budget_nfe: int = MISSING
    """Most UNet evaluations a prompt, both branches of guidance counted; the winner's included."""
    algorithm: Algorithm = "random"
    """random (best-of-N), zero_order, paths, halving, fk_steering or noise_optimisation."""
    verifiers: dict[str, VerifierConfig] = field(default_factory=dict)
    """What is searched for, by name; several are combined by `ensemble`."""
    held_out: dict[str, VerifierConfig] = field(default_factory=dict)
    """Verifiers that judge the winners and are not searched with: they show hacking."""
    ensemble: EnsembleRule = "mean_rank"
    """How several verifiers rank candidates; fk_steering takes weighted_sum alone."""
    seed: int = 0
    """Decides every draw of the search, together with prompt, candidate, round and step."""
    limit: int | None = None
    """Take only so many prompts."""
    offset: int = 0
    """Leave out so many prompts at the start."""
    num_steps: int = 25
    """Sampling steps of every candidate."""
    sampler: str = "ddim"
    """ddim, euler, euler_ancestral, heun or dpmpp_2m."""
    eta: float | None = None
    """Share of fresh noise in a step of ddim: 0 (also if not set) is deterministic, 1 ancestral."""
    guidance_scale: float = 7.5
    """Weight of the prompt; 1 is off, and halves the NFE of a step."""
    guidance_rescale: float = 0.7
    """Share of the guided output's standard deviation that is set back; 0 to 1."""
    negative_prompt: str = ""
    """What guidance steers away from."""
    clip_skip: int = 0
    """Last layers of the text encoder to leave out for the prompts, as clip_skip of diffusers; the
    negative prompt has all. 1 is what other tools call clip skip 2."""
    height: int | None = None
    """Height in px, a multiple of 8; the model's own if not set."""
    width: int | None = None
    """Width in px, a multiple of 8; the model's own if not set."""
    random: RandomSearchConfig = field(default_factory=RandomSearchConfig)
    """Best-of-N."""
    zero_order: ZeroOrderConfig = field(default_factory=ZeroOrderConfig)
    """Zero-order search."""
    paths: PathsConfig = field(default_factory=PathsConfig)
    """Search over paths."""
    halving: HalvingConfig = field(default_factory=HalvingConfig)
    """Successive halving."""
    fk_steering: FkSteeringConfig = field(default_factory=FkSteeringConfig)
    """FK steering."""
    noise_optimisation: NoiseOptimisationConfig = field(default_factory=NoiseOptimisationConfig)
    """Noise optimisation."""
    weights: Weights = "ema"
    """Which weights of a training checkpoint: their moving average or the last step's."""
    variant: str | None = None
    """Variant of the weight files in a folder or on the hub: fp16, bf16, non_ema; the plain files,
    or the only ones that are there, if not set."""
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
    compile: bool = False
    """Compile the UNet with torch.compile, at the first step of each batch size."""
    batch_size: int = 16
    """Candidates run at once, of any prompts; 0 finds it. Moves choices only among
    near-ties (docs/search.md)."""
    diversity: DiversityConfig = field(default_factory=DiversityConfig)
    """How the diversity of the winners is measured."""
    wandb: WandbConfig = field(default_factory=lambda: WandbConfig(enabled=False))
    """Tables of winners and candidates at Weights & Biases."""

    def __post_init__(self) -> None:
        for name in ("budget_nfe", "num_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.batch_size < 0:
            raise UserError(f"batch_size={self.batch_size} must be at least 1, or 0 to find it")
        check_seed("seed", self.seed)
        if self.random.first_seed is not None:
            check_seed("random.first_seed", self.random.first_seed, self.budget_nfe)
        if not self.verifiers:
            raise UserError(
                "verifiers is empty: name what to search for, such as verifiers.black.kind="
                "luminance verifiers.black.target=0, or verifiers.clip.kind=clip_score "
                "verifiers.clip.checkpoint=FOLDER"
            )
        both = sorted(self.verifiers.keys() & self.held_out.keys())
        if both:
            raise UserError(
                f"held_out.{both[0]} is among the verifiers too: a verifier that is searched with "
                "cannot judge the search; give it another name if it is another one"
            )
        if "diversity" in {**self.verifiers, **self.held_out}:
            raise UserError(
                "a verifier is called diversity, as what is measured beside the held-out ones is; "
                "give it another name"
            )
        for name, config in {**self.verifiers, **self.held_out}.items():
            if config.kind == "oracle" and name in self.held_out:
                raise UserError(
                    f"held_out.{name}: kind=oracle scores a set that grows, and a winner is judged "
                    "by its picture alone; hold out another kind"
                )
            if config.kind == "oracle" and self.algorithm not in WHOLE and self.held_out:
                raise UserError(
                    f"verifiers.{name}: kind=oracle scores a set that grows, so a plain image "
                    f"beside each winner, which held_out asks of algorithm={self.algorithm}, would "
                    "be scored with another set; use random or zero_order, or leave held_out out"
                )
            if config.kind == "self_supervised" and name in self.held_out:
                raise UserError(
                    f"held_out.{name}: kind=self_supervised compares a run's preview with its end, "
                    "and a winner is judged by its picture alone; hold out another kind"
                )
            if config.kind == "stability":
                self._check_stability(name, config)
            whole = self.algorithm in WHOLE
            if config.kind == "self_supervised" and name in self.verifiers and not whole:
                raise UserError(
                    f"verifiers.{name}: kind=self_supervised compares a run's preview with its end "
                    f"and needs whole runs; algorithm={self.algorithm} has parts. Use random or "
                    "zero_order"
                )
        if self.algorithm == "noise_optimisation":
            self._check_optimisation()
        if self.algorithm == "fk_steering":
            if not (self.sampler == "euler_ancestral" or (self.eta or 0) > 0):
                raise UserError(
                    f"algorithm=fk_steering with sampler={self.sampler}: copies of a particle "
                    f"would stay copies without noise in the steps; use {STOCHASTIC}"
                )
            if len(self.verifiers) > 1 and self.ensemble != "weighted_sum":
                raise UserError(
                    f"ensemble={self.ensemble}: algorithm=fk_steering weighs particles by a score, "
                    "which a rank is not; use ensemble=weighted_sum"
                )
        from blackpoint.sampling.samplers import (
            check_sampler,  # torch: for a config, not for its help
        )

        check_sampler(self.sampler, self.eta)

    def _check_stability(self, name: str, config: VerifierConfig) -> None:
        """Raises UserError where runs have no noise that they could be inverted to."""
        if name in self.held_out:
            raise UserError(
                f"held_out.{name}: kind=stability compares a run with its noise, and a winner is "
                "judged by its picture alone; hold out another kind"
            )
        if self.algorithm not in ("random", "zero_order", "halving", "noise_optimisation"):
            raise UserError(
                f"verifiers.{name}: kind=stability goes back to the noise of a run; with "
                f"algorithm={self.algorithm} a run has no noise of its own. Use random, zero_order "
                "or halving"
            )
        if self.sampler not in ("ddim", "euler") or (self.eta or 0) > 0:
            raise UserError(
                f"verifiers.{name}: kind=stability inverts deterministic DDIM; use sampler=ddim "
                f"without eta, not sampler={self.sampler}"
            )
        if (config.partial_steps or 0) > self.num_steps:
            raise UserError(
                f"verifiers.{name}.partial_steps={config.partial_steps} is more than num_steps="
                f"{self.num_steps}: a run is inverted over the steps that it was sampled in; give "
                f"at most {self.num_steps}"
            )
        if config.partial_steps is not None and self.algorithm in ("halving", "noise_optimisation"):
            raise UserError(
                f"verifiers.{name}: partial_steps goes with random and zero_order; algorithm="
                f"{self.algorithm} inverts each run from where it looks at it. Leave it out"
            )

    def _check_optimisation(self) -> None:
        """Raises UserError where there is nothing to differentiate, or nothing that can be."""
        if len(self.verifiers) != 1:
            raise UserError(
                f"algorithm=noise_optimisation ascends one score and {len(self.verifiers)} "
                "verifiers are set; leave one"
            )
        if self.compile:
            raise UserError(
                "compile=true: algorithm=noise_optimisation differentiates the run with gradient "
                "checkpointing, which a compiled UNet is not made for; leave compile out"
            )
        if self.sampler == "euler_ancestral" or (self.eta or 0) > 0:
            raise UserError(
                f"sampler={self.sampler}, eta={self.eta}: algorithm=noise_optimisation needs a "
                "deterministic sampler; use ddim without eta"
            )
        [verifier] = self.verifiers.values()
        fixed = self.noise_optimisation.gradient == "fixed_inverse"
        if fixed and (verifier.kind != "stability" or verifier.measure != "cosine"):
            raise UserError(
                "noise_optimisation.gradient=fixed_inverse holds the re-inverted noise fixed, so "
                "it goes with kind=stability, measure=cosine; use gradient=full"
            )
