"""Laws of single files as checkpoints: the same model as the folder, whatever else they hold."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blackpoint.sampling.checkpoints.fingerprint import (
    sampling_digest,
    text_encoder_digest,
    unet_digest,
    vae_digest,
)
from blackpoint.sampling.checkpoints.ldm_architecture import (
    clip_config,
    open_clip_config,
    unet_config,
    vae_config,
)
from blackpoint.sampling.checkpoints.ldm_keys import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    ema_name,
    published_text_name,
    to_ldm,
)
from blackpoint.sampling.checkpoints.resolve import resolve
from blackpoint.sampling.choices import SingleFileConfig
from blackpoint.sampling.export.export import export
from blackpoint.sampling.model import DiffusionModel
from blackpoint.scripts.measurements.make_random_base import ARCHITECTURES, build_on_meta
from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_single_file import KINDS, make_folder, tensors_of, write_file

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    v = {"prediction_type": "v_prediction"}
    return {kind: make_folder(root / kind, kind, **v if kind == "sd2" else {}) for kind in KINDS}


@pytest.fixture(scope="module")
def tensors(folders: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    markers = {"sd1": {}, "sd2": {"v_pred": torch.tensor([])}}
    return {kind: tensors_of(folder) | markers[kind] for kind, folder in folders.items()}


@pytest.fixture
def single(tensors: dict[str, dict[str, Tensor]], tmp_path: Path) -> dict[str, Path]:
    return {
        kind: write_file(tmp_path / f"{kind}.safetensors", one) for kind, one in tensors.items()
    }


def weights_of(model: Any) -> dict[str, Tensor]:
    weights = {}
    for part in PARTS:
        module: nn.Module = getattr(model, part)
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                name = published_text_name(name) if part == "text_encoder" else name
                weights[f"{part}.{name}"] = tensor
    return weights


def assert_same_weights(one: Any, other: Any) -> None:
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_is_the_model_of_the_folder(
    kind: str, folders: dict[str, Path], single: dict[str, Path]
) -> None:
    folder, file = DiffusionModel.load(folders[kind]), DiffusionModel.load(single[kind])
    assert_same_weights(file, folder)
    assert sampling_digest(file) == sampling_digest(folder)
    given: dict[str, Any] = {"prompts": "a black cat", "seeds": [3], "num_steps": 2}
    assert torch.equal(file.sample(**given), folder.sample(**given))
    assert file.tokenizer.pad_token_id == {"sd1": 49_407, "sd2": 0}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_file_have_the_digests_of_the_folder(
    kind: str, folders: dict[str, Path], single: dict[str, Path]
) -> None:
    """So run directories, caches of latents and sweeps accept either."""
    folder, file = resolve(folders[kind]), resolve(single[kind])
    assert unet_digest(file) == unet_digest(folder)
    assert vae_digest(file.pipeline) == vae_digest(folder.pipeline)
    assert text_encoder_digest(file.pipeline) == text_encoder_digest(folder.pipeline)


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_reads_the_same_weights(
    kind: str, folders: dict[str, Path], single: dict[str, Path]
) -> None:
    checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    theirs = StableDiffusionPipeline.from_single_file(
        str(single[kind]), config=str(folders[kind]), local_files_only=True, **checker
    )
    assert_same_weights(DiffusionModel.load(single[kind]), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_exported_to_the_folder_that_it_was(
    kind: str, folders: dict[str, Path], single: dict[str, Path], tmp_path: Path
) -> None:
    written = export(single[kind], tmp_path / "out")
    assert_same_weights(DiffusionModel.load(written), DiffusionModel.load(folders[kind]))
    digests = [sampling_digest(DiffusionModel.load(one)) for one in (written, folders[kind])]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["sd15", "sd21_base", "sd21"])
def test_configs_of_published_models_follow_from_their_shapes(name: str) -> None:
    architecture = ARCHITECTURES[name]  # type: ignore[index]
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    text = CLIP_PREFIX if name == "sd15" else OPEN_CLIP_PREFIX
    prefixes = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, "text_encoder": text}
    for part in PARTS:
        model: Any = build_on_meta(architecture, part)  # type: ignore[arg-type]
        config = model.config if part == "unet" else getattr(architecture, part)
        written = to_ldm(part, config, model.state_dict())  # type: ignore[arg-type]
        prefix = prefixes[part]
        shapes[part] = {k.removeprefix(prefix): tuple(t.shape) for k, t in written.items()}
    side_px = architecture.unet["sample_size"] * 8
    found = {"unet": unet_config(shapes["unet"], side_px, 8), "vae": vae_config(shapes["vae"])}
    if name == "sd15":
        found["text_encoder"] = clip_config(shapes["text_encoder"])
    else:
        found["text_encoder"] = open_clip_config(shapes["text_encoder"], is_whole=False)
    for part in PARTS:
        for key, value in getattr(architecture, part).items():
            value = list(value) if isinstance(value, tuple) else value
            assert key == "sample_size" or found[part][key] == value, (part, key)
    assert found["unet"]["sample_size"] == architecture.unet["sample_size"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_number_formats_are_converted_tensor_by_tensor(
    dtype: torch.dtype, tensors: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    rounded = {name: tensor.to(dtype) for name, tensor in tensors["sd1"].items()}
    rounded["v_pred"] = torch.tensor([])
    path = write_file(tmp_path / "half.safetensors", rounded)
    model = DiffusionModel.load(path)
    expected = DiffusionModel.load(
        write_file(tmp_path / "f32.safetensors", {n: t.float() for n, t in rounded.items()})
    )
    assert {tensor.dtype for tensor in weights_of(model).values()} == {torch.float32}
    assert_same_weights(model, expected)
    assert unet_digest(resolve(path)) == unet_digest(resolve(tmp_path / "f32.safetensors"))


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_weights_may_begin_at_any_byte(
    shift: int, tensors: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Writers of others pad no header."""
    half = {name: tensor.half() for name, tensor in tensors["sd2"].items()}
    path = write_file(tmp_path / "half.safetensors", half)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * shift
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    for dtype in (torch.float32, torch.float16):
        one, other = (DiffusionModel.load(file, dtype=dtype) for file in (odd, path))
        assert_same_weights(one, other)


