"""LAION's aesthetic predictor: how well people would like an image, about 1 to 10.

    score = head(f(image) / |f(image)|),  f = CLIP-L/14

The head is a chain of linear layers (its dropout is off and it has no other non-linearity), which
is what the files of LAION's predictors hold: the MLP "sac+logos+ava1-l14-linearMSE" as layers.N,
the first, one linear layer, as weight and bias. It does not read the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.verifiers.kind import MODEL_FILES, VerifierKind, VerifierOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from blackpoint.sampling.verifiers.verifier import Images, ImageVerifier

BASE = "openai/clip-vit-large-patch14"
REMEDY = (
    "give the head of LAION's improved aesthetic predictor, "
    "sac+logos+ava1-l14-linearMSE.pth or its .safetensors"
)


def load(config: VerifierOptions, device: torch.device, dtype: torch.dtype) -> ImageVerifier:
    """Loads the head from the checkpoint, and the CLIP that it stands on from `base`."""
    from torch.nn.functional import normalize

    from blackpoint.sampling.verifiers.models.image_model import load_features
    from blackpoint.sampling.verifiers.verifier import ImageVerifier

    head = load_head(str(config.checkpoint), device)
    clip = load_features(config.base or BASE, None, device, dtype, field="base")
    width = head[0].in_features

    def scores(images: Images, prompts: Sequence[str]) -> Tensor:
        features = normalize(clip(images), dim=-1)
        if features.shape[1] != width:
            raise UserError(
                f"base: its image features have {features.shape[1]} numbers and the head takes "
                f"{width}; the head of LAION's predictor belongs to {BASE}"
            )
        return head(features)[:, 0]

    return ImageVerifier(config, scores, clip.differentiable)


def load_head(checkpoint: str, device: torch.device) -> nn.Sequential:
    """Reads the head, in float32; raises UserError for a file that is none."""
    from blackpoint.sampling.verifiers.models.pretrained import frozen, linear_chain, load_weights

    state = load_weights(Path(checkpoint), "checkpoint", REMEDY)
    try:
        head = linear_chain(state)
    except ValueError as error:
        raise UserError(f"checkpoint={checkpoint} holds no head ({error}); {REMEDY}") from error
    frozen(head.to(device))
    return head


KIND = VerifierKind(
    load,
    checkpoint="the head's file, sac+logos+ava1-l14-linearMSE.pth of LAION's predictor",
    files={"base": MODEL_FILES},
    defaults={"base": BASE},
)
