"""Laws of the autoencoder beside the UNet: memory bounded by pixels, a format of its own."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.testing import assert_close

from blackpoint.sampling.checkpoints import encoders
from blackpoint.sampling.checkpoints.encoders import Encoders
from blackpoint.sampling.model import DiffusionModel
from tests.tiny_pipeline import make_tiny_pipeline

CPU = torch.device("cpu")
# As in test_model.py: sums of some hundred products of size 1, in an order of the library's choice.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return DiffusionModel.load(make_tiny_pipeline(tmp_path_factory.mktemp("model") / "sd"))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def in_slices(function: Any, batch: Tensor, size: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([function(rows) for rows in batch.split(size)])


@pytest.mark.parametrize("side", [16, 64])
def test_small_pictures_go_eight_at_a_time(model: DiffusionModel, side: int) -> None:
    """To the bit, as all pictures of Stable Diffusion at 512 px."""
    vae, images, latents = model.vae, noise(11, 3, side, side), noise(11, 4, side // 2, side // 2)
    moments = in_slices(lambda x: vae.encode(x).latent_dist.parameters, 2 * images - 1, 8)
    assert torch.equal(model.encode_moments(images), moments)
    decoded = in_slices(lambda x: vae.decode(x).sample, latents / model.scaling_factor, 8)
    assert torch.equal(model.decode(latents), (decoded / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(16, 16, [8, 3]), (32, 16, [4, 4, 3]), (32, 24, [2] * 5 + [1]), (32, 64, [1] * 11)],
)
def test_large_pictures_go_by_their_pixels(
    model: DiffusionModel,
    monkeypatch: pytest.MonkeyPatch,
    height: int,
    width: int,
    expected: list[int],
) -> None:
    """Encoded and decoded alike, although latents have fewer positions; the last is above it."""
    monkeypatch.setattr(encoders, "VAE_PIXELS", 8 * 16 * 16)
    images, latents = noise(11, 3, height, width), noise(11, 4, height // 2, width // 2)
    rows: list[int] = []
    halves = (model.vae.encoder, model.vae.decoder)
    hooks = [h.register_forward_pre_hook(lambda _, args: rows.append(len(args[0]))) for h in halves]
    moments, decoded = model.encode_moments(images), model.decode(latents)
    for hook in hooks:
        hook.remove()
    assert rows == expected * 2
    monkeypatch.undo()
    assert_close(moments, model.encode_moments(images), rtol=0, atol=ROUNDING)
    assert_close(decoded, model.decode(latents), rtol=0, atol=ROUNDING)


def test_the_bound_is_that_of_eight_pictures_of_512_px() -> None:
    sizes = {side: encoders.VAE_PIXELS // side**2 for side in (512, 768, 1024)}
    assert sizes == {512: 8, 768: 3, 1024: 2}
    assert encoders.VAE_WHOLE_PIXELS >= encoders.VAE_PIXELS


def test_pictures_above_a_size_go_in_tiles(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of diffusers, said once; smaller ones are as whole as before."""
    small, large = noise(1, 3, 32, 32), noise(2, 3, 48, 40)
    whole, plain = model.encode_moments(small), model.encode_moments(large)
    monkeypatch.setattr(encoders, "VAE_WHOLE_PIXELS", 32 * 32)
    monkeypatch.setattr(encoders, "TILE_SIDE_PX", 16)
    with caplog.at_level(logging.WARNING):
        moments = model.encode_moments(large)
        latents, _ = moments.chunk(2, dim=1)
        decoded = model.decode(latents * model.scaling_factor)
    [said] = [record.message for record in caplog.records]
    assert "takes pictures of 48 x 40 px in tiles of 16 px" in said
    assert torch.equal(model.encode_moments(small), whole)
    stock = AutoencoderKL.from_config(model.vae.config, sample_size=16)
    stock.load_state_dict(model.vae.state_dict())
    stock.enable_tiling()
    for rows in range(2):
        image = 2 * large[rows : rows + 1] - 1
        with torch.no_grad():
            theirs = stock.eval().encode(image).latent_dist.parameters
            theirs_decoded = stock.decode(latents[rows : rows + 1]).sample
        assert_close(moments[rows : rows + 1], theirs, rtol=0, atol=ROUNDING)
        theirs_decoded = (theirs_decoded / 2 + 0.5).clamp(0, 1)
        assert_close(decoded[rows : rows + 1], theirs_decoded, rtol=0, atol=ROUNDING)
    assert moments.shape == plain.shape and (moments - plain).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize("others", [["text_encoder"], ["text_encoder", "text_encoder_2"]])
@pytest.mark.parametrize("force_upcast", [True, False])
def test_sdxl_keeps_its_autoencoder_in_float32_unless_the_config_says_otherwise(
    tmp_path: Path, force_upcast: bool, others: list[str], is_read: bool, dtype: torch.dtype
) -> None:
    """One of SD 1.x or 2.x says force_upcast too, as diffusers' default, and takes any format."""
    folder = make_tiny_pipeline(tmp_path / "sd", vae={"force_upcast": force_upcast})
    vae = DiffusionModel.load(folder, dtype=dtype)._encoders._parts["vae"]
    text = {name: nn.Linear(1, 1, dtype=dtype) for name in others}
    parts = Encoders({"vae": vae.load() if is_read else vae, **text})
    expected = torch.float32 if force_upcast and len(others) == 2 else dtype
    assert encoders.dtype_of(parts.get("vae", CPU)) == expected
    assert parts.decode(noise(1, 4, 4, 4), CPU).dtype == torch.float32
    parts.set_dtype(torch.float16)
    expected = torch.float32 if expected == torch.float32 else torch.float16
    assert encoders.dtype_of(parts.get("vae", CPU)) == expected
    assert [encoders.dtype_of(part) for part in parts.text_encoders(CPU)] == [
        torch.float16 for _ in others
    ]