SCHEDULE = {
    name: torch.ones(1000)
    for name in (
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"),
        *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "logvar"),
        *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
        *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    )
}
LAYER = "cond_stage_model.model.transformer.resblocks"
FOREIGN: dict[str, tuple[str, dict[str, Tensor]]] = {
    "buffers of the schedule": ("sd1", SCHEDULE | {"scale_factor": torch.tensor(0.18215)}),
    "position_ids": (
        "sd1",
        {
            "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(
                77
            ).unsqueeze(0)
        },
    ),
    "what ComfyUI adds": (
        "sd1",
        {
            "cond_stage_model.logit_scale": torch.tensor(4.6),
            "cond_stage_model.transformer.text_projection.weight": torch.eye(64),
        },
    ),
    "counters of the average": (
        "sd1",
        {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)},
    ),
    "the loss of the autoencoder": (
        "sd1",
        {"first_stage_model.loss.logvar": torch.tensor(0.0)},
    ),
    "OpenCLIP's last layer": (
        "sd2",
        {
            f"{LAYER}.2.attn.in_proj_weight": torch.ones(192, 64),
            f"{LAYER}.2.ln_1.weight": torch.ones(64),
            "cond_stage_model.model.logit_scale": torch.tensor(4.6),
            "cond_stage_model.model.text_projection": torch.eye(64),
        },
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_foreign_files_hold_beside_is_passed_over(
    name: str,
    folders: dict[str, Path],
    tensors: dict[str, dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    kind, more = FOREIGN[name]
    path = write_file(tmp_path / "foreign.safetensors", tensors[kind] | more)
    model = DiffusionModel.load(path)
    assert_same_weights(model, DiffusionModel.load(folders[kind]))
    assert model.text_encoder.config.num_hidden_layers == 2


def test_text_encoders_of_old_files_have_no_text_model_in_their_names(
    folders: dict[str, Path], tensors: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    old = {name.replace(".text_model.", "."): tensor for name, tensor in tensors["sd1"].items()}
    path = write_file(tmp_path / "old.safetensors", old)
    assert_same_weights(DiffusionModel.load(path), DiffusionModel.load(folders["sd1"]))


def test_weights_choose_the_average_of_a_file_that_holds_both(
    tensors: dict[str, dict[str, Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = tensors["sd1"]
    unet = [name for name in plain if name.startswith("model.diffusion_model.")]
    averages = {ema_name(name): plain[name] + 1 for name in unet}
    path = write_file(tmp_path / "both.safetensors", plain | averages)
    raw, ema = DiffusionModel.load(path, weights="raw"), DiffusionModel.load(path)
    assert "the UNet is its average, model_ema" in caplog.text
    for name, tensor in raw.unet.state_dict().items():
        assert torch.equal(ema.unet.state_dict()[name], tensor + 1)
    averages.pop(ema_name(unet[5]))
    path = write_file(tmp_path / "parts.safetensors", plain | averages)
    assert_same_weights(DiffusionModel.load(path), raw)


def vae_forms(root: Path, other: dict[str, Tensor], folder: Path) -> list[Path]:
    """An autoencoder as people have it: in a pipeline, alone, in a whole file, as LDM's alone."""
    start = "first_stage_model."
    alone = {n.removeprefix(start): t for n, t in other.items() if n.startswith(start)}
    shutil.copytree(folder / "vae", root / "my-vae")
    return [
        folder,
        root / "my-vae",
        write_file(root / "whole.safetensors", other),
        write_file(root / "vae.safetensors", alone | {"loss.logvar": torch.tensor(0.0)}),
    ]


def test_an_autoencoder_is_given_where_a_file_has_none_or_another_is_wanted(
    folders: dict[str, Path], tensors: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    others = make_folder(tmp_path / "others", "sd1", seed=1)
    without = {n: t for n, t in tensors["sd1"].items() if not n.startswith("first_stage_model.")}
    expected = DiffusionModel.load(others).vae.state_dict()
    forms = vae_forms(tmp_path, tensors_of(others), others)
    digest = vae_digest(resolve(others).pipeline)
    for path in (
        write_file(tmp_path / "without.safetensors", without),
        write_file(tmp_path / "with.safetensors", tensors["sd1"]),
    ):
        for form in forms:
            added = SingleFileConfig(vae=str(form))
            model = DiffusionModel.load(path, single_file=added)
            for name, tensor in model.vae.state_dict().items():
                assert torch.equal(tensor, expected[name])
            assert vae_digest(resolve(path, single_file=added).pipeline) == digest
            assert model.scaling_factor == 0.18215


def test_a_tokenizer_is_given_where_the_vocabulary_is_another(tmp_path: Path) -> None:
    folder = make_tiny_pipeline(
        tmp_path / "sd",
        unet={"attention_head_dim": 8, "block_out_channels": (32, 64), "norm_num_groups": 32},
        vae={"norm_num_groups": 8},
        text_encoder={"num_attention_heads": 1},
    )
    path = write_file(tmp_path / "own.safetensors", tensors_of(folder))
    for where in (folder, folder / "tokenizer"):
        model = DiffusionModel.load(path, single_file=SingleFileConfig(tokenizer=str(where)))
        expected = DiffusionModel.load(folder).encode_prompts(["a white night", ""])
        assert torch.equal(
            model.encode_prompts(["a white night", ""]).prompt_embeds, expected.prompt_embeds
        )


def test_sizes_are_as_written_or_as_published(
    tensors: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    sd1, sd2 = tensors["sd1"], tensors["sd2"]
    no_marker = {name: tensor for name, tensor in sd2.items() if name != "v_pred"}
    epsilon = SingleFileConfig(prediction_type="epsilon")

    def side(of: dict[str, Tensor], single_file: Any = None, **metadata: str) -> int:
        path = write_file(
            tmp_path / "one.safetensors", of, {f"modelspec.{k}": v for k, v in metadata.items()}
        )
        added = single_file or SingleFileConfig()
        return DiffusionModel.load(path, with_unet=False, single_file=added).image_size

    assert side(sd1) == side(no_marker, epsilon) == 512 and side(sd2) == 768
    assert side(sd1, resolution="24x24") == 24
    assert side(sd1, resolution="24x") == side(sd1, resolution="9999x9999") == 512


def test_a_file_without_metadata_is_read(single: dict[str, Path]) -> None:
    save_file(load_file(single["sd1"]), single["sd1"])
    model = DiffusionModel.load(single["sd1"], with_unet=False)
    assert model.image_size == 512 and model.tokenizer("").input_ids == [49_406, 49_407]
