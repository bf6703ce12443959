"""The settings of `blackpoint evaluate`: one checkpoint, one sampling setting, every metric of it.

Free of torch, so that its help is instant. The fields of `MetricsConfig` that are sections of
metrics (metric.py) are the table of metrics, in the order in which they are shown.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields
from typing import Literal

from omegaconf import MISSING

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import OutputText, PathText
from blackpoint.data.files.rules import check_ranges, require
from blackpoint.sampling.choices import Prompts, Spacing, check_seed
from blackpoint.sampling.evaluation.metric import MetricConfig
from blackpoint.sampling.evaluation.metrics.brightness import ERROR, BrightnessConfig
from blackpoint.sampling.evaluation.metrics.sets import SetsConfig
from blackpoint.sampling.options import ROUNDING_KEYS, SamplingOptions
from blackpoint.sampling.samplers import check_sampler
from blackpoint.sampling.verifiers.load import VerifierConfig

MAX_STORED_SEED = 2**63 - 1
"""images.parquet keeps seeds as 64-bit integers."""
RESULT_INVARIANT_KEYS = (*ROUNDING_KEYS, "reference_cache", "keep_images")
"""Keys that change images and measurements only by rounding."""
COLUMNS = (
    *("prompt_index", "image", "prompt", "category", "seed", "file", "nfe", "sampling_s"),
    *("measuring_s", "peak_gb", "luminance", "border_luminance", "luminance_error", "asked_low"),
    *("asked_high", "asked_where", "features", "logits", "device", "dtype", "tf32"),
)
"""Columns of images.parquet whose names a verifier cannot have."""


@dataclass
class MetricsConfig(SamplingOptions):
    """One checkpoint and one sampling setting: set metrics, scores, brightness, each with its
    interval."""

    study: Literal["metrics"] = "metrics"
    """Always metrics; older configs have this key."""
    prompts: Prompts = MISSING
    """A prompt, a list of them (["a cat", "a dog"]), or a file: .txt (one per line), .jsonl, .csv,
    .tsv or .parquet. configs/prompts/brightness.jsonl is the brightness suite."""
    output: OutputText = MISSING
    """Folder to write; the same command there continues an evaluation that was stopped."""
    num_images: int = 1
    """Images of each prompt."""
    limit: int | None = None
    """Use at most this many prompts."""
    offset: int = 0
    """Skip this many prompts at the start."""
    seed: int = 0
    """Seed of the first image; image k of prompt i has seed + i * num_images + k."""
    sets: SetsConfig = field(default_factory=SetsConfig)
    """FID, KID, IS, precision, recall."""
    verifiers: dict[str, VerifierConfig] = field(default_factory=dict)
    """Verifiers that score each image, by name: alignment, preference, classes. A verifier without
    its weights is left out, with a note."""
    brightness: BrightnessConfig = field(default_factory=BrightnessConfig)
    """The brightness suite."""
    geneval: PathText | None = None
    """results.jsonl of GenEval's detector, whose scores are shown beside."""
    reference_cache: PathText | None = None
    """Folder for measurements of references, which evaluations can share; inside `output` if not
    set."""
    keep_images: int | None = 64
    """Number of images to keep as PNG, the first ones; null: all, as GenEval's detector needs."""
    timestep_spacing: Spacing | None = None
    """Timestep spacing other than the checkpoint's, for a comparison; the report names it."""
    allow_unsound: bool = False
    """Sample an unsound process, for a comparison; the report names it."""

    def __post_init__(self) -> None:
        check_ranges(self, "", num_images=">= 1", num_steps=">= 1", batch_size=">= 1")
        check_seed("seed", self.seed, largest=MAX_STORED_SEED)
        is_count = self.keep_images is None or self.keep_images >= 0
        require(is_count, "keep_images", self.keep_images, "0 or more, or null for all")
        for name, verifier in self.verifiers.items():
            if verifier.declared.needs != "image":
                raise UserError(
                    f"verifiers.{name}.kind={verifier.kind} does not judge a single image; FID "
                    "and IS are under sets, stability is a verifier of searches"
                )
            if name in COLUMNS:
                raise UserError(
                    f"verifiers.{name}: that name is kept for another column; choose another"
                )
        from blackpoint.sampling.guidance import Guidance  # torch: for a config, not for its help

        check_sampler(self.sampler, self.eta)
        Guidance(self.guidance_scale, self.guidance_rescale)


def metric_keys(config_class: type[MetricsConfig] = MetricsConfig) -> list[str]:
    """Lists the keys of metrics: they change measurements, but no image."""
    kinds = {section.name: section.default_factory for section in fields(config_class)}
    sections = [n for n, k in kinds.items() if isinstance(k, type) and issubclass(k, MetricConfig)]
    named = {*sections, "verifiers", "geneval"}  # two that are no sections of fixed keys
    return [name for name in kinds if name in named]


def not_asked(config: MetricsConfig, measured: Collection[str]) -> Iterator[str]:
    """Yields usual metrics that were not asked for, and what to set; `measured` are those shown."""
    if ERROR not in measured:
        yield f"{ERROR}: no prompt asks for one; prompts=configs/prompts/brightness.jsonl does"
    sets, kinds = config.sets, {verifier.kind for verifier in config.verifiers.values()}
    inception = "sets.inception=weights-inception-2015-12-05-6726825d.pth"
    has_features = sets.features.is_set or sets.inception is not None
    missing = [] if sets.reference else ["sets.reference=FOLDER"]
    missing += [] if has_features else [inception]
    if missing:
        yield f"FID, KID, precision, recall: set {' and '.join(missing)}"
    if not sets.has_classifier:
        yield f"IS: set {inception}"
    if "clip_score" not in kinds:
        yield (
            "CLIP score: set verifiers.clip.kind=clip_score and "
            "verifiers.clip.checkpoint=openai/clip-vit-large-patch14"
        )
    if config.geneval is None:
        yield "GenEval: set geneval=results.jsonl, of its detector"


def metrics_of(config: MetricsConfig) -> list[MetricConfig]:
    """Returns the metrics of a config, in the order in which they are shown.

    Raises UserError for a file of GenEval that cannot be read.
    """
    from blackpoint.sampling.evaluation.metrics.geneval import GenEval
    from blackpoint.sampling.evaluation.metrics.scores import Scores

    metrics = {key: getattr(config, key) for key in metric_keys(type(config))}
    metrics["verifiers"] = Scores(config.verifiers)
    metrics["geneval"] = GenEval(config.geneval, config.seed)
    return list(metrics.values())
