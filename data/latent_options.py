"""Which options of training fit latents: what encoding settled can't be changed afterwards."""

from typing import Any

from blackpoint.data.config import DataConfig
from blackpoint.data.files.errors import UserError
from blackpoint.data.latents import Encoding
from blackpoint.data.order.buckets import bucket_table


def check_options(where: str, encoding: Encoding, config: DataConfig, training: bool) -> None:
    """Raises UserError for options that images already encoded can't have.

    `where` is "field=value" of the latents.
    """
    if config.max_upscale is not None:
        raise UserError(
            f"data.max_upscale={config.max_upscale:g}: {where} holds latents, and not how large "
            "their images were; train from the shards of images, or set data.max_upscale=null"
        )
    if config.resolution != encoding.resolution:
        raise UserError(
            f"data.resolution={config.resolution}: {where} holds latents of "
            f"{encoding.resolution} px; set data.resolution={encoding.resolution}, or encode "
            f"the images again with resolution={config.resolution}"
        )
    _check_buckets(where, encoding, config)
    if config.max_tokens != encoding.max_tokens:
        here, there = _shown(config.max_tokens), _shown(encoding.max_tokens)
        raise UserError(
            f"data.max_tokens={here}: {where} holds embeddings of captions that were encoded with "
            f"max_tokens={there}; set data.max_tokens={there}, or encode them again with "
            f"max_tokens={here}"
        )
    asked = ["data.flip=true"] if config.flip else []
    asked += ["data.crop=random"] if config.crop == "random" else []
    if training and asked:
        raise UserError(
            f"{' and '.join(asked)}: {where} holds latents, one view of each image "
            f"({encoding.crop} crop, not flipped), made once; set data.flip=false "
            "data.crop=auto, or train from shards of images"
        )


def _check_buckets(where: str, encoding: Encoding, config: DataConfig) -> None:
    table = encoding.bucket_table()
    if table is None:
        if config.buckets.enabled:
            raise UserError(
                f"data.buckets.enabled=true: {where} holds latents of images that were cut to "
                "squares, whatever their size was; set data.buckets.enabled=false, or encode the "
                "images in buckets: blackpoint data encode source=... buckets.enabled=true"
            )
        return
    wanted = None
    if config.buckets.enabled:
        wanted = bucket_table(config.buckets, config.resolution, None)
    if wanted != table:
        settings = {"enabled": "true", **(encoding.buckets or {})}
        text = " ".join(f"data.buckets.{name}={_shown(value)}" for name, value in settings.items())
        raise UserError(
            f"data.buckets: {where} holds latents of images that were cut to other sizes; set "
            f"{text}, as they were encoded"
        )


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
