"""LAION's aesthetic predictor: how well people would like an image, about 1 to 10.

    score = head(f(image) / |f(image)|),  f = CLIP-L/14

The head is a chain of linear layers (its dropout is off and it has no other non-linearity), which
is what the files of LAION's predictors hold: the MLP "sac+logos+ava1-l14-linearMSE" as layers.N,
the first, one linear layer, as weight and bias. It does not read the prompt.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.verifiers.batching import in_batches
from blackpoint.sampling.verifiers.image_model import ImageModel
from blackpoint.sampling.verifiers.models.linear_head import linear_chain
from blackpoint.sampling.verifiers.pretrained import frozen, load_weights
from blackpoint.sampling.verifiers.verifier import Images

BASE = "openai/clip-vit-large-patch14"
REMEDY = (
    "give the head of LAION's improved aesthetic predictor, "
    "sac+logos+ava1-l14-linearMSE.pth or its .safetensors"
)


class Aesthetic:
    """Verifier of CLIP's image features and a small head on them."""

    preview_log_snr: float | None = None

    def __init__(
        self,
        features: ImageModel,
        head: nn.Sequential,
        name: str = "aesthetic",
        batch_size: int = 16,
    ) -> None:
        self.name = name
        self.differentiable = features.differentiable
        self._features = features
        self._head = head
        self._batch_size = batch_size

    def score(
        self, images: Images, prompts: Sequence[str], previews: Images | None = None
    ) -> Float[Tensor, " n"]:
        """Returns the predicted rating."""
        return in_batches(self._score, images, prompts, self._batch_size)

    def _score(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        features = nn.functional.normalize(self._features(images), dim=-1)
        width = self._head[0].in_features
        if features.shape[1] != width:
            raise UserError(
                f"base: its image features have {features.shape[1]} numbers and the head takes "
                f"{width}; the head of LAION's predictor belongs to {BASE}"
            )
        return self._head(features)[:, 0]


def load_head(checkpoint: str, device: torch.device) -> nn.Sequential:
    """Reads the head, in float32; raises UserError for a file that is none."""
    state = load_weights(Path(checkpoint), "checkpoint", REMEDY)
    try:
        head = linear_chain(state)
    except ValueError as error:
        raise UserError(f"checkpoint={checkpoint} holds no head ({error}); {REMEDY}") from error
    frozen(head.to(device))
    return head
