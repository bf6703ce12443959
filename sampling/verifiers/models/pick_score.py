"""PickScore: a CLIP-H that was trained on people's choices between images (Kirstain et al. 2023).

    score = exp(logit_scale) cos(image, prompt)

the logit of its softmax over candidates, so that a difference of 1 is odds of e.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from blackpoint.sampling.verifiers.models.clip import CosineVerifier
from blackpoint.sampling.verifiers.verifier import Images

EXAMPLE = "yuvalkirstain/PickScore_v1"


class PickScore(CosineVerifier):
    """Verifier of a transformers CLIPModel folder with a trained logit scale."""

    kind = "pick_score"

    def score(
        self, images: Images, prompts: Sequence[str], previews: Images | None = None
    ) -> Float[Tensor, " n"]:
        """Returns the scaled cosine."""
        return self._clip.model.logit_scale.float().exp() * self.cosines(images, prompts)
