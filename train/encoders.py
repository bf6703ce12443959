"""Which encoders a run needs: none with cached latents, which must come from its own encoders.

Latents of another autoencoder, or embeddings of another text encoder, would train without an error
and to no use. So the digests in a cache are compared with the checkpoint's before training.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from data.files.errors import UserError
from data.latents import Encoding
from sampling.model import DiffusionModel
from train.base_identity import TEXT_ENCODER, VAE


def ready_encoders(
    model: DiffusionModel, data_sets: Sequence[tuple[str, Encoding | None]], previews: bool
) -> str:
    """Loads the encoders if images or previews need them; returns a note for the user, or "".

    `data_sets` are ("field=value", Encoding or None for images).
    """
    if all(encoding is not None for _, encoding in data_sets):
        if not previews:
            return "cached latents: the VAE and the text encoder are not loaded"
        model.load_encoders()
        return (
            "cached latents: the VAE and the text encoder are loaded for previews alone; "
            "preview.every_steps=0 saves their memory"
        )
    model.load_encoders()
    return ""


def check_encodings(
    model: DiffusionModel,
    data_sets: Sequence[tuple[str, Encoding | None]],
    base: Mapping[str, Any],
) -> None:
    """Raises UserError for latents that the encoders of `model` would not make.

    `base` is its identity, which holds their digests: train/base_identity.py.
    """
    encodings = [(where, encoding) for where, encoding in data_sets if encoding is not None]
    if not encodings:
        return
    if model.pixels:
        where, encoding = encodings[0]
        raise UserError(
            f"{where}: holds latents, and a pixel-space model is trained on images; name the "
            f"shards that they were encoded from ({encoding.source})"
        )
    vae, text_encoder = base[VAE]["digest"], base[TEXT_ENCODER]["digest"]
    for where, encoding in encodings:
        for name, stored, ours in (
            ("VAE", encoding.vae, vae),
            ("text encoder", encoding.text_encoder, text_encoder),
        ):
            if stored != ours:
                raise UserError(
                    f"{where}: was encoded with the {name} {stored:.12} of "
                    f"checkpoint={encoding.checkpoint}, but checkpoint={model.source} has the "
                    f"{name} {ours:.12}. Encode the images for it: blackpoint data encode "
                    f"source={encoding.source} checkpoint={model.source} output=... "
                    f"resolution={encoding.resolution}"
                )
