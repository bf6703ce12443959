"""Scores or features of many images, a batch at a time: one image's never depend on the others'."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from data.files.errors import RunFailed
from sampling.verifiers.verifier import Images


def in_batches(
    score: Callable[[Images, Sequence[str]], Tensor],
    images: Images,
    prompts: Sequence[str],
    batch_size: int,
) -> Tensor:
    """Applies `score` to at most `batch_size` images at once and joins the rows."""
    if len(images) != len(prompts):
        raise RunFailed(f"{len(images)} images cannot be scored against {len(prompts)} prompts")
    starts = range(0, len(images), batch_size)
    parts = [
        score(images[start : start + batch_size], prompts[start : start + batch_size])
        for start in starts
    ]
    return torch.cat(parts) if parts else images.new_zeros(0)


def cosine(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Returns the cosine of each pair of rows, in float32."""
    return torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)
