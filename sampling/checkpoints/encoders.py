"""The autoencoder and the text encoders of a model: read on first use, in a format of their own.

They run in the format of their own weights, also under the autocast of a run in mixed precision:
its previews come here as its training does, and in fp16 autocast would overflow unseen. The
autoencoder's memory is bounded by pixels: as many pictures at a time as the bound allows, and
larger ones in tiles.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blackpoint.data.files.notes import first
from blackpoint.sampling.checkpoints.loading import Part

log = logging.getLogger(__name__)

VAE_IMAGES = 8
VAE_PIXELS = VAE_IMAGES * 512**2
"""Of one call of the autoencoder, at most.

At full resolution its last block holds three or four maps of 256 channels, 3 to 4 KB a pixel in
float32: 6.4 to 8.6 GB. That is eight pictures of 512 px, and two of 1024."""
VAE_WHOLE_PIXELS = 2048**2
"""Of a picture that is not cut into tiles, at most: 13 to 17 GB, what a card of 24 GB holds beside
the 6.7 GB of SDXL's UNet and text encoders in half precision."""
TILE_SIDE_PX = 1024


class Encoders:
    """Encoders and decoder beside the UNet, frozen, by name: vae, text_encoder, text_encoder_2.

    `vae_scale` is the number of pixels per latent along one side, `scaling_factor` what latents are
    multiplied by; both are 1 without an autoencoder. `vae_is_float32` is true of one that stays in
    float32 whatever the other parts are held in.
    """

    def __init__(self, parts: dict[str, Any]) -> None:
        self._parts = {name: part for name, part in parts.items() if part is not None}
        self._files = {name: p for name, p in self._parts.items() if isinstance(p, Part)}
        self.vae_scale, self.scaling_factor, self.vae_is_float32 = 1, 1.0, False
        if vae := self._parts.get("vae"):
            setting = vae.setting if isinstance(vae, Part) else partial(getattr, vae.config)
            self.vae_scale = 2 ** (len(setting("block_out_channels")) - 1)
            self.scaling_factor = float(setting("scaling_factor"))
            # SDXL's overflows in float16, and bfloat16 is coarse. Of SD 1.x and 2.x the entry says
            # nothing: diffusers writes it as true wherever it was not set.
            self.vae_is_float32 = "text_encoder_2" in self._parts and setting("force_upcast")
        if self.vae_is_float32:
            self._cast("vae", torch.float32)
        for part in self.loaded():
            part.requires_grad_(False).eval()

    def get(self, name: str, device: torch.device) -> Any:
        """Returns a part, which is read where it is not in memory yet."""
        part = self._parts[name]
        if isinstance(part, Part):
            part = part.load().requires_grad_(False).eval().to(device)
            self._parts[name] = part
        return part

    def load(self, device: torch.device) -> None:
        """Reads lazy parts now, so that their faults show now."""
        for name in self._parts:
            self.get(name, device)

    def loaded(self) -> list[Any]:
        """Returns the parts that are in memory."""
        return [part for part in self._parts.values() if not isinstance(part, Part)]

    def text_encoders(self, device: torch.device) -> list[Any]:
        """Returns the text encoders, the first one first."""
        return [self.get(name, device) for name in self._parts if name.startswith("text_encoder")]

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Holds all parts in `dtype` from here on, those not yet read when they are.

        But for the autoencoder of SDXL: it stays in float32 unless its config says
        force_upcast=false.
        """
        for name in self._parts:
            self._cast(name, torch.float32 if name == "vae" and self.vae_is_float32 else dtype)

    def _cast(self, name: str, dtype: torch.dtype) -> None:
        part = self._parts[name]
        if isinstance(part, Part):
            self._parts[name] = replace(part, dtype=dtype)
        elif dtype_of(part) != dtype:
            part.to(dtype)

    def encode(self, images: Tensor, device: torch.device) -> Tensor:
        """Returns mean and log variance of the latents of images in [-1, 1]: (N, 2C, H/f, W/f)."""
        return self._run_vae(lambda vae, x: vae.encode(x).latent_dist.parameters, images, 1, device)

    def decode(self, latents: Tensor, device: torch.device) -> Tensor:
        """Returns the images in [-1, 1], or slightly beyond, of latents without their factor."""
        return self._run_vae(lambda vae, x: vae.decode(x).sample, latents, self.vae_scale, device)

    def _run_vae(
        self,
        function: Callable[[Any, Tensor], Tensor],
        batch: Tensor,
        pixels_per_side: int,
        device: torch.device,
    ) -> Tensor:
        """Returns function(vae, rows) of a few images at a time, float32.

        In fp16, what overflows is computed again in float32; bfloat16 has the range of float32.
        """
        height, width = (side * pixels_per_side for side in batch.shape[-2:])
        size = images_per_call(height, width)
        results = []
        vae = self._tiled_above(height, width, device)
        dtype = dtype_of(vae)
        with torch.autocast(device.type, enabled=False):
            for rows in batch.split(size):
                result = function(vae, rows.to(device, dtype)).float()
                if dtype == torch.float16 and _overflowed(rows, result):
                    log.warning(
                        "note: the autoencoder overflows in float16; from here on it runs in "
                        "float32"
                    )
                    del vae
                    self._read_vae_in_float32(device)
                    vae, dtype = self._tiled_above(height, width, device), torch.float32
                    result = function(vae, rows.to(device, dtype))
                results.append(result)
        return torch.cat(results)

    def _tiled_above(self, height: int, width: int, device: torch.device) -> Any:
        """Returns the autoencoder, which cuts pictures of more than VAE_WHOLE_PIXELS into tiles.

        They overlap by a quarter and are blended. The norms of a tile see no more than the tile:
        where a picture's tiles differ, so may their brightness.
        """
        vae = self.get("vae", device)
        is_large = height * width > VAE_WHOLE_PIXELS
        if is_large:
            vae.tile_sample_min_size = TILE_SIDE_PX
            vae.tile_latent_min_size = TILE_SIDE_PX // self.vae_scale
            if first("pictures that the autoencoder takes in tiles"):
                log.warning(
                    "note: the autoencoder takes pictures of %d x %d px in tiles of %d px, for "
                    "their memory; brightness may differ from tile to tile",
                    height,
                    width,
                    TILE_SIDE_PX,
                )
        vae.use_tiling = is_large
        return vae

    def _read_vae_in_float32(self, device: torch.device) -> None:
        """Keeps it in float32 for good, since what overflowed once will again.

        It is read again: its weights in fp16 are rounded, and large ones infinite.
        """
        if "vae" in self._files:
            self._parts["vae"] = self._files["vae"]
        self._cast("vae", torch.float32)


def images_per_call(height: int, width: int) -> int:
    """Returns how many pictures of so many pixels the autoencoder takes at once."""
    return max(1, min(VAE_IMAGES, VAE_PIXELS // (height * width)))


def dtype_of(part: nn.Module) -> torch.dtype:
    """Returns the format of a part's weights.

    Part.dtype and part.device of diffusers look for hooks in all modules: milliseconds per call.
    """
    return next(part.parameters()).dtype


def _overflowed(given: Tensor, result: Tensor) -> bool:
    """Whether the result is not finite although its input is."""
    return not torch.isfinite(result).all() and bool(torch.isfinite(given).all())
