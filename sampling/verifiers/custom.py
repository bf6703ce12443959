"""A user's own verifier by import path, "package.module:name".

A function takes images (n, 3, h, w) in [0, 1] and n prompts and returns n scores; a class has the
method `score(images, prompts, previews)` and may have a name, a preview_log_snr and differentiable.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.verifiers.import_path import built_object
from blackpoint.sampling.verifiers.pretrained import frozen
from blackpoint.sampling.verifiers.verifier import Images, Verifier


class Custom:
    """Verifier of a function, or of an object with the method `score`; defaults for the rest."""

    def __init__(self, scorer: Any, name: str, device: torch.device, batch_size: int = 16) -> None:
        self.name = name
        self.preview_log_snr: float | None = getattr(scorer, "preview_log_snr", None)
        self.differentiable = bool(getattr(scorer, "differentiable", False))
        self._scorer = scorer
        self._device = device
        self._batch_size = batch_size

    def score(
        self, images: Images, prompts: Sequence[str], previews: Images | None = None
    ) -> Float[Tensor, " n"]:
        """Returns what the user's code returns; RunFailed unless that is one score an image."""
        parts = []
        for start in range(0, len(images), self._batch_size):
            rows = slice(start, start + self._batch_size)
            seen = None if previews is None else previews[rows].to(self._device)
            parts.append(self._score(images[rows].to(self._device), list(prompts[rows]), seen))
        return torch.cat(parts) if parts else images.new_zeros(0)

    def _score(self, images: Images, prompts: list[str], previews: Images | None) -> Tensor:
        if hasattr(self._scorer, "score"):
            answer = self._scorer.score(images, prompts, previews)
        else:
            answer = self._scorer(images, prompts)
        try:
            scores = torch.as_tensor(answer)
        except (TypeError, ValueError, RuntimeError):
            scores = None
        if scores is None or tuple(scores.shape) != (len(images),):
            found = type(answer).__name__ if scores is None else tuple(scores.shape)
            raise RunFailed(
                f"verifier {self.name} returned {found} for {len(images)} images; it must return "
                f"one score an image, of shape ({len(images)},)"
            )
        return scores


def load_custom(
    path: str,
    checkpoint: str | None,
    name: str | None,
    device: torch.device,
    batch_size: int,
) -> Verifier:
    """Returns the verifier that a function, class or object makes; raises UserError."""
    found = built_object(path, "module", checkpoint)
    if isinstance(found, nn.Module):
        found = frozen(found.to(device))
    title = name or getattr(found, "name", None) or path.partition(":")[2]
    if not hasattr(found, "score") and not callable(found):
        raise UserError(
            f"module={path} is a {type(found).__name__}; name a function (images, prompts) -> "
            "scores, or a class with the method score(images, prompts, previews)"
        )
    return Custom(found, title, device, batch_size)
