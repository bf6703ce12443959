"""Self-supervised: an image is good if the model saw it coming (Ma et al. 2025).

    score = cos(features(x0-prediction at a low noise level), features(final image))

It needs no labels and no text; it rewards noises whose trajectory settles early.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from data.files.errors import RunFailed
from sampling.verifiers.batching import cosine
from sampling.verifiers.image_model import ImageModel
from sampling.verifiers.verifier import Images

DEFAULT_LOG_SNR = 4.18
"""2 log(.89 / .11): level .11 of linear-flow time, where Ma et al.'s search over paths starts."""


class SelfSupervised:
    """Verifier of any image features; wants a preview beside each final image."""

    def __init__(
        self,
        features: ImageModel,
        preview_log_snr: float = DEFAULT_LOG_SNR,
        name: str = "self_supervised",
        batch_size: int = 16,
    ) -> None:
        self.name = name
        self.preview_log_snr: float | None = preview_log_snr
        self.differentiable = features.differentiable
        self._features = features
        self._batch_size = batch_size

    def score(
        self, images: Images, prompts: Sequence[str], previews: Images | None = None
    ) -> Float[Tensor, " n"]:
        """Returns the cosine of each image's features with its preview's."""
        if previews is None or len(previews) != len(images):
            raise RunFailed(
                f"verifier {self.name} needs one preview an image, the x0-prediction at log SNR "
                f"{self.preview_log_snr}"
            )
        pairs = zip(images.split(self._batch_size), previews.split(self._batch_size), strict=True)
        parts = [cosine(self._features(image), self._features(seen)) for image, seen in pairs]
        return torch.cat(parts) if len(images) else images.new_zeros(0)
