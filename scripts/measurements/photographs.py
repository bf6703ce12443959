"""Real photographs that scikit-image ships, each with a caption."""

from typing import TYPE_CHECKING

from blackpoint.data.files.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

CAPTIONS = {
    "astronaut": "a photo of an astronaut in an orange suit in front of a flag",
    "chelsea": "a close photo of a tabby cat",
    "coffee": "a photo of a cup of coffee on a wooden table",
    "rocket": "a photo of a rocket at night before its launch",
    "hubble_deep_field": "a photo of galaxies on a black sky",
    "retina": "a photo of a retina on a black background",
}


def photograph(name: str) -> "Image.Image":
    """Returns one of them; raises UserError where scikit-image is not installed."""
    try:
        import skimage.data
        from PIL import Image
    except ImportError:
        raise UserError("the photographs need scikit-image: pip install -e '.[dev]'") from None
    return Image.fromarray(getattr(skimage.data, name)())
