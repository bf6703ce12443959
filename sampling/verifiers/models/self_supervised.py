"""Self-supervised: an image is good if the model saw it coming (Ma et al. 2025).

    score = cos(features(x0-prediction at a low noise level), features(final image))

It needs no labels and no text; it rewards noises whose trajectory settles early.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blackpoint.data.files.errors import RunFailed
from blackpoint.sampling.verifiers.kind import VerifierKind, VerifierOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from blackpoint.sampling.verifiers.verifier import Images, ImageVerifier


@dataclass
class SelfSupervisedConfig(VerifierOptions):
    """Keys of kind=self_supervised."""

    preview_log_snr: float = 4.18
    """self_supervised: log SNR of the x0-prediction that is compared with the final image."""
    # 2 log(.89 / .11): level .11 of linear-flow time, where Ma et al.'s search over paths starts


def load(config: SelfSupervisedConfig, device: torch.device, dtype: torch.dtype) -> ImageVerifier:
    """Loads the features, and compares each final image's with its preview's."""
    from torch.nn.functional import cosine_similarity

    from blackpoint.sampling.verifiers.models.image_model import load_features
    from blackpoint.sampling.verifiers.verifier import ImageVerifier

    features = load_features(config.checkpoint, config.module, device, dtype)

    def scores(images: Images, prompts: Sequence[str], previews: Images | None) -> Tensor:
        if previews is None or len(previews) != len(images):
            raise RunFailed(
                f"verifier {config.column} needs one preview per image, the x0-prediction at log "
                f"SNR {config.preview_log_snr}"
            )
        return cosine_similarity(features(images), features(previews), dim=-1)

    log_snr = config.preview_log_snr
    return ImageVerifier(config, scores, features.differentiable, preview_log_snr=log_snr)


KIND = VerifierKind(
    load,
    SelfSupervisedConfig,
    has_model=True,
    needs="trajectory",
    looks="compares a run's preview with its end",
    forms=("whole",),
    highest=lambda config: 1.0,
)
