"""Shards of encoded samples: the output of `data encode`, and how training reads it.

Beside the shards and their index lie

- encoding.json      what was encoded, by which weights and how: the fields of Encoding, their key
- empty.safetensors  prompt_embeds (L, D) of "", which stands in for dropped captions

and a sample is key.safetensors, with moments (2C, H/f, W/f), mean and log variance of the
autoencoder's posterior before its scaling factor, and prompt_embeds (L, D), beside key.txt. Of N
captions, in key.json, prompt_embeds is (N, L, D), in their order. Those of SDXL hold pooled (P,) or
(N, P) beside prompt_embeds, and sizes int32 (6,), a PictureSize: the crop was settled with the
latents. The index has the width and height that an image was cut to: H and W differ with buckets.

Shard k holds what is usable of the source's samples [k S, (k + 1) S), S = samples_per_shard: what
belongs into a shard depends neither on the other shards nor on who writes them.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.data.images.decode import STORED_COLORS, BadImage
from blackpoint.data.order.buckets import Buckets, BucketsConfig, Size, bucket_table
from blackpoint.data.reader import Reader
from blackpoint.data.shards.listing import EMPTY_FILE, ENCODING_FILE

FORMAT_VERSION = 2
KEY_BYTES = 16
SIZES = "sizes"
"""Name of what became of a picture's size, in samples and in batches."""
DEFAULT_FORMATS = {"encoder_dtype": "float32", "tf32": False}
LATER_FIELDS: dict[str, Any] = {"pooled_shape": (), "buckets": None, "max_tokens": None}
"""With their defaults, which encoding.json leaves out: those of squares and one chunk, of SD."""


@dataclass(frozen=True)
class Encoding:
    """Contents of a folder of latents, with the weights and preprocessing that made them."""

    source: str
    checkpoint: str
    source_digest: str
    """Of all bytes of the shards of images, and of which samples they are. In an output from before
    there were digests, and of an index on a server that has none: of names, sizes and places."""
    vae: str
    """Digest of the autoencoder's weights; equal latents need equal weights."""
    text_encoder: str
    """Digest of the text encoder's weights and its tokenizer."""
    resolution: int
    """Side of the square images, in pixels."""
    crop: str
    dtype: str
    """Number format of the stored latents."""
    batch_size: int
    """Images encoded at once: the last bit of a matrix product depends on it."""
    samples_per_shard: int
    max_image_pixels: int
    device: str
    """cpu or cuda, which round differently."""
    moments_shape: tuple[int, ...]
    scaling_factor: float
    prompt_embeds_shape: tuple[int, ...] = ()
    """Known when the first shard is encoded."""
    encoder_dtype: str = "float32"
    """Number format of the encoders; the default is that of caches made without a record of it."""
    tf32: bool = False
    """Whether float32 products were computed in TensorFloat-32; likewise."""
    decoder: int = STORED_COLORS
    """Version of the image decoder; the default is that of caches made without a record."""
    pooled_shape: tuple[int, ...] = ()
    """Of SDXL's pooled embedding, known when the first shard is encoded; () without one."""
    buckets: dict[str, Any] | None = None
    """BucketsConfig.record of the sizes that images were cut to; None: squares."""
    max_tokens: int | None = None
    """Tokens of a caption that were encoded; None: as many as the text encoder reads at once."""
    version: int = FORMAT_VERSION

    def settings(self) -> dict[str, Any]:
        """Returns the settings that decide the bytes of the shards: all but the inputs' places."""
        values = dataclasses.asdict(self)
        known_later = ("prompt_embeds_shape", "pooled_shape")
        for name in ("source", "checkpoint", *known_later, "scaling_factor"):
            del values[name]
        if self.decoder == STORED_COLORS:  # as before there was a record of it
            del values["decoder"]
        return values | {"moments_shape": list(self.moments_shape)}

    @property
    def key(self) -> str:
        """Digest of the settings: two caches of one key hold the same latents.

        Number formats at their defaults, and what is None, are left out, so that caches without a
        record keep theirs.
        """
        settings = {k: v for k, v in self.settings().items() if DEFAULT_FORMATS.get(k) != v}
        text = json.dumps(settings, sort_keys=True)
        return blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()

    def write(self, folder: Path, working: Path) -> None:
        """Writes encoding.json in `working` and moves it into place."""
        values = dataclasses.asdict(self)
        kept = {k: v for k, v in values.items() if k not in LATER_FIELDS or v != LATER_FIELDS[k]}
        text = json.dumps(kept | {"key": self.key}, indent=1)
        path = working / ENCODING_FILE
        path.write_text(text + "\n", encoding="utf-8")
        path.replace(folder / ENCODING_FILE)

    @classmethod
    def read(cls, folder: Path) -> "Encoding":
        """Reads what `write` wrote; raises UserError if it is damaged or of another version."""
        path = folder / ENCODING_FILE
        remedy = "encode the images again with `blackpoint data encode`"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            version = fields["version"]
            if version == FORMAT_VERSION:
                for name in ("moments_shape", "prompt_embeds_shape", "pooled_shape"):
                    fields[name] = tuple(fields.get(name, ()))
                key = fields.pop("key")
                encoding = cls(**fields)
                if key == encoding.key:
                    return encoding
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {remedy}") from None
        if version != FORMAT_VERSION:
            raise UserError(f"{path}: is of version {version}; {remedy}")
        raise UserError(
            f"{path}: its fields have the key {encoding.key:.12}, but the latents were written "
            f"with the key {key:.12}: it was changed afterwards; {remedy}"
        )

    def bucket_table(self) -> Buckets | None:
        """Returns the sizes that images were cut to; None for squares."""
        if self.buckets is None:
            return None
        return bucket_table(BucketsConfig(True, **self.buckets), self.resolution, None)

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the embeddings of one caption, by name."""
        pooled = {"pooled": self.pooled_shape} if self.pooled_shape else {}
        return {"prompt_embeds": self.prompt_embeds_shape, **pooled}


def write_empty(folder: Path, embeddings: Mapping[str, Tensor], working: Path) -> None:
    """Writes the embeddings of the empty caption in `working` and moves them into place."""
    path = working / EMPTY_FILE
    path.write_bytes(to_bytes(embeddings))
    path.replace(folder / EMPTY_FILE)


def read_empty(folder: Path) -> dict[str, Tensor]:
    """Returns what `write_empty` wrote; raises UserError if it is damaged."""
    try:
        return dict(load_file(folder / EMPTY_FILE))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / EMPTY_FILE}: cannot be read ({error}); "
            "encode the images again with `blackpoint data encode`"
        ) from None


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Returns the .safetensors member of one sample."""
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


