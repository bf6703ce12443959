"""The classifier: the library's logits, and the one class that a prompt names."""

import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import ViTForImageClassification, ViTImageProcessor

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.verifiers.load import VerifierConfig, load_verifier
from blackpoint.sampling.verifiers.models.classifier import (
    KIND,
    Classifier,
    ClassifierConfig,
    label_in,
)
from blackpoint.sampling.verifiers.models.image_model import ImageModel
from blackpoint.scripts.miniature.digit_readers import DigitReader, save_weights
from tests.tiny_pipeline import DIGITS
from tests.tiny_vision import IMAGE_PX, LABELS, eight_bit_images, make_tiny_vit

CPU = torch.device("cpu")
READER = "blackpoint.scripts.miniature.digit_readers:DigitReader"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vit(tmp_path_factory.mktemp("vit"))


def loaded(**fields: Any) -> Any:
    return load_verifier(VerifierConfig(kind="classifier", **fields), CPU)


def logits_directly(folder: Path, images: Tensor) -> Tensor:
    model: Any = ViTForImageClassification.from_pretrained(folder).eval()
    processor: Any = ViTImageProcessor.from_pretrained(folder)
    pixels = list((images * 255).round().to(torch.uint8))
    with torch.no_grad():
        return model(**processor(images=pixels, return_tensors="pt")).logits


def test_logits_are_those_of_the_library(vit: Path) -> None:
    images = eight_bit_images(4, IMAGE_PX, IMAGE_PX)
    logits = logits_directly(vit, images)
    prompts = ["a zero", "One!", "my Tabby cat", "a cat on a mat"]
    scores = loaded(checkpoint=str(vit), output="logit").score(images, prompts)
    assert_close(scores, logits.diagonal(), atol=1e-4, rtol=0)
    scores = loaded(checkpoint=str(vit)).score(images, prompts)
    assert_close(scores, logits.log_softmax(dim=1).diagonal(), atol=1e-4, rtol=0)
    # log(p / (1 - p)), by double precision: float32 has no 1 - p where p is near 1.
    odds = logits.double().softmax(dim=1).diagonal().logit()
    scores = loaded(checkpoint=str(vit), output="log_odds").score(images, prompts)
    assert_close(scores.double(), odds, atol=1e-4, rtol=0)
    for label in ("cat", "3"):
        scores = loaded(checkpoint=str(vit), label=label, output="logit").score(images, [""] * 4)
        assert_close(scores, logits[:, 3], atol=1e-4, rtol=0)


def test_a_score_does_not_depend_on_its_batch(vit: Path) -> None:
    images, prompts = eight_bit_images(5, 40, 36), ["zero", "one", "cat", "one", "zero"]
    together = loaded(checkpoint=str(vit), batch_size=5).score(images, prompts)
    apart = loaded(checkpoint=str(vit), batch_size=2).score(images, prompts)
    assert_close(apart, together, atol=1e-4, rtol=0)


def test_gradients_flow_to_the_images(vit: Path) -> None:
    verifier = loaded(checkpoint=str(vit), label="cat")
    images = eight_bit_images(2, 40, 36).requires_grad_()
    verifier.score(images, ["", ""]).sum().backward()
    assert verifier.differentiable and images.grad is not None
    assert (images.grad.abs().sum(dim=1) > 0).all()


