"""CLIPScore: how well an image shows what its prompt says (Hessel et al. 2021).

    score = 100 max(cos(image, prompt), 0)

as torchmetrics and most tables report it; the paper's own factor is 2.5 on the same cosine.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from blackpoint.sampling.verifiers.models.clip import CosineVerifier
from blackpoint.sampling.verifiers.verifier import Images

EXAMPLE = "openai/clip-vit-large-patch14"


class ClipScore(CosineVerifier):
    """Verifier of any transformers CLIPModel; scores from 0 to 100."""

    kind = "clip_score"

    def score(
        self, images: Images, prompts: Sequence[str], previews: Images | None = None
    ) -> Float[Tensor, " n"]:
        """Returns 100 times the cosine, not below 0."""
        return 100 * self.cosines(images, prompts).clamp(min=0)
