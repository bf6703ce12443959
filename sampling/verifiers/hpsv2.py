"""HPSv2: a CLIP-H that was trained on people's rankings of generated images (Wu et al. 2023).

    score = cos(image, prompt)

The weights are those of an open_clip ViT-H-14, so that package runs them (the extra `hpsv2`). As
HPSv2's own code does, an image is resized by its longer edge and padded to a square with black.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from data.files.errors import UserError
from sampling.verifiers.batching import in_batches
from sampling.verifiers.clip import MAX_REMEMBERED, warn_if_cut
from sampling.verifiers.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from sampling.verifiers.pretrained import frozen, load_weights
from sampling.verifiers.verifier import Images

ARCHITECTURE = "ViT-H-14"
REMEDY = "download HPS_v2.1_compressed.pt (or HPS_v2_compressed.pt) of xswu/HPSv2 and give its path"


class HpsV2:
    """Verifier of an open_clip model; scores are cosines, about 0.2 to 0.4."""

    preview_log_snr: float | None = None
    differentiable = True

    def __init__(
        self, model: Any, tokenizer: Any, name: str = "hpsv2", batch_size: int = 16
    ) -> None:
        self.name = name
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._texts: dict[str, Tensor] = {}
        size = model.visual.image_size
        side = size if isinstance(size, int) else size[0]
        self._preprocess = Preprocessing(
            longest_edge=side, crop=(side, side), clamp=False, mean=CLIP_MEAN, std=CLIP_STD
        )

    def score(
        self, images: Images, prompts: Sequence[str], previews: Images | None = None
    ) -> Float[Tensor, " n"]:
        """Returns the cosine of each image with its prompt."""
        return in_batches(self._score, images, prompts, self._batch_size)

    def _score(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        weight = next(self._model.parameters())
        pixels = self._preprocess(images.to(weight.device)).to(weight.dtype)
        features = self._model.encode_image(pixels, normalize=True).float()
        if len(self._texts) > MAX_REMEMBERED:
            self._texts.clear()
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._texts:
                self._texts[prompt] = self._text_features(prompt, weight.device)
        return (features * torch.stack([self._texts[prompt] for prompt in prompts])).sum(dim=-1)

    @torch.no_grad()
    def _text_features(self, prompt: str, device: torch.device) -> Float[Tensor, " d"]:
        num_tokens = len(self._tokenizer.encode(prompt)) + 2  # start and end
        warn_if_cut(prompt, num_tokens, self._tokenizer.context_length)
        tokens = self._tokenizer([prompt]).to(device)
        return self._model.encode_text(tokens, normalize=True)[0].float()


def load_hpsv2(
    checkpoint: str,
    device: torch.device,
    dtype: torch.dtype,
    name: str = "hpsv2",
    batch_size: int = 16,
    architecture: str = ARCHITECTURE,
) -> HpsV2:
    """Loads the state dict of an open_clip model once; raises UserError for what is missing."""
    try:
        import open_clip
    except ImportError as error:
        raise UserError(
            f"kind=hpsv2 needs the package open_clip ({error}); install the extra: "
            "pip install 'blackpoint[hpsv2]'"
        ) from error
    state = load_weights(Path(checkpoint), "checkpoint", REMEDY)
    model: Any = open_clip.create_model(architecture, precision="fp32", load_weights=False)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(
            f"checkpoint={checkpoint} does not hold an open_clip {architecture} ({reason:.200}); "
            f"{REMEDY}"
        ) from error
    tokenizer = open_clip.get_tokenizer(architecture)
    return HpsV2(frozen(model.to(device, dtype)), tokenizer, name, batch_size)
