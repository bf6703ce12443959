"""Merging adapters: equal to peft's forward pass, in any format, from a .ckpt of a LoRA run."""

import pytest
import torch
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.fingerprint import unet_digest
from blackpoint.sampling.checkpoints.resolve import resolve
from blackpoint.sampling.lora.adapters import Lora, LoraModule, MergedWeights
from blackpoint.sampling.model import DiffusionModel
from tests.lora_files import (
    ALL_BLOCKS,
    ATTENTION,
    CONVOLUTIONS,
    adapted_unet,
    adapters,
    unet_output,
    write_lora_checkpoint,
)
from tests.tiny_pipeline import make_tiny_pipeline

TOLERANCE = {"rtol": 0, "atol": 1e-5}
"""float32 through a UNet: what the issue asks of peft, merged and diffusers."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("base") / "sd", unet=ALL_BLOCKS)


@pytest.mark.parametrize("dora", [False, True])
def test_a_checkpoint_of_a_lora_run_is_its_base_with_the_adapters(base, tmp_path, dora):
    unet = adapted_unet(base, targets=ATTENTION + CONVOLUTIONS, use_dora=dora)
    path = write_lora_checkpoint(tmp_path / "step=4.ckpt", unet, base)
    model = DiffusionModel.load(path)
    change = (unet_output(model.unet) - unet_output(DiffusionModel.load(base).unet)).abs().max()
    assert change > 1e-2  # the adapters do something
    assert_close(unet_output(model.unet), unet_output(unet), **TOLERANCE)
    assert model.process.prediction_type == "v_prediction"


def test_raw_weights_are_those_of_the_last_step(base, tmp_path):
    average, last = adapted_unet(base), adapted_unet(base, rank=8)
    for tensor in adapters(last).values():
        tensor.mul_(2)
    current = {f"unet.{name}": tensor for name, tensor in adapters(last).items()}
    path = write_lora_checkpoint(tmp_path / "a.ckpt", average, base, current=current)
    for weights, unet in (("ema", average), ("raw", last)):
        model = DiffusionModel.load(path, weights=weights)
        assert_close(unet_output(model.unet), unet_output(unet), **TOLERANCE)


def test_the_sum_is_cast_once(base, tmp_path):
    path = write_lora_checkpoint(tmp_path / "a.ckpt", adapted_unet(base), base)
    whole = DiffusionModel.load(path).unet.state_dict()
    half = DiffusionModel.load(path, dtype=torch.float16).unet.state_dict()
    assert all(torch.equal(half[name], whole[name].half()) for name in whole)


def test_the_digest_is_that_of_the_merged_weights(base, tmp_path):
    path = write_lora_checkpoint(tmp_path / "a.ckpt", adapted_unet(base), base)
    DiffusionModel.load(path).save(tmp_path / "merged")
    merged = unet_digest(resolve(tmp_path / "merged"))
    assert unet_digest(resolve(path)) == merged != unet_digest(resolve(base))


def test_a_checkpoint_continues_one_of_a_full_fine_tune(base, tmp_path):
    """The base of a LoRA run may be any checkpoint; here it is a .ckpt, its base the folder."""
    tuned = DiffusionModel.load(base)
    with torch.no_grad():
        tuned.unet.conv_in.bias.add_(1)
    record = {"base": str(base), "process": tuned.process.to_diffusers()}
    state = {f"unet.{name}": tensor for name, tensor in tuned.unet.state_dict().items()}
    torch.save({"state_dict": state, "blackpoint": record}, tmp_path / "full.ckpt")
    adapted = adapted_unet(base)
    path = write_lora_checkpoint(tmp_path / "lora.ckpt", adapted, tmp_path / "full.ckpt")
    with torch.no_grad():
        adapted.conv_in.bias.add_(1)
    assert_close(unet_output(DiffusionModel.load(path).unet), unet_output(adapted), **TOLERANCE)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 1, 1), (6, 4, 3, 3)])
def test_merged_weights_are_the_formula(shape):
    """W + scale alpha / r B A, by einsum over the rank."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    down = torch.randn(2, *shape[1:], generator=generator)
    up = torch.randn(6, 2, *[1] * (len(shape) - 2), generator=generator)
    module = LoraModule(down, up, alpha=3.0)
    expected = weight + 0.5 * 3 / 2 * torch.einsum("or,r...->o...", up.flatten(1), down)
    assert_close(module.merged(weight, 0.5), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(module.merged(weight, 0.0), weight)


def test_a_linear_adapter_fits_a_convolution_of_one_pixel_and_back():
    """SD 1.x has proj_in as a convolution, SD 2.x as a matrix; writers mix the two."""
    flat = LoraModule(torch.randn(2, 4), torch.randn(6, 2), 2.0)
    square = LoraModule(flat.down[:, :, None, None], flat.up[:, :, None, None], 2.0)
    for one in (flat, square):
        for shape in ((6, 4), (6, 4, 1, 1)):
            assert one.fault(shape) is None
            assert_close(one.delta(shape).flatten(1), flat.up @ flat.down)
        assert one.fault((6, 5)) and one.fault((5, 4)) and one.fault((6, 4, 3, 3))


def test_several_adapters_add_up():
    weight = torch.randn(6, 4)
    some, other = (LoraModule(torch.randn(2, 4), torch.randn(6, 2), 2.0) for _ in range(2))
    loras = [(Lora({"unet.a": one}), scale) for one, scale in ((some, 1.0), (other, -0.5))]
    merged = MergedWeights("unet", {"a.weight": weight, "a.bias": torch.zeros(6)}, loras)
    assert_close(merged["a.weight"], weight + some.delta((6, 4)) - 0.5 * other.delta((6, 4)))
    assert merged.changed == ["a.weight"] and len(merged) == 2
    assert torch.equal(merged["a.bias"], torch.zeros(6))


def test_adapters_of_another_model_are_refused(base, tmp_path):
    wide = make_tiny_pipeline(
        tmp_path / "wide", unet=ALL_BLOCKS | {"block_out_channels": (16,) * 4}
    )
    wide = ALL_BLOCKS | {"block_out_channels": (16,) * 4}
    other = make_tiny_pipeline(tmp_path / "wide", unet=wide)
    path = write_lora_checkpoint(tmp_path / "a.ckpt", adapted_unet(other), base)
    with pytest.raises(UserError, match=r"checkpoint=.*a\.ckpt: \d+ adapters do not fit"):
        DiffusionModel.load(path)
