"""CLIPScore: how well an image shows what its prompt says (Hessel et al. 2021).

    score = 100 max(cos(image, prompt), 0)

as torchmetrics and most tables report it; the paper's own factor is 2.5 on the same cosine.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from sampling.verifiers.batching import in_batches
from sampling.verifiers.clip import Clip
from sampling.verifiers.verifier import Images

EXAMPLE = "openai/clip-vit-large-patch14"


class ClipScore:
    """Verifier of any transformers CLIPModel; scores from 0 to 100."""

    preview_log_snr: float | None = None

    def __init__(self, clip: Clip, name: str = "clip_score", batch_size: int = 16) -> None:
        self.name = name
        self.differentiable = clip.differentiable
        self._clip = clip
        self._batch_size = batch_size

    def score(
        self, images: Images, prompts: Sequence[str], previews: Images | None = None
    ) -> Float[Tensor, " n"]:
        """Returns 100 times the cosine, not below 0."""
        cosines = in_batches(self._clip.cosines, images, prompts, self._batch_size)
        return 100 * cosines.clamp(min=0)
