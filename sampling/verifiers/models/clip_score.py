"""CLIPScore: how well an image shows what its prompt says (Hessel et al. 2021).

    score = 100 max(cos(image, prompt), 0)

as torchmetrics and most tables report it; the paper's own factor is 2.5 on the same cosine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blackpoint.sampling.verifiers.kind import VerifierKind, VerifierOptions

if TYPE_CHECKING:
    import torch

    from blackpoint.sampling.verifiers.verifier import ImageVerifier

EXAMPLE = "openai/clip-vit-large-patch14"


def load(config: VerifierOptions, device: torch.device, dtype: torch.dtype) -> ImageVerifier:
    """Loads any transformers CLIPModel; scores are from 0 to 100."""
    from blackpoint.sampling.verifiers.models.clip import load_clip
    from blackpoint.sampling.verifiers.verifier import ImageVerifier

    clip = load_clip(config, EXAMPLE, device, dtype)
    return ImageVerifier(
        config,
        lambda images, prompts: 100 * clip.cosines(images, prompts).clamp(min=0),
        clip.differentiable,
    )


KIND = VerifierKind(
    load,
    checkpoint=f"a CLIP folder or hub id, such as {EXAMPLE}",
    highest=lambda config: 100.0,
)
