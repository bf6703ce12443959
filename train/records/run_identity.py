"""Whether a run's data and base have the content that it began with.

Both are recorded in run_dir/identity.json at the first start: data by data/identity.py, the base by
train/records/base_identity.py. A run from before there was such a record is given it at its next
start, which is said. Latents must come from the encoders of the base: those of another autoencoder,
or embeddings of another text encoder, would train without an error and to no use.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.data.identity import differences, is_certain
from blackpoint.data.latents import Encoding
from blackpoint.data.module import CaptionedImages
from blackpoint.sampling.model import DiffusionModel
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.records.base_identity import (
    TEXT_ENCODER,
    UNET,
    VAE,
    base_differences,
    base_identity,
)
from blackpoint.train.records.first_process import note
from blackpoint.train.records.resume_keys import When
from blackpoint.train.records.run_directory import RunRecord
from blackpoint.train.records.sizes import sized


def checked_identity(
    record: RunRecord, config: TrainConfig, model: DiffusionModel, images: CaptionedImages
) -> dict[str, Any]:
    """Returns the sections of identity.json; raises UserError where a run began with others.

    Also for latents that the encoders of the base would not make. `images` are set up.
    """
    base = base_identity(config, model, record.identity.get("base"), note)
    data = images.identity()
    note(check_same_data(record, data))
    note(check_same_base(record, base, config))
    check_encodings(model, images.encodings(), base)
    return {"data": data, "base": base}


def unet_digest_in(identity: Mapping[str, Any]) -> str:
    """Returns the digest of the base's UNet, of sections of identity.json; "" without one."""
    digest: str = identity.get("base", {}).get(UNET, {}).get("digest", "")
    return digest


def check_renamed(record: RunRecord, config: TrainConfig) -> None:
    """Raises UserError where data or base under another name have other content."""
    config = sized(config, record)
    if record.renames(config, When.SAME_DATA):
        images = CaptionedImages(config.data, config.seed, config.batch_size)
        images.prepare_data()
        images.setup("fit")
        check_same_data(record, images.identity())
    if record.renames(config, When.SAME_BASE):
        try:
            base = base_identity(config)
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename} is missing: checkpoint={config.checkpoint} is no whole base; "
                "name the one that the run began with"
            ) from None
        check_same_base(record, base, config)


def check_same_data(record: RunRecord, data: Mapping[str, Any]) -> str:
    """Returns a note for the user, or ""; raises UserError where a run began with other data."""
    if record.is_new:
        return ""
    before = record.identity.get("data")
    if before is None:
        return _adopted(record, "what its data hold; they are")
    if others := differences(before, data):
        rows = "\n".join(f"  {row}" for row in others)
        raise UserError(
            f"run_dir={record.run_dir} holds a run of other data:\n{rows}\nput back the data that "
            "it began with, wherever they lie, or choose another run_dir"
        )
    if is_certain(data) and not is_certain(before):
        return f"{record.run_dir} knew its data by sizes and places alone; now by their content"
    return ""


def check_same_base(record: RunRecord, base: Mapping[str, Any], config: TrainConfig) -> str:
    """Returns a note for the user, or ""; raises UserError where a run began with another base."""
    if record.is_new:
        return ""
    before = record.identity.get("base")
    if before is None:
        return _adopted(record, "what its base holds; it is") if base else ""
    if others := base_differences(before, base):
        key = "model.text_encoder" if config.checkpoint is None else "checkpoint"
        name = config.checkpoint or config.model.text_encoder
        raise UserError(
            f"run_dir={record.run_dir} holds a run of another base: {key}={name} now has another "
            f"{', another '.join(others)}; put back the base that it began with, wherever it lies, "
            "or choose another run_dir"
        )
    return ""


def _adopted(record: RunRecord, what: str) -> str:
    return f"{record.run_dir} did not record {what} taken to be what is there now, and recorded"


def check_encodings(
    model: DiffusionModel,
    data_sets: Sequence[tuple[str, Encoding | None]],
    base: Mapping[str, Any],
) -> None:
    """Raises UserError for latents that the encoders of `model` would not make.

    `data_sets` are ("field=value", Encoding or None for images); `base` holds the digests.
    """
    for where, encoding in data_sets:
        if encoding is None:
            continue
        if model.pixels:
            raise UserError(
                f"{where}: holds latents, and a pixel-space model is trained on images; name the "
                f"shards that they were encoded from ({encoding.source})"
            )
        if model.is_xl and not encoding.pooled_shape:
            raise UserError(
                f"{where}: holds latents without the pooled embeddings and sizes of pictures that "
                f"checkpoint={model.source}, a Stable Diffusion XL, is told; encode the images for "
                f"it: blackpoint data encode source={encoding.source} checkpoint={model.source} "
                f"output=... resolution={encoding.resolution}"
            )
        for part, stored in ((VAE, encoding.vae), (TEXT_ENCODER, encoding.text_encoder)):
            digest = base[part]["digest"]
            if stored != digest:
                raise UserError(
                    f"{where}: was encoded with the {part} {stored:.12} of "
                    f"checkpoint={encoding.checkpoint}, but checkpoint={model.source} has the "
                    f"{part} {digest:.12}; encode the images for it: blackpoint data encode "
                    f"source={encoding.source} checkpoint={model.source} output=... "
                    f"resolution={encoding.resolution}"
                )
