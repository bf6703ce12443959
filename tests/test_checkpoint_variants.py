"""Which weight files of a folder are loaded, and what a folder of the hub's cache stands for."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.fingerprint import vae_digest
from blackpoint.sampling.checkpoints.pipeline_folder import PipelineFolder, weight_files
from blackpoint.sampling.checkpoints.resolve import resolve
from blackpoint.sampling.model import DiffusionModel
from blackpoint.scripts.cli import main
from tests.tiny_pipeline import make_tiny_pipeline

PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_pipeline(tmp_path_factory.mktemp("model") / "sd")


def with_variants(base: Path, folder: Path, **variants: tuple[str, ...]) -> Path:
    """Copies a pipeline whose parts have these variants, "" for plain files.

    The weights of each are those of the base and a number that tells them apart.
    """
    shutil.copytree(base, folder)
    for part, names in variants.items():
        plain = folder / part / f"{PARTS[part]}.safetensors"
        weights = load_file(plain)
        plain.unlink()
        for number, name in enumerate(names):
            file = plain.with_name(f"{PARTS[part]}{'.' if name else ''}{name}.safetensors")
            moved = {key: weight + number for key, weight in weights.items()}
            save_file(moved, file, {"format": "pt"})
    return folder


def number_of(folder: Path, base: Path, variant: str | None = None) -> float:
    """Tells which of the UNet's variants was loaded."""
    own = DiffusionModel.load(folder, variant=variant).unet.conv_in.bias
    return round((own - DiffusionModel.load(base).unet.conv_in.bias).mean().item(), 3)


@pytest.mark.parametrize("variant", ["bf16", "non_ema", "fp16", "fp32.shard"])
def test_the_only_variant_is_loaded_unasked(base: Path, tmp_path: Path, variant: str) -> None:
    variants = dict.fromkeys(PARTS, (variant,))
    folder = with_variants(base, tmp_path / "sd", **variants)
    loaded = DiffusionModel.load(folder)
    loaded.load_encoders()
    for own, expected in zip(
        loaded.unet.parameters(), DiffusionModel.load(base).unet.parameters(), strict=True
    ):
        assert_close(own, expected)
    assert vae_digest(PipelineFolder(folder)) == vae_digest(PipelineFolder(base))


def test_plain_files_come_first_and_a_variant_by_its_key(base: Path, tmp_path: Path) -> None:
    folder = with_variants(base, tmp_path / "sd", unet=("", "bf16", "non_ema"), vae=("", "bf16"))
    assert [number_of(folder, base, each) for each in (None, "bf16", "non_ema")] == [0, 1, 2]
    assert [path.name for path in weight_files(folder, "vae")] == [
        "diffusion_pytorch_model.safetensors"
    ]
    plain = vae_digest(PipelineFolder(base))
    assert vae_digest(PipelineFolder(folder)) == plain != vae_digest(PipelineFolder(folder, "bf16"))
    # As in diffusers, a part without the variant has its plain files.
    assert vae_digest(PipelineFolder(folder, "non_ema")) == plain


def test_fp16_comes_before_other_variants_and_a_choice_of_others_is_refused(
    base: Path, tmp_path: Path
) -> None:
    folder = with_variants(base, tmp_path / "half", unet=("bf16", "fp16"))
    assert number_of(folder, base) == 1
    folder = with_variants(base, tmp_path / "sd", unet=("bf16", "non_ema"))
    with pytest.raises(UserError, match="variants bf16, non_ema.*blackpoint export.*variant=bf16"):
        DiffusionModel.load(folder)
    assert number_of(folder, base, "non_ema") == 1
    for first, second in (("ema", "non_ema"), ("fp8", "int8")):
        folder = with_variants(base, tmp_path / first, unet=(first, second), vae=("bf16",))
        with pytest.raises(UserError, match=f"variant={first} output.*here {first},"):
            DiffusionModel.load(folder)
        assert number_of(folder, base, first) == 0


def test_a_variant_that_is_not_there_is_refused(base: Path, tmp_path: Path) -> None:
    folder = with_variants(base, tmp_path / "sd", unet=("", "bf16"))
    with pytest.raises(UserError, match="variant=fp16.*no weights of that variant, but bf16"):
        DiffusionModel.load(folder, variant="fp16")
    with pytest.raises(UserError, match="variant=fp16.*plain ones alone"):
        DiffusionModel.load(base, variant="fp16")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="variant=fp16.*training run"):
        resolve(tmp_path / "run", variant="fp16")


