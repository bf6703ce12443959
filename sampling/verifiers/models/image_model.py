"""Image models of classifier, self-supervised and oracle verifiers: features or logits.

A transformers model folder brings its own processor; a module by import path takes images in [0, 1]
as they are and prepares them itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.verifiers.models.import_path import built_object
from blackpoint.sampling.verifiers.models.preprocessing import (
    LibraryPreprocessing,
    Preprocessing,
    load_preprocessing,
)
from blackpoint.sampling.verifiers.models.pretrained import (
    ANYTHING,
    find_folder,
    frozen,
    load_model,
)
from blackpoint.sampling.verifiers.verifier import Images

EXAMPLE = "facebook/dinov2-base"
POOLER = r"(.*\.)?pooler\."


@dataclass(frozen=True)
class ImageModel:
    """A function of images in [0, 1] to one row of numbers each, float32."""

    rows: Any
    device: torch.device
    dtype: torch.dtype
    preprocess: Preprocessing | LibraryPreprocessing | None = None
    labels: Sequence[str] = ()

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the images."""
        return self.preprocess is None or self.preprocess.differentiable

    def __call__(self, images: Images) -> Float[Tensor, "n d"]:
        pixels = images.to(self.device)
        pixels = pixels if self.preprocess is None else self.preprocess(pixels)
        rows = self.rows(pixels.to(self.dtype))
        if not isinstance(rows, Tensor) or rows.ndim < 2 or len(rows) != len(images):
            returned = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise RunFailed(
                f"an image model returned {returned} for {len(images)} images; it must return one "
                "row of numbers per image"
            )
        return rows.flatten(1).float()


def load_features(
    checkpoint: str | None,
    module: str | None,
    device: torch.device,
    dtype: torch.dtype,
    field: str = "checkpoint",
) -> ImageModel:
    """Loads a feature extractor from a folder or hub id, or a module by import path, to which a
    checkpoint may be given; raises UserError."""
    if module is not None:
        return _by_import_path(module, checkpoint, device, dtype)
    from transformers import AutoConfig, AutoModel, CLIPModel

    folder = find_folder(str(checkpoint), field, EXAMPLE)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} is not one of transformers: {error}") from error
    if config.model_type == "clip":
        clip, _ = load_model(CLIPModel, folder, device, dtype)
        clip.text_model = None  # its memory is not needed
        return ImageModel(
            lambda pixels: clip.get_image_features(pixel_values=pixels).pooler_output,
            device,
            dtype,
            load_preprocessing(folder),
        )
    model, missing = load_model(AutoModel, folder, device, dtype, POOLER, ANYTHING)

    def rows(pixels: Tensor) -> Tensor:
        answer = model(pixel_values=pixels)
        pooled = getattr(answer, "pooler_output", None)
        if missing or pooled is None:  # a pooler that no file fills would be random
            return answer.last_hidden_state[:, 0]
        return pooled

    return ImageModel(rows, device, dtype, load_preprocessing(folder))


def load_classifier(
    checkpoint: str | None, module: str | None, device: torch.device, dtype: torch.dtype
) -> ImageModel:
    """Loads a classifier and its labels from a folder, a hub id or an import path."""
    if module is not None:
        return _by_import_path(module, checkpoint, device, dtype)
    from transformers import AutoModelForImageClassification

    folder = find_folder(str(checkpoint), "checkpoint", "google/vit-base-patch16-224")
    model, _ = load_model(AutoModelForImageClassification, folder, device, dtype)
    names = model.config.id2label
    return ImageModel(
        lambda pixels: model(pixel_values=pixels).logits,
        device,
        dtype,
        load_preprocessing(folder),
        [names[index] for index in range(len(names))],
    )


def _by_import_path(
    path: str, checkpoint: str | None, device: torch.device, dtype: torch.dtype
) -> ImageModel:
    model = built_object(path, "module", checkpoint)
    if not callable(model):
        raise UserError(
            f"module={path} is a {type(model).__name__}; name a torch module, a class of one, or a "
            "function of images"
        )
    if isinstance(model, nn.Module):
        model = frozen(model.to(device, dtype))
    return ImageModel(model, device, dtype, labels=list(getattr(model, "labels", ())))
