"""How shards are read: the keys that every verb has which reads them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import PathText
from blackpoint.data.files.rules import check_ranges
from blackpoint.data.images.decode import MAX_IMAGE_PIXELS


@dataclass(kw_only=True)
class ShardOptions:
    """How shards are read."""

    SECTION: ClassVar[str] = ""
    """The section of a config that the keys stand in, for messages: "data." in a training."""

    max_bad_share: float = 0.01
    """Share of samples that may prove unusable, 0 to 1. Above it a run stops, and no index is
    written for shards without one."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Images with more pixels are refused as decompression bombs."""
    image_key: str | None = None
    """Extension of the members that are images, such as input.jpg, where index/ is not made yet;
    null: the one that is an image's, and whatever an index that is there was made with."""
    caption_key: str | None = None
    """Likewise of the captions: caption for .caption members, json.NAME for the field NAME of .json
    members, a text or a list of texts; null: .txt, "caption" in .json, .caption."""
    cache_dir: PathText | None = None
    """Folder where shards from URLs are kept, and indices that can't lie beside their shards; null:
    $XDG_CACHE_HOME/blackpoint or ~/.cache/blackpoint. Best on a local disk."""
    cache_gigabytes: float = 50.0
    """Shards from URLs are kept up to this size, in 10^9 bytes. Training reads each sample of a
    larger data set by a range request; check and encode read shards in order, and need little more
    than the largest. 0: nothing is kept."""
    allow_shell_urls: bool = False
    """Lets pipe:COMMAND stand for a shard: the shell runs it, and its output is the shard."""

    def __post_init__(self) -> None:
        limits = {"max_bad_share": ">= 0 and <= 1", "max_image_pixels": ">= 1"}
        check_ranges(self, self.SECTION, **limits, cache_gigabytes=">= 0")
        for name, example in (("image_key", "input.jpg"), ("caption_key", "json.NAME")):
            value = getattr(self, name)
            if value is not None and (not value or "/" in value or value.strip(".") != value):
                raise UserError(
                    f"{self.SECTION}{name}={value}: must be an extension as in {name}={example}, "
                    "without the dot before it"
                )


def cache_folder(cache_dir: str | None) -> Path:
    """Returns where things are kept that can't lie beside their shards; null: the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache_dir or f"{home}/blackpoint").expanduser()
