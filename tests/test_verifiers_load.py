"""A verifier's config: what each kind needs, and a user's own by import path."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError
from torch.testing import assert_close

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.verifiers.load import VerifierConfig, load_verifier
from blackpoint.sampling.verifiers.models.import_path import import_object
from blackpoint.sampling.verifiers.verifier import checked_scores

CPU = torch.device("cpu")
OWN_CODE = """
import torch

def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))

def listed(images, prompts):
    assert isinstance(prompts, list)
    return [float(len(prompt)) for prompt in prompts]

def summed(images, prompts):
    return images.sum()

def text(images, prompts):
    return "very good"

class Nearness:
    name = "nearness"
    preview_log_snr = 2.0
    differentiable = True

    def __init__(self, power="1"):
        self.power = float(power)

    def score(self, images, prompts, previews):
        return -((images - previews).abs() ** self.power).mean(dim=(1, 2, 3))

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(12, 1)

    def forward(self, images, prompts):
        assert not self.training
        return self.linear(images.flatten(1))[:, 0]

nothing = 3
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_scores.py").write_text(OWN_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_scores", raising=False)


def custom(path: str, **fields: Any) -> Any:
    return load_verifier(VerifierConfig(kind="custom", module=f"own_scores:{path}", **fields), CPU)


@pytest.mark.usefixtures("own_code")
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_function_of_ones_own(batch_size: int) -> None:
    images, prompts = torch.rand(5, 3, 2, 2), ["a", "bb", "ccc", "", "e"]
    verifier = custom("brightness", batch_size=batch_size)
    assert verifier.name == "brightness" and verifier.preview_log_snr is None
    assert not verifier.differentiable
    scores = checked_scores(verifier, images, prompts)
    assert_close(scores.float(), images.mean(dim=(1, 2, 3)))
    listed = custom("listed", batch_size=batch_size, name="length")
    assert listed.name == "length" and listed.score(images, prompts).tolist() == [1, 2, 3, 0, 1]
    assert listed.score(images[:0], []).shape == (0,)


@pytest.mark.usefixtures("own_code")
def test_a_class_of_ones_own() -> None:
    images, previews = torch.rand(2, 5, 3, 2, 2)
    verifier = custom("Nearness", checkpoint="2", batch_size=2)
    assert (verifier.name, verifier.preview_log_snr, verifier.differentiable) == (
        "nearness", 2.0, True
    )  # fmt: skip
    expected = -(images - previews).square().mean(dim=(1, 2, 3))
    assert_close(verifier.score(images, [""] * 5, previews), expected)
    assert custom("Network").score(images, [""] * 5).requires_grad is False


@pytest.mark.usefixtures("own_code")
def test_what_is_no_score_is_refused() -> None:
    images = torch.rand(3, 3, 2, 2)
    with pytest.raises(RunFailed, match=r"verifier summed returned \(\) for 2 images"):
        custom("summed", batch_size=2).score(images, [""] * 3)
    with pytest.raises(RunFailed, match="verifier text returned str for 3 images"):
        custom("text").score(images, [""] * 3)
    with pytest.raises(UserError, match="is a int; name a function"):
        custom("nothing")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "checkpoint is not set and kind=clip_score needs it: give a CLIP folder"),
        ({"kind": "pick_score"}, "such as yuvalkirstain/PickScore_v1"),
        ({"kind": "aesthetic"}, "kind=aesthetic needs it: give the head's file"),
        ({"kind": "hpsv2"}, "HPS_v2.1_compressed.pt"),
        ({"kind": "image_reward"}, "the folder with ImageReward.pt and med_config.json"),
        ({"kind": "classifier"}, "checkpoint and module are not set and kind=classifier"),
        ({"kind": "self_supervised"}, "checkpoint and module are not set"),
        ({"kind": "oracle"}, "checkpoint and module are not set"),
        ({"kind": "custom"}, "module is not set and kind=custom needs it"),
        ({"kind": "oracle", "module": "a:b"}, "metric=fid needs one"),
        ({"kind": "oracle", "module": "a:b", "metric": "is", "reference": "x"}, "metric=is has no"),
        ({"kind": "luminance", "target": 1.5}, r"target=1.5 must be from 0 \(black\) to 1"),
        ({"kind": "luminance", "batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"kind": "custom", "module": ""}, "module is empty"),
        ({"checkpoint": ""}, "checkpoint is empty"),
    ],
)
def test_what_a_kind_needs_is_said_before_anything_is_loaded(fields: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        VerifierConfig(**fields)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="kind=horoscope is no verifier; use clip_score"):
        VerifierConfig(kind="horoscope")


def test_configs_come_from_yaml() -> None:
    schema = OmegaConf.structured(VerifierConfig(kind="luminance"))
    read = OmegaConf.merge(schema, OmegaConf.create("target: 0.5\nweight: 2\ndtype: bfloat16"))
    config = OmegaConf.to_object(read)
    assert isinstance(config, VerifierConfig)
    assert (config.target, config.weight, config.column) == (0.5, 2.0, "luminance")
    with pytest.raises(ValidationError):
        OmegaConf.merge(schema, {"kind": "horoscope"})


def test_reading_a_config_does_not_import_torch() -> None:
    code = "import blackpoint.sampling.verifiers.load, sys; print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_working_folder_that_is_searched_already_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = list(sys.path)
    assert import_object("json:dumps", "module") is json.dumps
    assert sys.path == before
