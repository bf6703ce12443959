"""CLIP's two towers, for the verifiers that compare an image with its prompt (Radford et al. 2021).

cos(image, prompt) = <f(image), g(prompt)> / (|f(image)| |g(prompt)|)
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from blackpoint.data.files.notes import first
from blackpoint.sampling.checkpoints.loading import require_tokenizer
from blackpoint.sampling.verifiers.kind import VerifierOptions
from blackpoint.sampling.verifiers.models.preprocessing import load_preprocessing
from blackpoint.sampling.verifiers.models.pretrained import find_folder, load_model
from blackpoint.sampling.verifiers.verifier import Images

log = logging.getLogger(__name__)

MAX_REMEMBERED = 4096
TEXT_BATCH = 64


class TextCache:
    """Features of prompts, each computed once by `encode`, a batch of at most 64 at a time."""

    def __init__(self, encode: Callable[[list[str]], Tensor]) -> None:
        self._encode = encode
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Returns a row for each prompt."""
        if len(self._texts) > MAX_REMEMBERED:
            self._texts.clear()
        new = [text for text in dict.fromkeys(prompts) if text not in self._texts]
        for start in range(0, len(new), TEXT_BATCH):
            texts = new[start : start + TEXT_BATCH]
            self._texts.update(zip(texts, self._encode(texts), strict=True))
        return torch.stack([self._texts[text] for text in prompts])


class Clip:
    """A CLIPModel with its tokenizer and processor; prompts are encoded once."""

    def __init__(
        self, checkpoint: str, example: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        folder = find_folder(checkpoint, "checkpoint", example)
        self.preprocess = load_preprocessing(folder)
        require_tokenizer(folder)
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.model, _ = load_model(CLIPModel, folder, device, dtype)
        positions = self.model.config.text_config.max_position_embeddings
        self.max_tokens = min(self.tokenizer.model_max_length, positions)
        self.text_features = TextCache(self._text_features)

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the images."""
        return self.preprocess.differentiable

    def cosines(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """Returns the cosine of each image with its prompt, in float32."""
        pixels = self.preprocess(images.to(self.model.device)).to(self.model.dtype)
        features = self.model.get_image_features(pixel_values=pixels).pooler_output.float()
        texts = self.text_features(prompts)
        return (torch.nn.functional.normalize(features, dim=-1) * texts).sum(dim=-1)

    def _text_features(self, texts: list[str]) -> Float[Tensor, "n d"]:
        """Returns the prompts' features of norm 1; over-long ones are cut, with a warning."""
        tokens = self._tokens(texts).to(self.model.device)
        features = self.model.get_text_features(**tokens).pooler_output.float()
        return torch.nn.functional.normalize(features, dim=-1)

    def _tokens(self, texts: list[str]) -> Any:
        for text, ids in zip(texts, self.tokenizer(texts, verbose=False).input_ids, strict=True):
            warn_if_cut(text, len(ids), self.max_tokens)
        return self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        )


_shared: dict[tuple[str, torch.device, torch.dtype], Clip] | None = None


@contextmanager
def shared_clips() -> Iterator[None]:
    """Inside the block a folder that is loaded twice is loaded once."""
    global _shared
    _shared = {}
    try:
        yield
    finally:
        _shared = None


def load_clip(
    config: VerifierOptions, example: str, device: torch.device, dtype: torch.dtype
) -> Clip:
    """Loads a CLIP, or returns the one of the same folder; raises UserError."""
    known = {} if _shared is None else _shared
    key = (str(config.checkpoint), device, dtype)
    if key not in known:
        known[key] = Clip(key[0], example, device, dtype)
    return known[key]


def warn_if_cut(text: str, num_tokens: int, max_tokens: int) -> None:
    """Says that a verifier does not read the end of a prompt."""
    if num_tokens > max_tokens and first("prompts of which a verifier reads the start alone"):
        log.warning("a verifier reads %d of %d tokens of %.60r", max_tokens, num_tokens, text)
