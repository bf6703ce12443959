"""Laws of the shipped tokenizer: open-clip's ids, the published numbers, the padding."""

from pathlib import Path

import open_clip
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blackpoint.sampling.checkpoints.loading import load_tokenizer
from blackpoint.sampling.checkpoints.single_file import OPEN_CLIP_PAD, TOKENIZER
from blackpoint.scripts.measurements import make_clip_tokenizer

CONFIG = {"max_position_embeddings": 77}
CLIP = load_tokenizer(TOKENIZER, CONFIG)
THEIRS = open_clip.get_tokenizer("ViT-L-14")
START, END = 49_406, 49_407


def ids_of(text: str) -> list[int]:
    """Returns open-clip's ids up to the end of the text."""
    ids = THEIRS([text])[0].tolist()
    return ids[: ids.index(END) + 1]


@pytest.mark.parametrize(
    "text, ids",
    [
        ("", [START, END]),
        ("a photo of a cat", [START, 320, 1125, 539, 320, 2368, END]),
        ("hello world", [START, 3306, 1002, END]),
    ],
)
def test_ids_of_known_prompts(text: str, ids: list[int]) -> None:
    """As openai/clip-vit-large-patch14 gives them."""
    assert CLIP(text).input_ids == ids


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a cat!",
        "Hello   World, it's 2026 - don't",
        "\u00e9migr\u00e9 caf\u00e9 \u65e5\u672c\u8a9e",
        "wow!! (((really))) a_b-c/d 3.14 I'LL",
        "x" * 300,
        "black cat, " * 60,
    ],
)
def test_ids_are_open_clips(text: str) -> None:
    assert CLIP(text, truncation=True, max_length=77).input_ids == ids_of(text)


@given(st.text(alphabet=st.sampled_from(" abcdefgnost.,'-!?:()0123456789AQ"), max_size=60))
def test_ids_of_any_plain_text_are_open_clips(text: str) -> None:
    assert CLIP(text, truncation=True, max_length=77).input_ids == ids_of(text)


def test_texts_are_filled_up_as_published() -> None:
    open_clips = load_tokenizer(TOKENIZER, CONFIG, pad_token=OPEN_CLIP_PAD)
    for tokenizer, pad in ((CLIP, END), (open_clips, 0)):
        ids = tokenizer("a cat", padding="max_length", max_length=77).input_ids
        assert ids == [START, 320, 2368, END] + [pad] * 73
        assert len(tokenizer) == 49_408


def test_the_shipped_files_are_what_the_script_writes(tmp_path: Path) -> None:
    config = make_clip_tokenizer.ClipTokenizerConfig(str(tmp_path / "made"))
    for file in make_clip_tokenizer.make(config).iterdir():
        assert file.read_bytes() == (TOKENIZER / file.name).read_bytes()
