"""Which verifiers a search uses, and how they are loaded: once, on a device, in a number format.

No import of torch at the top, so that the help of a verb that has verifiers is instant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import PathText
from blackpoint.sampling.verifiers import custom, luminance, oracle, stability
from blackpoint.sampling.verifiers.kind import VerifierKind, VerifierOptions
from blackpoint.sampling.verifiers.models import (
    aesthetic,
    classifier,
    clip_score,
    hpsv2,
    image_reward,
    pick_score,
    self_supervised,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from blackpoint.sampling.verifiers.verifier import TrajectoryVerifier, Verifier

KINDS = {
    "clip_score": clip_score.KIND,
    "pick_score": pick_score.KIND,
    "aesthetic": aesthetic.KIND,
    "hpsv2": hpsv2.KIND,
    "image_reward": image_reward.KIND,
    "classifier": classifier.KIND,
    "self_supervised": self_supervised.KIND,
    "oracle": oracle.KIND,
    "luminance": luminance.KIND,
    "stability": stability.KIND,
    "custom": custom.KIND,
}
"""The table of verifiers."""
if TYPE_CHECKING:
    KindName = str
else:
    KindName = Literal[tuple(KINDS)]

_CONFIGS = [kind.config for kind in KINDS.values() if kind.config is not VerifierOptions]
_KeysOfKinds: Any = type("_KeysOfKinds", tuple(reversed(_CONFIGS)), {})  # the last's keys are first


@dataclass
class VerifierConfig(_KeysOfKinds, VerifierOptions):
    """One verifier: its kind, its settings and its weight."""

    kind: KindName = "clip_score"
    """Kind of verifier."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"kind={self.kind} is no verifier; use {', '.join(KINDS)}")
        kind = KINDS[self.kind]
        for name, value in (("checkpoint", self.checkpoint), ("module", self.module)):
            if value == "":
                raise UserError(f"{name} is empty; leave it out or give one")
        if kind.checkpoint and self.checkpoint is None:
            raise UserError(
                f"checkpoint is not set and kind={self.kind} needs it: give {kind.checkpoint}"
            )
        if kind.has_model and self.checkpoint is None and self.module is None:
            raise UserError(
                f"checkpoint and module are not set and kind={self.kind} needs one: a transformers "
                "folder or hub id, or package.module:name"
            )
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1")
        kind.check(self)

    @property
    def declared(self) -> VerifierKind:
        """Declarations of its kind."""
        return KINDS[self.kind]


@dataclass
class ImageModelConfig:
    """A network of images, for the metrics of sets and the diversity of winners."""

    checkpoint: PathText | None = None
    """A transformers folder or hub id."""
    module: str | None = None
    """Import path package.module:name of a module of images in [0, 1]."""

    @property
    def is_set(self) -> bool:
        """Whether there is one."""
        return self.checkpoint is not None or self.module is not None


def load_verifiers(
    configs: Mapping[str, VerifierConfig], device: torch.device
) -> dict[str, Verifier | TrajectoryVerifier]:
    """Loads every verifier, by name; those of one CLIP folder share its towers."""
    from blackpoint.sampling.verifiers.models.clip import shared_clips

    loaded: dict[str, Verifier | TrajectoryVerifier] = {}
    with shared_clips():
        for name, config in configs.items():
            try:
                loaded[name] = load_verifier(replace(config, name=name), device)
            except UserError as error:
                raise UserError(f"verifier {name}: {error}") from error
    return loaded


def load_verifier(config: VerifierConfig, device: torch.device) -> Verifier | TrajectoryVerifier:
    """Loads the verifiers of a config; raises UserError naming the file that is missing."""
    import torch

    from blackpoint.sampling.runtime.precision import check_dtype

    check_dtype(device, config.dtype)
    return KINDS[config.kind].load(config, device, getattr(torch, config.dtype))
