"""HPSv2: a CLIP-H that was trained on people's rankings of generated images (Wu et al. 2023).

    score = cos(image, prompt)

The weights are those of an open_clip ViT-H-14, so that package runs them (the extra `hpsv2`). As
HPSv2's own code does, an image is resized by its longer edge and padded to a square with black.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.verifiers.kind import VerifierKind, VerifierOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from blackpoint.sampling.verifiers.verifier import Images, ImageVerifier

ARCHITECTURE = "ViT-H-14"
REMEDY = "download HPS_v2.1_compressed.pt (or HPS_v2_compressed.pt) of xswu/HPSv2 and give its path"


class HpsV2:
    """An open_clip model with its tokenizer; scores are cosines, about 0.2 to 0.4."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        from blackpoint.sampling.verifiers.models.clip import TextCache
        from blackpoint.sampling.verifiers.models.preprocessing import (
            CLIP_MEAN,
            CLIP_STD,
            Preprocessing,
        )

        self._model, self._tokenizer = model, tokenizer
        self._texts = TextCache(self._text_features)
        size = model.visual.image_size
        side = size if isinstance(size, int) else size[0]
        self._preprocess = Preprocessing(
            longest_edge=side, crop=(side, side), clamp=False, mean=CLIP_MEAN, std=CLIP_STD
        )

    def scores(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Returns the cosine of each image with its prompt."""
        weight = next(self._model.parameters())
        pixels = self._preprocess(images.to(weight.device)).to(weight.dtype)
        features = self._model.encode_image(pixels, normalize=True).float()
        return (features * self._texts(prompts)).sum(dim=-1)

    def _text_features(self, prompts: list[str]) -> Tensor:
        from blackpoint.sampling.verifiers.models.clip import warn_if_cut

        for prompt in prompts:
            num_tokens = len(self._tokenizer.encode(prompt)) + 2  # start and end
            warn_if_cut(prompt, num_tokens, self._tokenizer.context_length)
        tokens = self._tokenizer(prompts).to(next(self._model.parameters()).device)
        return self._model.encode_text(tokens, normalize=True).float()


def load(config: VerifierOptions, device: torch.device, dtype: torch.dtype) -> ImageVerifier:
    """Loads the state dict of an open_clip model once; raises UserError for a missing part."""
    from blackpoint.sampling.verifiers.models.pretrained import frozen, load_weights
    from blackpoint.sampling.verifiers.verifier import ImageVerifier

    try:
        import open_clip
    except ImportError as error:
        raise UserError(
            f"kind=hpsv2 needs the package open_clip ({error}); install the extra: "
            "pip install -e '.[hpsv2]'"
        ) from error
    state = load_weights(Path(str(config.checkpoint)), "checkpoint", REMEDY)
    model: Any = open_clip.create_model(ARCHITECTURE, precision="fp32", load_weights=False)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(
            f"checkpoint={config.checkpoint} does not hold an open_clip {ARCHITECTURE} "
            f"({reason:.200}); {REMEDY}"
        ) from error
    tokenizer = open_clip.get_tokenizer(ARCHITECTURE)
    return ImageVerifier(config, HpsV2(frozen(model.to(device, dtype)), tokenizer).scores)


KIND = VerifierKind(
    load,
    checkpoint="the file of weights, HPS_v2.1_compressed.pt of the hub's xswu/HPSv2",
    highest=lambda config: 1.0,
    files={},
)
