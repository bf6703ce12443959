"""Texts that are longer than a text encoder reads, in chunks, for one encoder and for two."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from lightning.pytorch.plugins import Precision
from torch import Tensor
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling import text_encoding
from blackpoint.sampling.conditioning import Conditioning, joined
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.train.callbacks.previews import Previews
from blackpoint.train.callbacks.watch import Watch
from blackpoint.train.run import fit
from tests.pixel_models import CLASSES, pixel_model, pixel_train_config
from tests.tiny_pipeline import NUM_TOKENS
from tests.tiny_run import tiny_config, tiny_tuner
from tests.tiny_sdxl import assembled, make_tiny_sdxl

ROOM = NUM_TOKENS - 2
WORDS = ["a", "red", "one", "two", "blue"]
LONG = [WORDS[i % len(WORDS)] for i in range(2 * ROOM + 3)]
"""Words of one token each: two whole chunks and three words of a third."""
# Sums of up to a hundred products of size 1, each rounded by 2^-24 in an order that may depend on
# the number of rows.
ROUNDING = 1e-5


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def models(
    request: pytest.FixtureRequest, pipeline: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DiffusionModel, Any]:
    """A model and the stock pipeline of the same folder."""
    if request.param == "sd":
        stock = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
        return DiffusionModel.load(pipeline), stock
    folder = make_tiny_sdxl(tmp_path_factory.mktemp("model") / "sdxl")
    stock = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    return assembled(folder, Process(NoiseSchedule.scaled_linear())), stock


def stock_encoding(stock: Any, texts: list[str]) -> tuple[Tensor, Tensor | None]:
    if isinstance(stock, StableDiffusionPipeline):
        return stock.encode_prompt(texts, "cpu", 1, False)[0], None
    embeds, _, pooled, _ = stock.encode_prompt(texts, do_classifier_free_guidance=False)
    return embeds, pooled


def test_chunks_are_encoded_like_texts_and_follow_one_another(
    models: tuple[DiffusionModel, Any],
) -> None:
    model, stock = models
    texts = [" ".join(LONG[start : start + ROOM]) for start in range(0, 3 * ROOM, ROOM)]
    embeds, pooled = stock_encoding(stock, [*texts, ""])
    found = model.encode_prompts([" ".join(LONG), texts[0]], max_tokens=3 * ROOM)
    assert found.prompt_embeds.shape[1] == 3 * NUM_TOKENS
    expected = torch.stack([torch.cat([*embeds[:3]]), torch.cat([*embeds[[0, 3, 3]]])])
    assert_close(found.prompt_embeds, expected, rtol=0, atol=ROUNDING)
    if pooled is not None:
        assert_close(found.pooled, pooled[[0, 0]], rtol=0, atol=ROUNDING)


def test_ids_of_chunks_are_those_of_the_tokenizers_own_overflow(
    models: tuple[DiffusionModel, Any],
) -> None:
    model, _ = models
    text, given = " ".join(LONG), []
    encoders = [model.text_encoder, *([model.text_encoder_2] if len(model.tokenizers) > 1 else [])]
    hooks = [e.register_forward_pre_hook(lambda _, args: given.append(args[0])) for e in encoders]
    model.encode_prompts([text], max_tokens=3 * ROOM)
    for hook in hooks:
        hook.remove()
    for tokenizer, ids in zip(model.tokenizers, given, strict=True):
        theirs = tokenizer(
            [text],
            padding="max_length",
            max_length=NUM_TOKENS,
            truncation=True,
            return_overflowing_tokens=True,
            return_tensors="pt",
        )
        assert torch.equal(ids, theirs.input_ids)


def test_one_chunk_is_the_default(models: tuple[DiffusionModel, Any]) -> None:
    model, _ = models
    texts = ["a one", " ".join(LONG)]
    plain, chunked = (model.encode_prompts(texts, max_tokens=n) for n in (None, ROOM))
    assert torch.equal(plain.prompt_embeds, chunked.prompt_embeds)


def test_a_row_does_not_depend_on_its_batch(
    models: tuple[DiffusionModel, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = models
    texts = ["a one", " ".join(LONG), "", " ".join(LONG[5:])]
    whole = model.encode_prompts(texts, max_tokens=2 * ROOM)
    monkeypatch.setattr(text_encoding, "TEXT_BATCH", 2)
    alone = model.encode_prompts(texts, max_tokens=2 * ROOM)
    assert_close(vars(alone), vars(whole), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("max_tokens", "cuts"), [(None, True), (2 * ROOM, True), (3 * ROOM, False)]
)
def test_what_is_cut_is_said_once_for_both_encoders(
    models: tuple[DiffusionModel, Any],
    caplog: pytest.LogCaptureFixture,
    max_tokens: int | None,
    cuts: bool,
) -> None:
    models[0].encode_prompts([" ".join(LONG)], max_tokens=max_tokens)
    length = (max_tokens or ROOM) + 2
    expected = [f"cut to {length} of {len(LONG) + 2} tokens"] if cuts else []
    assert [record.message.partition(":")[0] for record in caplog.records] == expected


@pytest.mark.parametrize("max_tokens", [0, -ROOM, ROOM - 1, ROOM + 1, 75])
def test_a_part_of_a_chunk_is_refused(models: tuple[DiffusionModel, Any], max_tokens: int) -> None:
    with pytest.raises(UserError, match=f"max_tokens={max_tokens} must be a multiple of {ROOM}"):
        models[0].encode_prompts(["a one"], max_tokens=max_tokens)


def test_classes_have_no_tokens() -> None:
    with pytest.raises(UserError, match="max_tokens=28: this model has no text encoder"):
        pixel_model("class").encode_prompts(CLASSES, max_tokens=28)


def test_stable_diffusion_is_encoded_as_before_chunks(pipeline: Path) -> None:
    """To the bit: last states of the ids that the tokenizer fills up by itself."""
    model = DiffusionModel.load(pipeline)
    texts = ["a red one", "", "a blue two " * 20]
    tokens = model.tokenizer(
        texts, padding="max_length", max_length=NUM_TOKENS, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model.text_encoder(tokens.input_ids).last_hidden_state
    found = model.encode_prompts(texts)
    assert isinstance(found, Conditioning) and found.pooled is None
    assert torch.equal(found.prompt_embeds, expected)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_training_reads_as_many_tokens_and_its_previews_do(
    kind: str, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pipeline if kind == "sd" else make_tiny_sdxl(tmp_path / "sdxl")
    tuner = tiny_tuner(folder, **{"data.max_tokens": 2 * ROOM, "preview.num_steps": 1})
    texts = [" ".join(LONG), "", "a one"]
    found = tuner.embed(texts)
    expected = [tuner.model.encode_prompts([text], max_tokens=2 * ROOM) for text in texts]
    assert_close(vars(found), vars(joined(expected)), rtol=0, atol=0)
    assert found.prompt_embeds.shape[1] == 2 * NUM_TOKENS

    asked: list[int | None] = []
    encode = DiffusionModel.encode_prompts

    def recorded(
        model: DiffusionModel, prompts: Any, clip_skip: int = 0, max_tokens: int | None = None
    ) -> Conditioning:
        asked.append(max_tokens)
        return encode(model, prompts, clip_skip, max_tokens)

    monkeypatch.setattr(DiffusionModel, "encode_prompts", recorded)
    previews = Previews(tmp_path, tuner.config.preview, Watch(1, 4), None)
    trainer = SimpleNamespace(precision_plugin=Precision())
    assert torch.isfinite(previews._sample(trainer, tuner, 1)).all()  # type: ignore[arg-type]
    assert asked and set(asked) == {2 * ROOM}


def test_a_length_that_training_cannot_have_is_refused(
    pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    class_config = pixel_train_config(tmp_path / "a", shards, "class", **{"data.max_tokens": 14})
    sd_config = tiny_config(tmp_path / "b", pipeline, shards, **{"data.max_tokens": ROOM + 1})
    expected = {
        "data.max_tokens=14: this model has no text encoder; set data.max_tokens=": class_config,
        f"data.max_tokens={ROOM + 1} must be a multiple of {ROOM}": sd_config,
    }
    for message, config in expected.items():
        with pytest.raises(UserError, match=message):
            fit(config)
        assert not Path(config.run_dir).exists()
