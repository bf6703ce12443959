"""Which members of a shard's sample are its image and its caption, by their extensions.

An extension is what follows the first dot of a member's name, as in WebDataset: 0001.input.jpg is
the member input.jpg of the sample 0001. Without a choice of the user's the image is the one member
whose extension is, or else ends in, that of an image; the caption is in .txt, else in the
"caption" of a .json (as img2dataset writes), else in .caption, else in the one member that ends in
.txt. A choice is recorded with the index, which holds for its shards from then on.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from blackpoint.data.caption_text import CAPTION_FIELD
from blackpoint.data.images.decode import IMAGE_SUFFIXES, BadImage
from blackpoint.data.record import JSON, TEXT

LATENTS_EXTENSION = "safetensors"
_JSON_KEY = re.compile(r"((?:[^.]+\.)*?json)(?:\.(.+))?", re.IGNORECASE | re.DOTALL)


class SampleKeys(NamedTuple):
    """A user's choice of members; None: by their extensions, as above."""

    image: str | None = None
    """Extension of the image, such as input.jpg."""
    caption: str | None = None
    """Extension of the caption, such as caption; json.NAME is the field NAME of a .json."""

    @property
    def field(self) -> str:
        """The field of a .json that is the caption."""
        match = _JSON_KEY.fullmatch(self.caption or "")
        return match[2] if match and match[2] else CAPTION_FIELD

    def chosen(self) -> dict[str, str]:
        """Returns the choices, by the key of a config."""
        named = {"image_key": self.image, "caption_key": self.caption}
        return {name: value for name, value in named.items() if value is not None}

    def image_member(self, extensions: Iterable[str], latents: bool = False) -> str:
        """Returns which of a sample's members is its image, or latents; raises BadImage."""
        extensions = list(extensions)
        if latents:
            names = [name for name in extensions if name == LATENTS_EXTENSION]
        elif self.image is not None:
            names = [name for name in extensions if name == self.image.lower()]
        else:
            names = [name for name in IMAGE_SUFFIXES if name in extensions][:1]
            names = names or [name for name in extensions if _ending(name) in IMAGE_SUFFIXES]
        what = "latents" if latents else "image"
        if not names:
            wanted = f".{self.image} is not there: " if self.image and not latents else ""
            raise BadImage(f"no {what}: {wanted}only {', '.join(extensions)}")
        if len(names) > 1:
            raise BadImage(f"several images: {', '.join(names)}; choose one with image_key")
        return names[0]

    def caption_member(self, extensions: Iterable[str]) -> tuple[str, int]:
        """Returns which of a sample's members holds its captions, and its form; raises BadImage."""
        extensions = list(extensions)
        if self.caption is not None:
            match = _JSON_KEY.fullmatch(self.caption)
            wanted = (match[1] if match else self.caption).lower()
            if wanted not in extensions:
                raise BadImage(f"no caption: .{wanted} is not there: only {', '.join(extensions)}")
            return wanted, JSON if match else TEXT
        for name, form in (("txt", TEXT), ("json", JSON), ("caption", TEXT)):
            if name in extensions:
                return name, form
        texts = [name for name in extensions if _ending(name) == "txt"]
        if len(texts) > 1:
            raise BadImage(f"several captions: {', '.join(texts)}; choose one with caption_key")
        if not texts:
            raise BadImage("no caption: no .txt, .json or .caption member beside the image")
        return texts[0], TEXT


AUTOMATIC = SampleKeys()


def _ending(extension: str) -> str:
    return extension.rpartition(".")[2]
