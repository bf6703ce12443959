"""SDXL's conditioning equals that of diffusers' pipeline: texts, sizes, pictures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from torch import Tensor
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.data.images.picture_size import PictureSize
from blackpoint.sampling.conditioning import Conditioning, joined
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule
from tests.tiny_pipeline import NUM_TOKENS
from tests.tiny_sdxl import PROJECTION, WIDTHS, assembled, make_tiny_sdxl

PROMPTS = ["a red one on a black background", "a blue two!", "", "a red one " * 20]
# The same operations on the same batch, values below 10: a few roundings of 2^-24 of them.
ROUNDING = 1e-6
PROCESS = Process(NoiseSchedule.scaled_linear().zero_terminal_snr())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionModel:
    return assembled(folder, PROCESS)


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.scheduler = DDIMScheduler.from_config(PROCESS.to_diffusers())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def parts(condition: Conditioning) -> tuple[Tensor, Tensor]:
    assert condition.pooled is not None and condition.time_ids is None
    return condition.prompt_embeds, condition.pooled


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_texts_are_encoded_as_by_the_stock_pipeline(
    model: DiffusionModel, stock: Any, clip_skip: int
) -> None:
    embeds, _, pooled, _ = stock.encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, clip_skip=clip_skip
    )
    assert embeds.shape == (4, NUM_TOKENS, sum(WIDTHS.values())) and pooled.shape[1] == PROJECTION
    found = parts(model.encode_prompts(PROMPTS, clip_skip))
    assert_close(found, (embeds, pooled), rtol=0, atol=ROUNDING)
    skipped = (found[0] - model.encode_prompts(PROMPTS).prompt_embeds).abs().max()
    assert (skipped > 1e-2) == (clip_skip > 0)


@pytest.mark.parametrize("clip_skip", [-1, 3])
def test_more_layers_than_both_encoders_have_are_refused(
    model: DiffusionModel, clip_skip: int
) -> None:
    with pytest.raises(UserError, match=f"clip_skip={clip_skip} must be from 0 to 2, the layers"):
        model.encode_prompts(["a one"], clip_skip)


def test_the_empty_prompt_is_encoded(model: DiffusionModel, stock: Any) -> None:
    _, negative, _, pooled = stock.encode_prompt(["a one"], negative_prompt=[""])
    found = parts(model.encode_prompts([""]))
    assert_close(found, (negative, pooled), rtol=0, atol=ROUNDING)
    assert all(part.abs().max() > 1e-2 for part in found)


def test_each_tokenizer_fills_up_with_its_own_padding(model: DiffusionModel) -> None:
    given: list[Tensor] = []
    encoders = [model.text_encoder, model.text_encoder_2]
    hooks = [e.register_forward_pre_hook(lambda _, args: given.append(args[0])) for e in encoders]
    model.encode_prompts(["a red one"])
    for hook in hooks:
        hook.remove()
    end = model.tokenizer.eos_token_id
    ids = model.tokenizer("a red one").input_ids
    assert ids[-1] == end and len(ids) == 5
    fill = NUM_TOKENS - 5
    assert [row.tolist() for row in given] == [[ids + [end] * fill], [ids + [0] * fill]]


def test_states_are_the_penultimate_ones_and_pooled_is_projected(model: DiffusionModel) -> None:
    """Layer by layer, whatever the lists of hidden states mean to a version of transformers."""
    outputs: dict[str, Tensor] = {}
    first, second = model.text_encoder, model.text_encoder_2
    layers = {
        "first": first.encoder.layers[-2],
        "second": second.text_model.encoder.layers[-2],
        "last": second.text_model.encoder.layers[-1],
    }
    hooks = [
        layer.register_forward_hook(lambda *given, name=name: outputs.update({name: given[2]}))
        for name, layer in layers.items()
    ]
    embeds, pooled = parts(model.encode_prompts(["a red one"]))
    for hook in hooks:
        hook.remove()
    assert_close(embeds, torch.cat([outputs["first"], outputs["second"]], dim=-1), rtol=0, atol=0)
    last = second.text_model.final_layer_norm(outputs["last"])[:, 4]  # begin a red one END
    assert_close(pooled, last @ second.text_projection.weight.T, rtol=0, atol=ROUNDING)


def test_each_distinct_prompt_is_encoded_once(model: DiffusionModel) -> None:
    rows: list[int] = []
    encoders = [model.text_encoder, model.text_encoder_2]
    hooks = [
        e.register_forward_pre_hook(lambda _, args: rows.append(len(args[0]))) for e in encoders
    ]
    embeds, pooled = parts(model.encode_prompts([PROMPTS[0], PROMPTS[1], PROMPTS[0]]))
    for hook in hooks:
        hook.remove()
    assert rows == [2, 2]
    for part in (embeds, pooled):
        assert torch.equal(part[0], part[2]) and not torch.equal(part[0], part[1])


def time_ids(stock: Any, size: PictureSize) -> Tensor:
    original, crop, target = size[:2], size[2:4], size[4:]
    return stock._get_add_time_ids(original, crop, target, torch.float32, PROJECTION)


SIZES = [PictureSize(1200, 900, 30, 7, 1024, 768), PictureSize.whole(16, 24)]


def test_sizes_are_those_of_the_stock_pipeline(model: DiffusionModel, stock: Any) -> None:
    found = model.encode_prompts(["a one", "a two"]).with_sizes(SIZES).time_ids
    assert found is not None
    assert_close(found, torch.cat([time_ids(stock, size) for size in SIZES]), rtol=0, atol=0)
    assert found.tolist() == [[1200, 900, 30, 7, 1024, 768], [16, 24, 0, 0, 16, 24]]


@pytest.mark.parametrize("sizes", [SIZES, None])
def test_the_network_is_the_unet_with_text_and_sizes(
    model: DiffusionModel, stock: Any, sizes: list[PictureSize] | None
) -> None:
    """Without sizes, a picture is whole: 8 x 12 latents are 16 x 24 px."""
    condition = model.encode_prompts(["a one", "a two"])
    embeds, pooled = parts(condition)
    x = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([999, 3])
    ids = torch.cat([time_ids(stock, size) for size in sizes or [SIZES[1]] * 2])
    added = {"text_embeds": pooled, "time_ids": ids}
    theirs = stock.unet(x, t, embeds, added_cond_kwargs=added).sample
    found = model.network(x, t, condition.with_sizes(sizes) if sizes else condition)
    assert_close(found, theirs, rtol=0, atol=ROUNDING)
    swapped = condition.with_sizes([PictureSize.whole(24, 16)] * 2)
    assert (model.network(x, t, swapped) - found).abs().max() > 1e-3


def test_pictures_equal_those_of_the_stock_pipeline(model: DiffusionModel, stock: Any) -> None:
    """Guided, rescaled and not square; each picture is the same alone and in a batch."""
    prompts, seeds = PROMPTS[:2], [3, 4]
    theirs = stock(
        prompts,
        negative_prompt=["a white night"] * 2,
        height=16,
        width=24,
        num_inference_steps=4,
        guidance_scale=3.0,
        guidance_rescale=0.7,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    options: dict[str, Any] = {"num_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 24}
    options["negative_prompt"] = "a white night"
    found = model.sample(prompts, seeds, **options)
    assert_close(found, theirs, rtol=0, atol=1e-4)
    alone = [model.sample(p, [seed], **options) for p, seed in zip(prompts, seeds, strict=True)]
    assert_close(torch.cat(alone), found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_sizes_exact(
    folder: Path, model: DiffusionModel, dtype: torch.dtype
) -> None:
    low = assembled(folder, PROCESS, dtype)
    seen: list[Any] = []
    low.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[2], kwargs)), with_kwargs=True
    )
    condition = low.encode_prompts(["a one"])
    assert {part.dtype for part in parts(condition)} == {torch.float32}
    sizes = [PictureSize(1023, 4095, 0, 0, 1023, 4095)]
    low.denoiser(condition.with_sizes(sizes))(torch.zeros(1, 4, 8, 8), 999)
    embeds, added = seen[0][0], seen[0][1]["added_cond_kwargs"]
    assert embeds.dtype == added["text_embeds"].dtype == dtype
    assert added["time_ids"].tolist() == [list(sizes[0])]
    images = low.sample("a one", [0], num_steps=2, guidance_scale=2.0)
    expected = model.sample("a one", [0], num_steps=2, guidance_scale=2.0)
    assert (images - expected).abs().mean() < 0.02


def condition(rows: int, dtype: torch.dtype = torch.float32) -> Conditioning:
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(rows, 3, 5), (rows, 4), (rows, 6)]
    embeds, pooled, ids = (torch.randn(shape, generator=generator) for shape in shapes)
    return Conditioning(embeds.to(dtype), pooled.to(dtype), ids)


def test_conditions_are_indexed_joined_cast_and_moved_as_one() -> None:
    whole = condition(4)
    split = joined([whole[:1], whole[torch.tensor([1, 2, 3])]])
    assert len(split) == 4
    for name in ("prompt_embeds", "pooled", "time_ids"):
        assert torch.equal(getattr(split, name), getattr(whole, name))
    low = whole.to(torch.bfloat16)
    assert low.pooled is not None and low.time_ids is not None
    assert low.prompt_embeds.dtype == low.pooled.dtype == torch.bfloat16
    assert torch.equal(low.time_ids, whole.time_ids)
    away = whole.to(torch.device("meta"))
    assert all(part is None or part.device.type == "meta" for part in vars(away).values())
    labels = Conditioning(torch.zeros(2, 1, 1), class_labels=torch.tensor([4, 5]))
    assert labels[1:].unet_arguments(8, 8) == {"class_labels": torch.tensor([5])}
    assert Conditioning(torch.zeros(2, 1, 1)).unet_arguments(8, 8) == {}


def test_conditions_with_and_without_sizes_are_no_batch() -> None:
    whole = condition(2)
    without = Conditioning(whole.prompt_embeds, whole.pooled)
    with pytest.raises(ValueError, match="with and without pooled, time_ids"):
        joined([whole, without])
