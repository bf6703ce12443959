"""Which verifiers a search uses, and how they are loaded: once, on a device, in a number format.

No import of torch at the top, so that the help of a verb that has verifiers is instant.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import PathText
from blackpoint.sampling.choices import Dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from blackpoint.sampling.verifiers.verifier import Verifier

Kind = Literal[
    "clip_score",
    "pick_score",
    "aesthetic",
    "hpsv2",
    "image_reward",
    "classifier",
    "self_supervised",
    "oracle",
    "luminance",
    "stability",
    "custom",
]

NEEDS_CHECKPOINT = {
    "clip_score": "a CLIP folder or hub id, such as openai/clip-vit-large-patch14",
    "pick_score": "a PickScore folder or hub id, such as yuvalkirstain/PickScore_v1",
    "aesthetic": "the head's file, sac+logos+ava1-l14-linearMSE.pth of LAION's predictor",
    "hpsv2": "the file of weights, HPS_v2.1_compressed.pt of the hub's xswu/HPSv2",
    "image_reward": "the folder with ImageReward.pt and med_config.json, or THUDM/ImageReward",
}
NEEDS_A_MODEL = ("classifier", "self_supervised", "oracle")


@dataclass
class VerifierConfig:
    """One verifier: what judges the images, and how much its judgement weighs."""

    kind: Kind = "clip_score"
    """clip_score, pick_score, aesthetic, hpsv2, image_reward, classifier, self_supervised, oracle,
    luminance, stability or custom."""
    checkpoint: PathText | None = None
    """Its weights: a transformers folder, a hub id, or the file of a head."""
    module: str | None = None
    """Import path package.module:name of a custom verifier, or of the classifier or features."""
    name: str | None = None
    """Column of its scores; its kind if not set. Two verifiers of one kind need two names."""
    weight: float = 1.0
    """Its weight among the verifiers of an ensemble."""
    dtype: Dtype = "float32"
    """Number format of its weights."""
    batch_size: int = 16
    """Images judged at once; changes scores by rounding alone."""
    base: PathText | None = None
    """What a checkpoint stands on: the CLIP of aesthetic, the tokenizer of image_reward."""
    label: str | None = None
    """classifier: name or number of the wanted class; found in each prompt if not set."""
    labels: list[str] = field(default_factory=list)
    """classifier: names of its classes in order; the model's own if empty."""
    output: Literal["logit", "log_prob", "top1"] = "log_prob"
    """classifier: the logit of the class, its log-probability, or whether it is the likeliest."""
    target: float | None = None
    """luminance: the wanted mean, 0 black to 1 white; read from each prompt if not set."""
    where: Literal["border", "image"] = "image"
    """luminance: where the target holds; the border is the outer two pixels."""
    preview_log_snr: float = 4.18
    """self_supervised: log SNR of the x0-prediction that is compared with the final image."""
    metric: Literal["fid", "is"] = "fid"
    """oracle: Frechet distance to the reference, or the Inception Score."""
    measure: Literal["cosine", "residual", "contraction"] = "cosine"
    """stability: of the noise with the re-inverted one, or how well the inversion's iteration does
    (minus the last change, minus the rate of changes)."""
    inversion: Literal["ddim", "fixed_point", "anderson", "renoise", "bdia"] = "ddim"
    """stability: how a step is inverted."""
    num_iterations: int = 5
    """stability: network evaluations a step; ddim has one."""
    model_time: Literal["noisy", "clean"] = "noisy"
    """stability, inversion=ddim: end of a step whose timestep the network is asked at (diffusers:
    noisy)."""
    inversion_guidance_scale: float = 1.0
    """stability: guidance of the inversion; 1 is off, and halves its NFE."""
    partial_steps: int | None = None
    """stability: invert from after so many sampling steps; from where the run stands if not set."""
    reference: PathText | None = None
    """oracle: folder of pictures, or .safetensors with mean and covariance of their features."""

    def __post_init__(self) -> None:
        for name, value in (("checkpoint", self.checkpoint), ("module", self.module)):
            if value == "":
                raise UserError(f"{name} is empty; leave it out or give one")
        if self.kind in NEEDS_CHECKPOINT and self.checkpoint is None:
            raise UserError(
                f"checkpoint is not set and kind={self.kind} needs it: give "
                f"{NEEDS_CHECKPOINT[self.kind]}"
            )
        if self.kind in NEEDS_A_MODEL and self.checkpoint is None and self.module is None:
            raise UserError(
                f"checkpoint and module are not set and kind={self.kind} needs one: a transformers "
                "folder or hub id, or package.module:name"
            )
        if self.kind == "custom" and self.module is None:
            raise UserError("module is not set and kind=custom needs it: give package.module:name")
        if self.kind == "oracle" and (self.reference is None) == (self.metric == "fid"):
            raise UserError(
                f"reference={self.reference}: metric=fid needs one (a folder of pictures or "
                ".safetensors) and metric=is has none"
            )
        if self.target is not None and not 0 <= self.target <= 1:
            raise UserError(f"target={self.target} must be from 0 (black) to 1 (white)")
        if self.kind == "stability" and self.inversion == "bdia":
            raise UserError(
                "inversion=bdia inverts its own sampler exactly: every noise would have the "
                "cosine 1, and nothing could be ranked; use ddim, fixed_point, anderson or renoise"
            )
        if self.partial_steps is not None and self.partial_steps < 1:
            raise UserError(f"partial_steps={self.partial_steps} must be at least 1")
        if self.num_iterations < 1:
            raise UserError(f"num_iterations={self.num_iterations} must be at least 1")
        if self.inversion_guidance_scale < 0:
            raise UserError(
                f"inversion_guidance_scale={self.inversion_guidance_scale} must be at least 0"
            )
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1")

    @property
    def column(self) -> str:
        """What its scores are called."""
        return self.name or self.kind


