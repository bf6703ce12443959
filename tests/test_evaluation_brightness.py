"""What prompts say about brightness, and how far images are from it."""

from pathlib import Path

import pytest
import torch

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.evaluation.measures import luminance_rows
from blackpoint.sampling.evaluation.metrics.brightness import LuminanceRange, luminance_range
from blackpoint.sampling.prompts.prompt_set import Prompt, read_prompt_set

PROMPTS = Path(__file__).parents[1] / "configs" / "prompts" / "brightness.jsonl"


def test_our_own_set_is_readable_balanced_and_agrees_with_its_texts() -> None:
    prompts = read_prompt_set(str(PROMPTS))
    ranges = {prompt.text: luminance_range(prompt) for prompt in prompts}
    assert len(ranges) == len(prompts) >= 40
    categories = {prompt.category for prompt in prompts}
    assert categories == {"solid", "night", "dim", "snow", "bright", "open"}
    for prompt in prompts:
        found = ranges[prompt.text]
        assert (found is None) == (prompt.category == "open")
        if prompt.category == "solid":
            assert found == luminance_range(Prompt(prompt.text))
    assert {r.low for r in ranges.values() if r and r.low == r.high} == {0, 0.25, 0.5, 0.75, 1}


def test_the_error_is_the_distance_to_the_range() -> None:
    levels = torch.tensor([0, 20, 153, 255], dtype=torch.uint8)
    images = levels[:, None, None, None].expand(4, 3, 8, 8)
    night = Prompt("a street at night", metadata={"luminance": [0.05, 0.2]})
    errors = [row["luminance_error"] for row in luminance_rows(images, [night] * 4)]
    assert errors == pytest.approx([0.05, 0.0, 0.4, 0.8], abs=1e-5)
    framed = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    framed[..., 2:-2, 2:-2] = 0
    for prompt, error in (("solid black", 48 / 64), ("a cat on a black background", 1)):
        [row] = luminance_rows(framed, [Prompt(prompt)])
        assert row["luminance_error"] == pytest.approx(error)


def test_texts_speak_where_files_do_not() -> None:
    named = luminance_range(Prompt("a red three on a black background"))
    assert named == LuminanceRange(0, 0, "border")
    assert luminance_range(Prompt("a bicycle")) is None
    open_ = Prompt("a red three on a black background", metadata={"luminance": None})
    assert luminance_range(open_) is None


@pytest.mark.parametrize("given", [0.5, [0.5], [0.6, 0.5], [-0.1, 1], ["a", "b"], [0, True]])
def test_what_is_no_range_is_refused(given: object) -> None:
    with pytest.raises(UserError, match=r"must be \[low, high\]"):
        luminance_range(Prompt("a night", metadata={"luminance": given}))
