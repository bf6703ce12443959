"""Declarations of a kind of verifier, and the keys that every kind has.

A kind is a file that ends in `KIND = VerifierKind(load, ...)`, its config above, and a line in
KINDS (sampling/verifiers/load.py). Such files import torch where they use it and not at the top, so
that the help of a verb that has verifiers is instant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import PathText
from blackpoint.sampling.choices import Dtype

if TYPE_CHECKING:
    import torch

Needs = Literal["image", "trajectory", "set"]
"""Input of a score: the image with its prompt; more of the run that made it; other images, too"""
RunForm = Literal["whole", "parts", "mixed", "gradient"]
"""How a search runs a candidate: whole, from a noise of its own; in parts, from a noise of its own;
in parts that go on from another's; or whole, and differentiated."""

MODEL_FILES = ("*.json", "*.txt", "model*.safetensors")
"""The files of a transformers model on the hub that are read."""
EnsembleRule = Literal["mean_rank", "z_score", "minimum", "weighted_sum"]
"""How several verifiers rank candidates (sampling/verifiers/ensemble.py)."""


@dataclass
class VerifierOptions:
    """The keys of every verifier."""

    kind: str = "clip_score"
    """Kind of verifier."""
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
    """Base of the checkpoint: the CLIP of aesthetic, the tokenizer of image_reward."""

    @property
    def column(self) -> str:
        """Name of its scores."""
        return self.name or self.kind


@dataclass(frozen=True)
class VerifierKind:
    """One kind: how it is loaded, its config, and its input."""

    load: Callable[[Any, torch.device, torch.dtype], Any]
    """(config, device, number format of its weights) -> what sampling/verifiers/verifier.py calls a
    verifier; raises UserError."""
    config: type = VerifierOptions
    """A dataclass derived from VerifierOptions; its keys are told apart from those of other kinds
    by their names."""
    check: Callable[[Any], None] = lambda config: None
    """Raises UserError for settings that cannot be."""
    checkpoint: str = ""
    """Remedy for a missing checkpoint, where one is required."""
    has_model: bool = False
    """Whether checkpoint or module must be given."""
    files: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"checkpoint": MODEL_FILES}
    )
    """Key that may hold a hub id -> patterns of the files that are read of it."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Key -> the hub id that it stands for where it is not set."""
    needs: Needs = "image"
    looks: str = ""
    """Its use of more than an image, as messages say it: "compares a run with its noise"."""
    forms: tuple[RunForm, ...] = ("whole", "parts", "mixed", "gradient")
    """The runs of a search that it can judge."""
    highest: Callable[[Any], float] = lambda config: math.inf
    """(config) -> the highest score that an image can have."""
    inverts: bool = False
    """Whether it goes back the way that deterministic DDIM came."""


def check_weights(weights: Sequence[float], rule: EnsembleRule) -> None:
    """Raises UserError for weights that rank nothing, or turn a rank around."""
    shown = f"weight={[*weights]}"
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise UserError(f"{shown} must be finite numbers, not all 0")
    if rule != "weighted_sum" and min(weights) < 0:
        raise UserError(
            f"{shown} must be 0 or more for ensemble={rule}; a weighted_sum alone takes a verifier "
            "with the opposite sign"
        )