@dataclass
class ImageModelConfig:
    """A network of images for the metrics of sets."""

    checkpoint: PathText | None = None
    """A transformers folder or hub id."""
    module: str | None = None
    """Import path package.module:name of a module of images in [0, 1]."""

    @property
    def is_set(self) -> bool:
        """Whether there is one."""
        return self.checkpoint is not None or self.module is not None


def load_verifiers(
    configs: "Mapping[str, VerifierConfig]", device: "torch.device"
) -> "dict[str, Verifier]":
    """Loads every verifier, by name; those of one CLIP folder share its towers."""
    from blackpoint.sampling.verifiers.models.clip import shared_clips

    found: dict[str, Verifier] = {}
    with shared_clips():
        for name, config in configs.items():
            try:
                found[name] = load_verifier(config, device)
            except UserError as error:
                raise UserError(f"verifier {name}: {error}") from error
    return found


def load_verifier(config: VerifierConfig, device: "torch.device") -> "Verifier":
    """Loads what the config names; raises UserError naming the file that is missing."""
    import torch

    from blackpoint.sampling.runtime.precision import check_dtype

    dtype = getattr(torch, config.dtype)
    check_dtype(device, config.dtype)
    name, batch_size, checkpoint = config.column, config.batch_size, config.checkpoint or ""
    match config.kind:
        case "clip_score":
            from blackpoint.sampling.verifiers.models import clip_score
            from blackpoint.sampling.verifiers.models.clip import load_clip

            clip = load_clip(checkpoint, clip_score.EXAMPLE, device, dtype)
            return clip_score.ClipScore(clip, name, batch_size)
        case "pick_score":
            from blackpoint.sampling.verifiers.models import pick_score
            from blackpoint.sampling.verifiers.models.clip import load_clip

            clip = load_clip(checkpoint, pick_score.EXAMPLE, device, dtype)
            return pick_score.PickScore(clip, name, batch_size)
        case "aesthetic":
            from blackpoint.sampling.verifiers import image_model
            from blackpoint.sampling.verifiers.models import aesthetic

            head = aesthetic.load_head(checkpoint, device)
            base = config.base or aesthetic.BASE
            features = image_model.load_features(base, None, device, dtype, field="base")
            return aesthetic.Aesthetic(features, head, name, batch_size)
        case "hpsv2":
            from blackpoint.sampling.verifiers.models.hpsv2 import load_hpsv2

            return load_hpsv2(checkpoint, device, dtype, name, batch_size)
        case "image_reward":
            from blackpoint.sampling.verifiers.models.image_reward import load_image_reward

            return load_image_reward(checkpoint, config.base, device, dtype, name, batch_size)
        case "classifier":
            from blackpoint.sampling.verifiers import image_model
            from blackpoint.sampling.verifiers.models import classifier

            model = image_model.load_classifier(config.checkpoint, config.module, device, dtype)
            chosen = (config.labels, config.label, config.output)
            return classifier.Classifier(model, *chosen, name, batch_size)
        case "self_supervised":
            from blackpoint.sampling.verifiers import image_model
            from blackpoint.sampling.verifiers.models import self_supervised

            features = image_model.load_features(config.checkpoint, config.module, device, dtype)
            return self_supervised.SelfSupervised(
                features, config.preview_log_snr, name, batch_size
            )
        case "oracle":
            from blackpoint.sampling.verifiers import image_model, oracle

            source = (config.checkpoint, config.module, device, dtype)
            if config.reference is None:
                return oracle.Oracle(image_model.load_classifier(*source), None, name, batch_size)
            features = image_model.load_features(*source)
            reference = oracle.load_reference(config.reference, features)
            return oracle.Oracle(features, reference, name, batch_size)
        case "luminance":
            from blackpoint.sampling.verifiers.luminance import Luminance

            return Luminance(config.target, config.where, name, batch_size)
        case "stability":
            from blackpoint.sampling.inversion import Inverter
            from blackpoint.sampling.verifiers.stability import Stability

            assert config.inversion != "bdia"
            inverter = Inverter(
                config.inversion,
                config.num_iterations,
                config.model_time,
                num_averaged=min(3, config.num_iterations),
            )
            settings = (config.measure, config.inversion_guidance_scale, config.partial_steps)
            return Stability(inverter, *settings, name)
        case "custom":
            from blackpoint.sampling.verifiers.custom import load_custom

            path = config.module or ""
            return load_custom(path, config.checkpoint, config.name, device, batch_size)
    raise UserError(
        f"kind={config.kind} is no verifier; use clip_score, pick_score, aesthetic, hpsv2, "
        "image_reward, classifier, self_supervised, oracle, luminance, stability or custom"
    )
