"""The settings of `blackpoint evaluate`: one checkpoint, one sampling setting, every metric of it.

Free of torch, so that its help is instant. What is measured on each image is a column of
images.parquet; what is measured on the whole set follows from those rows.
"""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from blackpoint.data.files.paths import OutputText, PathText
from blackpoint.sampling.choices import (
    Attention,
    AutoDtype,
    Prompts,
    Spacing,
    Tf32,
    Weights,
    check_seed,
)
from blackpoint.sampling.errors import UserError
from blackpoint.sampling.verifiers.load import ImageModelConfig, VerifierConfig

OF_RUNS = ("stability", "self_supervised", "oracle")
"""Kinds of verifiers that do not judge one picture by itself."""
MAX_STORED_SEED = 2**63 - 1
"""images.parquet keeps seeds as 64-bit integers."""
OF_MEASURES = ("verifiers", "sets", "brightness", "geneval")
OF_WHERE = ("output", "reference_cache", "keep_images", "batch_size", "device", "attention")
FREE = (*OF_MEASURES, *OF_WHERE, "channels_last")
"""Keys that change no image."""
COLUMNS = (
    *("prompt_index", "image", "prompt", "category", "seed", "file", "nfe", "sampling_s"),
    *("measuring_s", "peak_gb", "luminance", "border_luminance", "luminance_error", "asked_low"),
    *("asked_high", "asked_where", "features", "logits", "device", "dtype", "tf32"),
)
"""Columns of images.parquet whose names a verifier cannot have."""


@dataclass
class SetsConfig:
    """Metrics of the whole set of images: FID, KID, precision, recall, Inception Score."""

    reference: PathText | None = None
    """FID, KID, precision and recall: folder of real pictures. Their luminance is what open
    prompts' images are compared with. Of another size than ours, they are resized and cut."""
    inception: PathText | None = None
    """The Inception network of the published metrics: weights-inception-2015-12-05-6726825d.pth
    of torch-fidelity, or a hub id that holds it. It gives features and classes."""
    features: ImageModelConfig = field(default_factory=ImageModelConfig)
    """Other features, instead of Inception's, for FID, KID, precision and recall."""
    classifier: ImageModelConfig = field(default_factory=ImageModelConfig)
    """Another classifier, instead of Inception's, for the Inception Score."""
    kid_subsets: int = 100
    """Subsets that KID is the mean of."""
    kid_subset_size: int = 1000
    """Images in a subset of KID; all that there are, where there are fewer."""
    inception_score_splits: int = 10
    """Parts of the set that IS is the mean of; one part where a part would have fewer than ten
    images a class."""
    neighbourhood: int = 3
    """k of the k-nearest-neighbour balls of precision and recall."""

    def __post_init__(self) -> None:
        for name in ("kid_subsets", "kid_subset_size", "inception_score_splits", "neighbourhood"):
            if getattr(self, name) < 1:
                raise UserError(f"sets.{name}={getattr(self, name)} must be at least 1")
        if self.inception is not None and self.features.is_set and self.classifier.is_set:
            raise UserError(
                "sets.inception would have nothing to do: sets.features and sets.classifier stand "
                "in for it; leave one of the three out"
            )
        if self.has_features and self.reference is None and not self.has_classifier:
            raise UserError(
                "sets.features needs sets.reference, a folder of real pictures: FID, KID, "
                "precision and recall compare two sets"
            )
        if self.reference is not None and self.kid_subset_size < 2:
            raise UserError("sets.kid_subset_size=1: KID compares pairs; give at least 2")

    @property
    def has_features(self) -> bool:
        """Whether features of images are asked for."""
        return self.features.is_set or self.inception is not None

    @property
    def has_classifier(self) -> bool:
        """Whether classes of images are asked for."""
        return self.classifier.is_set or self.inception is not None

    @property
    def is_set(self) -> bool:
        """Whether any metric of sets is asked for."""
        return self.has_classifier or (self.has_features and self.reference is not None)


