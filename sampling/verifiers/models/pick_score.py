"""PickScore: a CLIP-H that was trained on people's choices between images (Kirstain et al. 2023).

    score = exp(logit_scale) cos(image, prompt)

the logit of its softmax over candidates, so that a difference of 1 is odds of e.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blackpoint.sampling.verifiers.kind import VerifierKind, VerifierOptions

if TYPE_CHECKING:
    import torch

    from blackpoint.sampling.verifiers.verifier import ImageVerifier

EXAMPLE = "yuvalkirstain/PickScore_v1"


def load(config: VerifierOptions, device: torch.device, dtype: torch.dtype) -> ImageVerifier:
    """Loads a transformers CLIPModel with a trained logit scale."""
    from blackpoint.sampling.verifiers.models.clip import load_clip
    from blackpoint.sampling.verifiers.verifier import ImageVerifier

    clip = load_clip(config, EXAMPLE, device, dtype)
    scale = clip.model.logit_scale.float().exp()
    return ImageVerifier(
        config, lambda images, prompts: scale * clip.cosines(images, prompts), clip.differentiable
    )


KIND = VerifierKind(load, checkpoint=f"a PickScore folder or hub id, such as {EXAMPLE}")