class LatentReader(Reader):
    """Reads encoded samples; the crop and flip were settled when they were encoded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        folder = self.index.shard_folder
        self.encoding = Encoding.read(folder)
        self._shapes = self.encoding.embedding_shapes()
        self._empty = read_empty(folder)
        held = {name: tuple(tensor.shape) for name, tensor in self._empty.items()}
        if held != self._shapes:
            raise UserError(
                f"{folder / EMPTY_FILE}: holds {held}, but the samples have {self._shapes}; encode "
                "the images again with `blackpoint data encode`"
            )

    def read(
        self, epoch: int, index: int, training: bool, size: Size | None = None
    ) -> tuple[dict[str, Tensor], str]:
        """Returns what is stored of a sample and its caption; raises BadImage.

        So it does for one that was cut to another size.
        """
        content_bytes, captions = self.members(index)
        content = self._tensors(content_bytes, len(captions), size or self.size(index))
        number = self.caption_index(epoch, index, training, len(captions))
        if number is None:
            return content | self._empty, ""
        if len(captions) > 1:
            content |= {name: content[name][number] for name in self._shapes}
        return content, captions[number]

    def stack(self, contents: Sequence[Any]) -> dict[str, Tensor]:
        """Returns moments (B, 2C, H/f, W/f) and prompt_embeds (B, L, D), float32; of SDXL pooled
        (B, P) and sizes int64 (B, 6) too."""
        formats = {name: torch.int64 if name == SIZES else torch.float32 for name in contents[0]}
        return {
            name: torch.stack([content[name].to(dtype) for content in contents])
            for name, dtype in formats.items()
        }

    def _tensors(
        self, content_bytes: bytes, num_captions: int, size: Size | None
    ) -> dict[str, Tensor]:
        assert size is not None, "no latents are left out"
        several = () if num_captions == 1 else (num_captions,)
        shapes = {name: (*several, *shape) for name, shape in self._shapes.items()}
        shapes["moments"] = self._moments_shape(size)
        if self.encoding.pooled_shape:
            shapes[SIZES] = (6,)
        try:
            content = load(content_bytes)
        except (SafetensorError, ValueError) as error:
            raise BadImage(f"damaged .safetensors: {error}") from None
        held = {name: tuple(tensor.shape) for name, tensor in content.items()}
        if held != shapes:
            raise BadImage(f"holds {held}, not {shapes}")
        formats = {str(tensor.dtype) for name, tensor in content.items() if name != SIZES}
        if formats != {f"torch.{self.encoding.dtype}"}:
            raise BadImage(f"holds {' and '.join(sorted(formats))}, not {self.encoding.dtype}")
        return content

    def _moments_shape(self, size: Size) -> tuple[int, ...]:
        """Returns the shape of the moments of an image that was cut to `size`."""
        channels, height, width = self.encoding.moments_shape  # of the square
        across, along = (side / self.encoding.resolution for side in size)
        return channels, round(height * along), round(width * across)
