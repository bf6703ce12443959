"""CLIP score, PickScore and the aesthetic predictor: the numbers of CLIPModel called directly."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import CLIPModel, CLIPProcessor

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.verifiers.load import VerifierConfig, load_verifier
from blackpoint.sampling.verifiers.models.clip import load_clip
from blackpoint.sampling.verifiers.verifier import checked_scores
from tests.tiny_vision import IMAGE_PX, eight_bit_images, make_tiny_clip

CPU = torch.device("cpu")
PROMPTS = ["a red three on a black background", "a photo of the snow", "a white zero"]


@pytest.fixture(scope="module")
def clip(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip"), pipeline / "tokenizer")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LAION's MLP for features of 24 numbers, as its .pth file holds it."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for wide, narrow in ((24, 20), (20, 12), (12, 8), (8, 4)):
        layers += [nn.Linear(wide, narrow), nn.Dropout(0.2)]
    mlp = nn.Sequential(*layers, nn.Linear(4, 1))
    path = tmp_path_factory.mktemp("head") / "linearMSE.pth"
    torch.save({f"layers.{name}": weight for name, weight in mlp.state_dict().items()}, path)
    return path


def called_directly(folder: Path, images: Tensor, prompts: list[str]) -> tuple[Any, Tensor]:
    """Returns what CLIPModel answers to its own processor, and its logit scale."""
    model: Any = CLIPModel.from_pretrained(folder).eval()
    processor: Any = CLIPProcessor.from_pretrained(folder)
    pixels = (images * 255).round().to(torch.uint8)
    inputs = processor(text=prompts, images=list(pixels), return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(**inputs), model.logit_scale.exp().detach()


def loaded(kind: Any, checkpoint: Path, **fields: Any) -> Any:
    return load_verifier(VerifierConfig(kind=kind, checkpoint=str(checkpoint), **fields), CPU)


def test_clip_score_is_a_hundred_cosines(clip: Path) -> None:
    prompts = [*PROMPTS, "night", "a dark blue one", "gray"]
    images = eight_bit_images(6, IMAGE_PX, IMAGE_PX)
    answer, scale = called_directly(clip, images, prompts)
    cosines = answer.logits_per_image.diagonal() / scale
    assert (cosines > 0).any() and (cosines < 0).any()
    scores = checked_scores(loaded("clip_score", clip), images, prompts)
    assert_close(scores.float(), 100 * cosines.clamp(min=0), atol=1e-3, rtol=0)


def test_pick_score_is_the_logit_of_the_model(clip: Path) -> None:
    images = eight_bit_images(3, IMAGE_PX, IMAGE_PX)
    answer, _ = called_directly(clip, images, PROMPTS)
    verifier = loaded("pick_score", clip)
    scores = checked_scores(verifier, images, PROMPTS)
    assert_close(scores.float(), answer.logits_per_image.diagonal(), atol=1e-4, rtol=0)
    assert verifier.name == "pick_score" and verifier.preview_log_snr is None


def test_images_of_other_sizes_are_judged_as_their_processor_shows_them(clip: Path) -> None:
    smooth = nn.functional.interpolate(eight_bit_images(3, 8, 9), (48, 70), mode="bilinear")
    images = (smooth * 255).round() / 255
    answer, _ = called_directly(clip, images, PROMPTS)
    scores = loaded("pick_score", clip).score(images, PROMPTS)
    # The processor rounds a resized image to gray levels, by other kernels on other CPUs.
    assert_close(scores, answer.logits_per_image.diagonal(), atol=0.15, rtol=0)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_aesthetic_is_the_mlp_on_normalised_features(
    clip: Path, head: Path, tmp_path: Path, suffix: str
) -> None:
    state = torch.load(head, weights_only=True)
    path = tmp_path / f"head{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    images = eight_bit_images(3, IMAGE_PX, IMAGE_PX)
    answer, _ = called_directly(clip, images, PROMPTS)
    rows = nn.functional.normalize(answer.image_embeds, dim=-1)
    for number in (0, 2, 4, 6, 8):
        rows = rows @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
    scores = loaded("aesthetic", path, base=str(clip)).score(images, PROMPTS)
    assert_close(scores, rows[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["clip_score", "pick_score", "aesthetic"])
def test_a_score_is_the_same_alone_and_in_any_batch(clip: Path, head: Path, kind: str) -> None:
    fields = {"base": str(clip)} if kind == "aesthetic" else {}
    checkpoint = head if kind == "aesthetic" else clip
    images, prompts = eight_bit_images(7, IMAGE_PX, 40), [PROMPTS[n % 3] for n in range(7)]
    together = loaded(kind, checkpoint, batch_size=7, **fields).score(images, prompts)
    verifier = loaded(kind, checkpoint, batch_size=2, **fields)
    alone = [verifier.score(images[n : n + 1], prompts[n : n + 1]) for n in range(7)]
    assert_close(verifier.score(images, prompts), together, atol=1e-4, rtol=0)
    assert_close(torch.cat(alone), together, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["pick_score", "aesthetic"])
def test_gradients_are_those_of_finite_differences(clip: Path, head: Path, kind: str) -> None:
    fields = {"base": str(clip)} if kind == "aesthetic" else {}
    verifier = loaded(kind, head if kind == "aesthetic" else clip, **fields)
    assert verifier.differentiable
    images = (0.25 + eight_bit_images(2, 40, 48) / 2).requires_grad_()
    verifier.score(images, PROMPTS[:2]).sum().backward()
    assert images.grad is not None
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    step = 2e-3 * direction
    with torch.no_grad():
        up = verifier.score(images + step, PROMPTS[:2]).sum()
        down = verifier.score(images - step, PROMPTS[:2]).sum()
    expected = (images.grad * step).sum()
    assert_close((up - down) / 2, expected, rtol=0.05, atol=1e-5)


def test_half_precision_scores_are_near(clip: Path) -> None:
    images = eight_bit_images(3, IMAGE_PX, IMAGE_PX)
    full = loaded("clip_score", clip).score(images, PROMPTS)
    half = loaded("clip_score", clip, dtype="bfloat16").score(images, PROMPTS)
    assert half.dtype == torch.float32
    assert_close(half, full, atol=3, rtol=0)


def test_an_over_long_prompt_is_cut_and_said_once(
    clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = eight_bit_images(1, IMAGE_PX, IMAGE_PX)
    verifier = loaded("pick_score", clip)
    fourteen = " ".join(["snow"] * 14)  # with start and end all that the model reads
    with caplog.at_level(logging.WARNING):
        scores = [verifier.score(images, [fourteen + " red" * n]) for n in (0, 9, 9)]
    assert caplog.text.count("reads 16 of 25 tokens") == 1 == len(caplog.records)
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[1], scores[2])


def test_a_prompt_is_encoded_once(clip: Path) -> None:
    model = load_clip(VerifierConfig("pick_score", str(clip)), "", CPU, torch.float32)
    calls: list[int] = []
    model.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    images = eight_bit_images(6, IMAGE_PX, IMAGE_PX)
    for _ in range(2):
        model.cosines(images, PROMPTS * 2)
    assert len(calls) == 1


def test_no_images_have_no_scores(clip: Path) -> None:
    assert loaded("pick_score", clip).score(torch.zeros(0, 3, 8, 8), []).shape == (0,)


def test_images_and_prompts_must_pair(clip: Path) -> None:
    with pytest.raises(RunFailed, match="2 images cannot be scored against 1 prompts"):
        loaded("pick_score", clip).score(eight_bit_images(2), ["a"])


def test_a_folder_that_cannot_be_loaded_says_why(
    clip: Path, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="does not exist; give a local folder or a hub id, such as"):
        loaded("clip_score", tmp_path / "nowhere")
    with pytest.raises(UserError, match="config.json is missing.*download yuvalkirstain/PickScore"):
        loaded("pick_score", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="someone/clip is not a local folder and cannot be fetched"):
        load_verifier(VerifierConfig(kind="clip_score", checkpoint="someone/clip"), CPU)

    broken = make_tiny_clip(tmp_path / "broken", pipeline / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (broken / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="its tokenizer is missing; tokenizer.json or merges.txt"):
        loaded("clip_score", broken)


def test_weights_must_be_there_and_all_of_them(clip: Path, pipeline: Path, tmp_path: Path) -> None:
    folder = make_tiny_clip(tmp_path, pipeline / "tokenizer")
    state = load_file(folder / "model.safetensors")
    less = {name: weight for name, weight in state.items() if name != "visual_projection.weight"}
    save_file(less, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="1 missing weights, such as visual_projection.weight"):
        loaded("clip_score", folder)
    more = state | {"extra": torch.zeros(1)}
    save_file(more, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="1 unexpected weights, such as extra"):
        loaded("clip_score", folder)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")  # a pickle is never read
    with pytest.raises(UserError, match="it needs config.json and model.safetensors"):
        loaded("clip_score", folder)


def test_a_head_that_is_none_says_why(clip: Path, head: Path, tmp_path: Path) -> None:
    def load(path: Path, base: Path = clip) -> Any:
        return loaded("aesthetic", path, base=str(base))

    with pytest.raises(UserError, match="does not exist; give the head of LAION"):
        load(tmp_path / "none.pth")
    (tmp_path / "damaged.pth").write_bytes(b"not a head")
    with pytest.raises(UserError, match="cannot be read without unpickling code"):
        load(tmp_path / "damaged.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")  # a pickled module would run code
    with pytest.raises(UserError, match="cannot be read without unpickling code"):
        load(tmp_path / "module.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds no state dict of tensors"):
        load(tmp_path / "list.pth")
    wrong = {
        "is not of a linear layer": {"0.weight": torch.zeros(1, 4)},
        "does not take 3 numbers": nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 1)).state_dict(),
        "not a chain of linear layers to one": nn.Sequential(nn.Linear(4, 3)).state_dict(),
    }
    for message, state in wrong.items():
        torch.save(state, tmp_path / "wrong.pth")
        with pytest.raises(UserError, match=message):
            load(tmp_path / "wrong.pth")
    torch.save(nn.Linear(768, 1).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(UserError, match="have 24 numbers and the head takes 768"):
        load(tmp_path / "wide.pth").score(eight_bit_images(1), ["a"])
