"""Embeddings that are a function of the text, in the place of large text encoders."""

from typing import Any

import torch


def words(text: str, width: int, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns stand-in embeddings of a text, (1, words, width), and their mask."""
    tokens = [sum(map(ord, word)) for word in text.split()] or [1]
    rows = [torch.randn(width, generator=torch.Generator().manual_seed(t)) for t in tokens]
    length = length or len(rows)
    embeds = torch.zeros(1, length, width)
    embeds[0, : len(rows)] = torch.stack(rows)
    mask = (torch.arange(length) < len(rows)).long()[None]
    return embeds, mask


def batch(texts: Any, width: int, length: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns those of all texts, padded to the longest where no length is given."""
    texts = [texts] if isinstance(texts, str) else texts
    length = length or max(len(text.split()) or 1 for text in texts)
    parts = [words(text, width, length) for text in texts]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def with_stand_in(pipeline: Any, width: int, length: int | None) -> Any:
    """Gives a pipeline an `encode_prompt` of stand-in embeddings, of both branches."""

    def encode_prompt(
        prompt: Any,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Any = None,
        num_images_per_prompt: int = 1,
        device: Any = None,
        **_: Any,
    ) -> Any:
        count = 1 if isinstance(prompt, str) else len(prompt)
        negative = negative_prompt if isinstance(negative_prompt, list) else [""] * count
        unconditional = (
            batch(negative, width, length) if do_classifier_free_guidance else (None,) * 2
        )
        return (*batch(prompt, width, length), *unconditional)

    pipeline.encode_prompt = encode_prompt
    return pipeline
