"""The networks behind the metrics of sets: Inception from its file, or any module; and references.

Features and classes are of the 8-bit image that a file would hold, so that PNG files give the
numbers again.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from blackpoint.data.files.errors import UserError
from blackpoint.data.images.decode import BadImage
from blackpoint.data.images.pictures import open_picture
from blackpoint.sampling.checkpoints.resolve import HUB_ID
from blackpoint.sampling.evaluation.metric import (
    FEATURE_COLUMN,
    INCEPTION,
    LOGIT_COLUMN,
    Pixels,
    Row,
)
from blackpoint.sampling.prompts.prompt_set import Prompt
from blackpoint.sampling.verifiers.load import ImageModelConfig
from blackpoint.sampling.verifiers.models.image_model import load_classifier, load_features
from blackpoint.sampling.verifiers.models.pretrained import download, load_weights

if TYPE_CHECKING:
    from blackpoint.sampling.evaluation.metrics.sets import SetsConfig

INCEPTION_FILES = ("*inception*",)
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True)
class SetModel:
    """One network; `rows` returns a tensor (N, d) for each of `columns`."""

    columns: tuple[str, ...]
    rows: Callable[[Pixels], Sequence[Tensor]]

    def __call__(self, pixels: Pixels, prompts: Sequence[Prompt]) -> list[Row]:
        """Returns the columns of each picture, (d,) float32."""
        arrays = [rows.float().cpu().numpy() for rows in self.rows(pixels)]
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*arrays, strict=True)]


def load_set_model(
    sets: "SetsConfig", key: str, columns: tuple[str, ...], device: torch.device
) -> SetModel:
    """Loads one of `sets.networks()`; raises UserError for weights that are missing."""
    if key == INCEPTION:
        assert sets.inception is not None
        return _inception(sets.inception, columns, device)
    config: ImageModelConfig = getattr(sets, key)
    load = load_features if columns == (FEATURE_COLUMN,) else load_classifier
    model = load(config.checkpoint, config.module, device, torch.float32)
    return SetModel(columns, lambda pixels: [model(pixels.float() / 255)])


def read_reference(path: Path, height: int, width: int) -> tuple[Pixels, bool]:
    """Reads a real picture as (1, 3, height, width) uint8, and whether it had another size.

    The shorter side, relative to ours, is resized (Lanczos, anti-aliased), the rest is cut off
    evenly. Raises UserError for what is no picture.
    """
    try:
        picture = open_picture(path)
    except BadImage as error:
        raise UserError(
            f"sets.reference: {path} is not a picture ({error}); take it away"
        ) from error
    is_other = picture.size != (width, height)
    if is_other:
        scale = max(width / picture.width, height / picture.height)
        size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        picture = picture.crop((left, top, left + width, top + height))
    return pil_to_tensor(picture)[None].contiguous(), is_other


def _inception(source: str, columns: tuple[str, ...], device: torch.device) -> SetModel:
    """Loads torch-fidelity's network, which is that of the published FID, without unpickling."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path, remedy = Path(source), f"give {INCEPTION_FILE} of torch-fidelity"
    if not path.exists() and HUB_ID.fullmatch(source):
        folder = download(source, "sets.inception", INCEPTION_FILE, INCEPTION_FILES)
        path = next(iter(sorted(folder.glob("*inception*"))), folder / INCEPTION_FILE)
    content = io.BytesIO()
    torch.save(load_weights(path, "sets.inception", remedy), content)
    content.seek(0)
    layers = {FEATURE_COLUMN: "2048", LOGIT_COLUMN: "logits_unbiased"}
    wanted = [layers[column] for column in columns]
    try:
        network = FeatureExtractorInceptionV3("inception", wanted, content)
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"sets.inception={source} holds other weights than Inception's ({first}); {remedy}"
        ) from None
    network = network.to(device)
    return SetModel(columns, lambda pixels: network(pixels.to(device)))
