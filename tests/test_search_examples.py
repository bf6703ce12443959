"""docs/search.md shows each kind of verifier once: each searches as written, and is built offline.

What would be downloaded is a small random model of the same form.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.verifiers.load import KINDS, VerifierConfig, load_verifier
from blackpoint.sampling.verifiers.models import hpsv2
from blackpoint.scripts.config import load
from tests.test_readme import PAGES, blocks
from tests.test_verifiers_hpsv2 import SMALL, make_small_hpsv2
from tests.test_verifiers_image_reward import make_small_image_reward
from tests.tiny_vision import make_tiny_clip, make_tiny_vit

[BLOCK] = blocks(PAGES["docs/search.md"], "yaml")
EXAMPLES: dict[str, dict[str, Any]] = yaml.safe_load(BLOCK)["verifiers"]
OWN = "def sharpness(images, prompts):\n    return images.std(dim=(1, 2, 3))\n"


def test_every_kind_has_one_example() -> None:
    assert sorted(example["kind"] for example in EXAMPLES.values()) == sorted(KINDS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_search_takes_the_example_as_it_is_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(yaml.safe_dump({"verifiers": {name: EXAMPLES[name]}}))
    settings = ["checkpoint=runs/demo", "prompts=a tabby", "output=found", "budget_nfe=100"]
    config = load(SearchConfig, [str(tmp_path / "search.yaml"), *settings])
    example = {key: getattr(config.verifiers[name], key) for key in EXAMPLES[name]}
    assert example == EXAMPLES[name]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_is_built(
    name: str, pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hpsv2, "ARCHITECTURE", SMALL)
    (tmp_path / "my_scores.py").write_text(OWN)
    example = dict(EXAMPLES[name])
    kind = example["kind"]
    if kind in ("clip_score", "pick_score", "aesthetic"):
        example["checkpoint"] = make_tiny_clip(tmp_path / "clip", pipeline / "tokenizer")
    if kind == "aesthetic":
        torch.save(nn.Linear(24, 1).state_dict(), tmp_path / "head.pth")
        example |= {"base": example["checkpoint"], "checkpoint": tmp_path / "head.pth"}
    elif kind == "image_reward":
        example["checkpoint"] = make_small_image_reward(tmp_path)
    elif kind == "hpsv2":
        example["checkpoint"] = make_small_hpsv2(tmp_path)
    elif kind in ("classifier", "self_supervised", "oracle"):
        example["checkpoint"] = make_tiny_vit(tmp_path / "vit")
    if kind == "classifier":
        example["label"] = "cat"
    elif kind == "oracle":
        example["reference"] = shards.parent / "source"
    values: dict[str, Any] = {
        key: str(value) if isinstance(value, Path) else value for key, value in example.items()
    }
    assert load_verifier(VerifierConfig(**values, name=name), torch.device("cpu")).name == name
