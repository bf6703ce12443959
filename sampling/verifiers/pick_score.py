"""PickScore: a CLIP-H that was trained on people's choices between images (Kirstain et al. 2023).

    score = exp(logit_scale) cos(image, prompt)

the logit of its softmax over candidates, so that a difference of 1 is odds of e.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from sampling.verifiers.batching import in_batches
from sampling.verifiers.clip import Clip
from sampling.verifiers.verifier import Images

EXAMPLE = "yuvalkirstain/PickScore_v1"


class PickScore:
    """Verifier of a transformers CLIPModel folder with a trained logit scale."""

    preview_log_snr: float | None = None

    def __init__(self, clip: Clip, name: str = "pick_score", batch_size: int = 16) -> None:
        self.name = name
        self.differentiable = clip.differentiable
        self._clip = clip
        self._batch_size = batch_size

    def score(
        self, images: Images, prompts: Sequence[str], previews: Images | None = None
    ) -> Float[Tensor, " n"]:
        """Returns the scaled cosine."""
        cosines = in_batches(self._clip.cosines, images, prompts, self._batch_size)
        return self._clip.model.logit_scale.float().exp() * cosines
