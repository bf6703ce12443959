"""A user's own verifier by import path, "package.module:name".

A function takes images (n, 3, h, w) in [0, 1] and n prompts and returns n scores; a class has the
method `score(images, prompts, previews)` and may have a name, a preview_log_snr, differentiable,
takes_latents and log_snr_range (sampling/verifiers/verifier.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.verifiers.kind import VerifierKind, VerifierOptions

if TYPE_CHECKING:
    import torch

    from blackpoint.sampling.verifiers.verifier import Images, ImageVerifier


def load(config: VerifierOptions, device: torch.device, dtype: torch.dtype) -> ImageVerifier:
    """Returns the verifier that a function, class or object makes; raises UserError."""
    from torch import nn

    from blackpoint.sampling.verifiers.models.import_path import built_object
    from blackpoint.sampling.verifiers.models.pretrained import frozen
    from blackpoint.sampling.verifiers.verifier import ImageVerifier, takes_latents

    path = str(config.module)
    scorer: Any = built_object(path, "module", config.checkpoint)
    if isinstance(scorer, nn.Module):
        scorer = frozen(scorer.to(device))
    if not hasattr(scorer, "score") and not callable(scorer):
        raise UserError(
            f"module={path} is a {type(scorer).__name__}; name a function (images, prompts) -> "
            "scores, or a class with the method score(images, prompts, previews)"
        )

    def scores(images: Images, prompts: Sequence[str], previews: Images | None = None) -> Any:
        if not hasattr(scorer, "score"):
            return scorer(images.to(device), list(prompts))
        seen = None if previews is None else previews.to(device)
        return scorer.score(images.to(device), list(prompts), seen)

    verifier = ImageVerifier(
        config,
        scores,
        bool(getattr(scorer, "differentiable", False)),
        preview_log_snr=getattr(scorer, "preview_log_snr", None),
        takes_latents=takes_latents(scorer),
        log_snr_range=getattr(scorer, "log_snr_range", None),
    )
    verifier.name = config.name or getattr(scorer, "name", None) or path.partition(":")[2]
    return verifier


def check(config: VerifierOptions) -> None:
    """Raises UserError without an import path."""
    if config.module is None:
        raise UserError("module is not set and kind=custom needs it: give package.module:name")


KIND = VerifierKind(load, check=check)