def test_the_digit_reader_is_a_classifier_by_import_path(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reader = DigitReader().eval()
    save_weights(reader, tmp_path)
    verifier = loaded(module=READER, checkpoint=str(tmp_path), labels=DIGITS, output="logit")
    images = eight_bit_images(2, 32, 32)
    scores = verifier.score(images, ["a red three", "a blue Nine on a black background"])
    with torch.no_grad():
        expected = reader(images)[[0, 1], [3, 9]]
    assert_close(scores, expected, atol=1e-5, rtol=0)


@given(st.sampled_from(DIGITS), st.text("abc xyz,.'", max_size=8), st.booleans())
def test_a_whole_word_is_found_wherever_it_stands(digit: str, other: str, upper: bool) -> None:
    prompt = f"{other} {digit.upper() if upper else digit}, {other}"
    assert label_in(prompt, DIGITS) == DIGITS.index(digit)


def test_the_longer_name_and_every_synonym_count() -> None:
    assert label_in("a tabby cat asleep", LABELS) == 2
    assert label_in("a tabby", LABELS) == 2
    assert label_in("a cat", LABELS) == 3
    assert label_in("cat, cat, cat", LABELS) == 3
    assert label_in("a golden_retriever", ["golden retriever", "retriever"]) == 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a stone, anyone?", "names no class of zero, one"),
        ("a zero beside a one", "names several classes, zero, one"),
        ("a tabby cat and another cat", "names several classes, tabby, tabby cat, cat"),
    ],
)
def test_a_prompt_must_name_one_class(vit: Path, prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loaded(checkpoint=str(vit)).score(eight_bit_images(1), [prompt])


def test_labels_that_do_not_fit_are_refused(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="label=dog is not a class of this classifier; its 4"):
        loaded(checkpoint=str(vit), label="dog")
    with pytest.raises(UserError, match="label=4 is not a class"):
        loaded(checkpoint=str(vit), label="4")
    save_weights(DigitReader(), tmp_path)
    with pytest.raises(UserError, match="labels: the classifier does not name its classes"):
        loaded(module=READER, checkpoint=str(tmp_path))
    verifier = loaded(module=READER, checkpoint=str(tmp_path), label="12")
    with pytest.raises(UserError, match="label=12 is not one of the classifier's 10 classes"):
        verifier.score(eight_bit_images(1), [""])
    verifier = loaded(module=READER, checkpoint=str(tmp_path), labels=["zero", "one"])
    with pytest.raises(UserError, match="labels: 2 names for a classifier with 10 outputs"):
        verifier.score(eight_bit_images(1), ["one"])


def test_a_head_that_the_file_lacks_is_not_drawn_at_random(tmp_path: Path) -> None:
    folder = make_tiny_vit(tmp_path)
    state = load_file(folder / "model.safetensors")
    body = {name: weight for name, weight in state.items() if not name.startswith("classifier")}
    save_file(body, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="2 missing weights, such as classifier.bias"):
        loaded(checkpoint=str(folder))


def test_a_module_that_is_none_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "my_networks.py").write_text(
        "import torch\nnumber = 3\n"
        "def rows(images): return images.flatten(1)\n"
        "def mean(images): return images.mean()\n"
        "class Sized(torch.nn.Module):\n    def __init__(self, size): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    images = torch.zeros(1, 3, 2, 2)
    assert loaded(module="my_networks:rows", label="0").score(images, [""]).shape == (1,)
    with pytest.raises(RunFailed, match=r"an image model returned \(\) for 1 images"):
        loaded(module="my_networks:mean", label="0").score(images, [""])
    with pytest.raises(UserError, match="module=my_networks:number is a int; name a torch module"):
        loaded(module="my_networks:number", label="0")
    with pytest.raises(UserError, match="is a class that needs arguments.*give it a checkpoint"):
        loaded(module="my_networks:Sized", label="0")
    with pytest.raises(UserError, match="defines no absent"):
        loaded(module="my_networks:absent", label="0")
    with pytest.raises(UserError, match="cannot be imported.*folder that holds not_there"):
        loaded(module="not_there.at_all:rows", label="0")
    with pytest.raises(UserError, match="must be an import path, package.module:name"):
        loaded(module="my_networks.rows", label="0")
    assert str(tmp_path) not in sys.path


def test_a_module_is_frozen_and_in_evaluation_mode() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(12, 2))
    model = ImageModel(network.eval().requires_grad_(False), CPU, torch.float32)
    images = torch.rand(3, 3, 2, 2)
    config = ClassifierConfig("classifier", label="1", output="logit")
    scores = Classifier(model, config).scores(images, [""] * 3)
    assert_close(scores, network(images)[:, 1])
    assert not scores.requires_grad


@pytest.mark.parametrize("output", get_args(get_type_hints(ClassifierConfig)["output"]))
def test_no_score_is_above_the_highest_that_is_declared(vit: Path, output: Any) -> None:
    images, prompts = eight_bit_images(4, IMAGE_PX, IMAGE_PX), ["zero", "one", "cat", "one"]
    scores = loaded(checkpoint=str(vit), output=output).score(images, prompts)
    assert scores.max() <= KIND.highest(ClassifierConfig(kind="classifier", output=output))
