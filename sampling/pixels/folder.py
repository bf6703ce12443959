"""How a pixel-space model's folder says what it is: model_index.json and the code beside it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.pixels.pixel_codec import PixelCodec

PIPELINE = ["pixel_pipeline", "PixelPipeline"]
CODE = ("pixel_pipeline.py", "pixel_codec.py")
CODE_FOLDER = Path(__file__).parent
"""Files of this package that diffusers reads beside an export."""


@dataclass(frozen=True)
class PixelForm:
    """What stands where a Stable Diffusion has its autoencoder and its text encoder.

    Without classes and without text the model is unconditional.
    """

    codec: PixelCodec
    classes: tuple[str, ...] = ()
    has_text: bool = False

    @classmethod
    def of(cls, index: dict[str, Any], checkpoint: str | Path) -> "PixelForm | None":
        """Reads model_index.json; None for any other pipeline."""
        if index.get("_class_name") != PIPELINE:
            return None
        try:
            codec = PixelCodec(index["codec"], index["patch"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"checkpoint={checkpoint}: its model_index.json names no codec that is known here "
                f"({error})"
            ) from error
        has_text = bool((index.get("text_encoder") or [None])[0])
        return cls(codec, tuple(index.get("classes", ())), has_text)

    def to_index(self) -> dict[str, Any]:
        """Returns model_index.json."""
        text = (["transformers", "CLIPTextModel"], ["transformers", "CLIPTokenizer"])
        text_encoder, tokenizer = text if self.has_text else ([None, None], [None, None])
        return {
            "_class_name": PIPELINE,
            "classes": list(self.classes),
            "codec": self.codec.kind,
            "patch": self.codec.patch,
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
            "unet": ["diffusers", "UNet2DConditionModel"],
        }