@dataclass
class BrightnessConfig:
    """How black is black, how white is white, how varied what is left open."""

    where: Literal["border", "image"] = "image"
    """Whose luminance is compared with the references' where a prompt leaves it open; the border
    is the outer two pixels."""
    invariance_prompts: int = 16
    """Prompts, the first ones, whose first prediction is asked from several noises; 0: none."""
    invariance_noises: int = 16
    """Noises of each of them."""

    def __post_init__(self) -> None:
        if self.invariance_prompts < 0:
            raise UserError(f"brightness.invariance_prompts={self.invariance_prompts}: 0 or more")
        if self.invariance_noises < 2:
            raise UserError(
                f"brightness.invariance_noises={self.invariance_noises}: a deviation needs at "
                "least 2"
            )


@dataclass
class MetricsConfig:
    """One checkpoint and one sampling setting: set metrics, scores, brightness, each with its
    interval."""

    study: Literal["metrics"] = "metrics"
    """What is evaluated: metrics, all that there is; older configs say so."""
    checkpoint: PathText = MISSING
    """What to sample: a folder, hub id, run directory or .ckpt."""
    prompts: Prompts = MISSING
    """A prompt, a list of them (["a cat", "a dog"]), or a file: .txt (one a line), .jsonl, .csv,
    .tsv or .parquet. configs/prompts/brightness.jsonl is the brightness suite."""
    output: OutputText = MISSING
    """Folder to write; the same command there continues an evaluation that was stopped."""
    num_images: int = 1
    """Images of each prompt."""
    limit: int | None = None
    """Take only so many prompts."""
    offset: int = 0
    """Leave out so many prompts at the start."""
    seed: int = 0
    """Seed of the first image; image k of prompt i has seed + i * num_images + k."""
    verifiers: dict[str, VerifierConfig] = field(default_factory=dict)
    """What scores each image, by name: alignment, preference, classes. One whose weights are
    missing is left out, and said so."""
    sets: SetsConfig = field(default_factory=SetsConfig)
    """FID, KID, IS, precision, recall."""
    brightness: BrightnessConfig = field(default_factory=BrightnessConfig)
    """The brightness suite."""
    reference_cache: PathText | None = None
    """Folder that keeps what was measured of references, for evaluations that share it; inside
    `output` if not set."""
    geneval: PathText | None = None
    """results.jsonl of GenEval's detector, whose scores are shown beside."""
    keep_images: int | None = 64
    """How many images to keep as PNG, the first ones; null: all, as GenEval's detector needs."""
    sampler: str = "ddim"
    """ddim, euler, euler_ancestral, heun or dpmpp_2m."""
    eta: float | None = None
    """Share of fresh noise in a step of ddim: 0 (also if not set) is deterministic, 1 ancestral."""
    num_steps: int = 25
    """Sampling steps."""
    guidance_scale: float = 7.5
    """Weight of the prompt; 1 is off."""
    guidance_rescale: float = 0.7
    """Share of the guided output's standard deviation that is set back; 0 to 1."""
    negative_prompt: str = ""
    """What guidance steers away from."""
    clip_skip: int = 0
    """Last layers of the text encoder to leave out for the prompts, as clip_skip of diffusers; the
    negative prompt has all. 1 is what other tools call clip skip 2."""
    timestep_spacing: Spacing | None = None
    """Visit other timesteps than the checkpoint says, for a comparison; the report says so."""
    allow_unsound: bool = False
    """Sample a process that cannot work, for a comparison; the report says so."""
    height: int | None = None
    """Height in px, a multiple of 8; the model's own if not set."""
    width: int | None = None
    """Width in px, a multiple of 8; the model's own if not set."""
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
    batch_size: int = 16
    """Images sampled at once; changes them by rounding alone."""

    def __post_init__(self) -> None:
        for name in ("num_images", "num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        check_seed("seed", self.seed, largest=MAX_STORED_SEED)
        if self.keep_images is not None and self.keep_images < 0:
            raise UserError(f"keep_images={self.keep_images} must be 0 or more, or null for all")
        for name, each in self.verifiers.items():
            if each.kind in OF_RUNS:
                raise UserError(
                    f"verifiers.{name}.kind={each.kind} does not judge a picture by itself; FID "
                    "and IS are under sets, stability is a verifier of searches"
                )
            if name in COLUMNS:
                raise UserError(
                    f"verifiers.{name}: that name is kept for another column; choose another"
                )
        from blackpoint.sampling.guidance import Guidance  # torch: for a config, not for its help
        from blackpoint.sampling.samplers import check_sampler

        check_sampler(self.sampler, self.eta)
        Guidance(self.guidance_scale, self.guidance_rescale)