def test_shards_of_a_variant_belong_to_it(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for name in ("bf16-00001-of-00002", "bf16-00002-of-00002", "safetensors.index.bf16"):
        (tmp_path / "unet" / f"diffusion_pytorch_model.{name}.safetensors").touch()
    (tmp_path / "unet" / "diffusion_pytorch_model-00001-of-00001.safetensors").touch()
    assert len(weight_files(tmp_path, "unet", "bf16")) == 2
    assert len(weight_files(tmp_path, "unet")) == 1


def test_the_verbs_take_the_key(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_variants(base, tmp_path / "sd", unet=("", "non_ema"))
    given = [f"checkpoint={folder}", "variant=non_ema"]
    assert main(["export", *given, f"output={tmp_path / 'out'}", "verify=false"]) == 0
    assert number_of(tmp_path / "out", base) == 1
    short = ["prompts=a one", "num_steps=1"]
    assert main(["sample", *given, *short, f"output={tmp_path / 'a'}"]) == 0
    assert (
        main(["sample", f"checkpoint={tmp_path / 'out'}", *short, f"output={tmp_path / 'b'}"]) == 0
    )
    ours, theirs = ((tmp_path / name / "images" / "0_0.png").read_bytes() for name in ("a", "b"))
    assert ours == theirs
    for verb in ("search", "evaluate"):
        more = ["verifiers.x.kind=luminance", "verifiers.x.target=0"]
        more += ["budget_nfe=9"] if verb == "search" else []
        wrong = [f"checkpoint={folder}", "variant=bf16", *short, f"output={tmp_path / verb}"]
        assert main([verb, *wrong, *more]) == 2
        assert "variant=bf16" in capsys.readouterr().err
        assert not (tmp_path / verb).exists()


def test_the_hub_is_asked_for_one_variant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = [
        f"{part}/{stem}{variant}.safetensors"
        for part, stem in PARTS.items()
        for variant in ("", ".fp16", ".bf16")
    ]
    names.append("unet/diffusion_pytorch_model.non_ema.safetensors")
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    asked: list[list[str]] = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append([name for name in allow_patterns if name.endswith(".safetensors")])
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, hub_id: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    resolve("some/one")
    resolve("some/one", variant="bf16")
    resolve("some/one", variant="non_ema")
    plain = [f"{part}/{stem}.safetensors" for part, stem in PARTS.items()]
    assert asked[0] == plain
    assert asked[1] == [f"{part}/{stem}.bf16.safetensors" for part, stem in PARTS.items()]
    assert asked[2] == ["unet/diffusion_pytorch_model.non_ema.safetensors", *plain[1:]]
    with pytest.raises(UserError, match="variant=fp8.*but bf16, fp16, non_ema"):
        resolve("some/one", variant="fp8")


def cache(base: Path, folder: Path, **snapshots: Any) -> Path:
    """Lays a folder as the hub's cache does: blobs, links to them, refs."""
    for name in snapshots:
        for path in base.rglob("*"):
            if path.is_file():
                blob = folder / "blobs" / f"{name}-{path.relative_to(base)}".replace("/", "-")
                blob.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, blob)
                link = folder / "snapshots" / name / path.relative_to(base)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(blob)
    return folder


def test_a_folder_of_the_hubs_cache_is_its_snapshot(base: Path, tmp_path: Path) -> None:
    folder = cache(base, tmp_path / "models--some--one", abc=1)
    expected = folder / "snapshots" / "abc"
    assert resolve(folder).pipeline.path == resolve(expected).pipeline.path == expected
    image = DiffusionModel.load(folder).sample("a one", [0], num_steps=1)
    assert torch.equal(image, DiffusionModel.load(base).sample("a one", [0], num_steps=1))
    cache(base, folder, def_=1)
    with pytest.raises(UserError, match="hub's cache with 2 snapshots and no refs/main"):
        DiffusionModel.load(folder)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("def_")
    assert resolve(folder).pipeline.path == folder / "snapshots" / "def_"
    (folder / "refs" / "main").write_text("gone")
    with pytest.raises(UserError, match="2 snapshots"):
        resolve(folder)
    (tmp_path / "models--none--here" / "snapshots").mkdir(parents=True)
    with pytest.raises(UserError, match="0 snapshots"):
        resolve(tmp_path / "models--none--here")


def test_a_pipeline_with_a_folder_called_snapshots_is_itself(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sd"
    shutil.copytree(base, folder)
    (folder / "snapshots").mkdir()
    assert resolve(folder).pipeline.path == folder
    shutil.copytree(base, folder / "snapshots" / "step-100")
    assert resolve(folder).pipeline.path == folder
