"""Single files of SDXL: the same model as the folder, to us and to diffusers, and back."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.fingerprint import (
    sampling_digest,
    unet_digest,
)
from blackpoint.sampling.checkpoints.ldm_architecture import (
    clip_config,
    second_text_config,
    unet_config,
    vae_config,
)
from blackpoint.sampling.checkpoints.ldm_keys import (
    UNET_PREFIX,
    VAE_PREFIX,
    XL_CLIP_PREFIX,
    XL_OPEN_CLIP_PREFIX,
    from_ldm,
    to_ldm,
)
from blackpoint.sampling.checkpoints.resolve import resolve
from blackpoint.sampling.checkpoints.single_file import TOKENIZER
from blackpoint.sampling.choices import SingleFileConfig
from blackpoint.sampling.export.carried import check_carried
from blackpoint.sampling.export.export import export
from blackpoint.sampling.export.ldm_config import ldm_yaml
from blackpoint.sampling.export.single_file import single_file_tensors
from blackpoint.sampling.export.verify import stock_pipeline_of_file
from blackpoint.sampling.export.verify_file import tensor_digests
from blackpoint.sampling.model import DiffusionModel
from tests.test_ldm_keys import SDXL_UNET
from tests.test_sdxl_model import ZERO_SNR
from tests.tiny_sdxl import make_carried_sdxl
from tests.tiny_single_file import write_file

MARKERS = {"v_pred", "ztsnr"}
PROMPT = "a photo of snow on a black background"
PROJECTION = f"{XL_OPEN_CLIP_PREFIX}text_projection"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model") / "sdxl"
    return make_carried_sdxl(place, DDIMScheduler.from_config(ZERO_SNR.to_diffusers()))


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("file") / "night.safetensors"
    return export(folder, place, verify=False, dtype="float32")


@pytest.fixture(scope="module")
def tensors(file: Path) -> dict[str, Tensor]:
    return load_file(file)


@pytest.fixture(scope="module")
def models(folder: Path, file: Path) -> tuple[DiffusionModel, DiffusionModel]:
    return DiffusionModel.load(folder), DiffusionModel.load(file)


def test_a_file_is_the_model_of_the_folder(models: tuple[DiffusionModel, DiffusionModel]) -> None:
    one, other = models
    assert tensor_digests(one) == tensor_digests(other)
    assert other.is_xl and other.image_sides == (16, 16)
    assert [t.pad_token_id for t in other.tokenizers] == [49_407, 0]
    given: dict[str, Any] = {"prompts": PROMPT, "seeds": [3], "num_steps": 2}
    # The order of sums in float32 follows the alignment of the weights, mapped from another file.
    assert_close(one.sample(**given), other.sample(**given), rtol=0, atol=1e-5)
    assert other.process.schedule.is_zero_terminal_snr


@pytest.mark.slow
def test_a_file_has_the_digest_of_the_folder(models: tuple[DiffusionModel, DiffusionModel]) -> None:
    """So runs, caches of latents and outputs go on with either."""
    assert sampling_digest(models[0]) == sampling_digest(models[1])


@pytest.mark.slow
def test_diffusers_reads_the_projection_the_same_way_round(
    folder: Path, file: Path, models: tuple[DiffusionModel, DiffusionModel]
) -> None:
    """By its effect: the pooled embedding of from_single_file, and not of the transpose."""
    stock = StableDiffusionXLPipeline.from_single_file(
        str(file), config=str(folder), local_files_only=True, add_watermarker=False
    )
    _, _, pooled, _ = stock.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    ours = models[1].encode_prompts([PROMPT]).pooled
    assert ours is not None
    # Sums of 128 products of size 1, each rounded by 2^-24, in an order that addresses decide.
    assert_close(ours, pooled, rtol=0, atol=1e-5)
    weight = stock.text_encoder_2.text_projection.weight
    stock.text_encoder_2.text_projection.weight = torch.nn.Parameter(weight.T.contiguous())
    _, _, turned, _ = stock.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    assert (ours - turned).abs().max() > 1e-2


def test_diffusers_reads_each_part_in_the_format_of_the_file(folder: Path, tmp_path: Path) -> None:
    """The default, float16, and the autoencoder in float32, as SDXL's overflows in float16."""
    path = export(folder, tmp_path / "x.safetensors", verify=False)
    written = DiffusionModel.load(path, dtype=torch.float16)
    assert (written.unet.dtype, written.vae.dtype) == (torch.float16, torch.float32)
    assert tensor_digests(stock_pipeline_of_file(path, folder, True)) == tensor_digests(written)


@pytest.mark.slow
def test_an_export_is_verified_and_comes_back_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    """Read back by us and by from_single_file, sampled by both; folder -> file -> folder."""
    path = export(folder, tmp_path / "x.safetensors", dtype="float32")
    again = export(path, tmp_path / "again")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        [one, other] = (next((f / part).glob("*.safetensors")) for f in (folder, again))
        written, read = load_file(one), load_file(other)
        values = {name.removeprefix("text_model."): tensor for name, tensor in written.items()}
        found = {name.removeprefix("text_model."): tensor for name, tensor in read.items()}
        assert values.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in values.items())
    index = json.loads((again / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"


def test_the_header_and_the_markers_say_what_it_is(file: Path, tensors: dict[str, Tensor]) -> None:
    assert {name for name in tensors if "." not in name} == MARKERS
    length = int.from_bytes(file.read_bytes()[:8], "little")
    metadata = json.loads(file.read_bytes()[8 : 8 + length])["__metadata__"]
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.prediction_type"] == "v"


def test_the_yaml_is_that_of_sdxl_with_v(folder: Path) -> None:
    """configs/sd_xl_v.yaml of A1111, whose widths are SDXL's."""
    model = DiffusionModel.load(folder)
    model.unet.register_to_config(**SDXL_UNET, layers_per_block=2)
    config: Any = OmegaConf.to_container(OmegaConf.create(ldm_yaml(model)))
    params = config["model"]["params"]
    scaling = params["denoiser_config"]["params"]["scaling_config"]["target"]
    assert scaling == "sgm.modules.diffusionmodules.denoiser_scaling.VScaling"
    assert params["scale_factor"] == 0.13025
    assert params["network_config"]["params"] == {
        "adm_in_channels": 2816,
        "num_classes": "sequential",
        "use_checkpoint": False,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "attention_resolutions": [4, 2],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4],
        "num_head_channels": 64,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "transformer_depth": [1, 2, 10],
        "context_dim": 2048,
        "spatial_transformer_attn_type": "softmax-xformers",
        "legacy": False,
    }
    keys = [one["input_key"] for one in params["conditioner_config"]["params"]["emb_models"]]
    assert keys[:2] == ["txt", "txt"] and len(keys) == 5


def test_what_foreign_files_hold_besides_is_passed_over(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    more = {
        f"{XL_CLIP_PREFIX}text_model.embeddings.position_ids": torch.arange(77)[None],
        f"{XL_OPEN_CLIP_PREFIX}logit_scale": torch.ones(()),
        "denoiser.sigmas": torch.ones(1000),
        "alphas_cumprod": torch.ones(1000),
    }
    path = write_file(tmp_path / "x.safetensors", tensors | more)
    assert unet_digest(resolve(path)) == unet_digest(resolve(folder))
    one, other = (DiffusionModel.load(place, with_unet=False) for place in (path, folder))
    projections = (model.text_encoder_2.text_projection.weight for model in (one, other))
    assert torch.equal(*projections)


YAML = "model: {{params: {{denoiser_config: {{params: {{scaling_config: {{target: x.{}}}}}}}}}}}"


@pytest.mark.parametrize(
    ("markers", "yaml", "expected"),
    [
        (set(), None, ("epsilon", False)),
        ({"v_pred"}, None, ("v_prediction", False)),
        (MARKERS, None, ("v_prediction", True)),
        (set(), YAML.format("VScaling"), ("v_prediction", False)),
        (set(), YAML.format("EpsScaling"), ("epsilon", False)),
    ],
)
def test_what_the_unet_predicts_is_told_by_markers_or_a_yaml(
    tensors: dict[str, Tensor],
    tmp_path: Path,
    markers: set[str],
    yaml: str | None,
    expected: tuple[str, bool],
) -> None:
    kept = {n: t for n, t in tensors.items() if n not in MARKERS - markers}
    path = write_file(tmp_path / "x.safetensors", kept)
    if yaml is not None:
        path.with_suffix(".yaml").write_text(yaml)
    process = DiffusionModel.load(path, with_unet=False).process
    assert (process.prediction_type, process.schedule.is_zero_terminal_snr) == expected


def test_a_yaml_of_another_scaling_is_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    kept = {n: t for n, t in tensors.items() if n not in MARKERS}
    path = write_file(tmp_path / "x.safetensors", kept)
    path.with_suffix(".yaml").write_text(YAML.format("EDMScaling"))
    with pytest.raises(UserError, match="scaling_config.target='EDMScaling' is none of VScaling"):
        DiffusionModel.load(path, with_unet=False)


def test_a_tokenizer_that_is_given_serves_both_encoders(file: Path, tmp_path: Path) -> None:
    for place in (TOKENIZER, tmp_path / "both"):
        if place != TOKENIZER:
            shutil.copytree(TOKENIZER, place / "tokenizer")
            shutil.copytree(TOKENIZER, place / "tokenizer_2")
            settings = place / "tokenizer_2" / "tokenizer_config.json"
            text = json.loads(settings.read_text()) | {"pad_token": "!"}
            settings.write_text(json.dumps(text))
        options = SingleFileConfig(tokenizer=str(place))
        pipeline = resolve(file, single_file=options).pipeline
        encoders = ("text_encoder", "text_encoder_2")
        pads = [pipeline.tokenizer(encoder).pad_token_id for encoder in encoders]
        assert pads == [49_407, 0] and place in pipeline.config_files("tokenizer_2")[0].parents


def test_a_projection_of_another_shape_is_refused(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write_file(tmp_path / "x.safetensors", tensors | {PROJECTION: torch.ones(128, 32)})
    with pytest.raises(UserError, match="6 sizes of 256 .*projection of 32 .*make 1568"):
        DiffusionModel.load(path)
    path = write_file(tmp_path / "y.safetensors", tensors | {PROJECTION: torch.ones(32, 128)})
    with pytest.raises(UserError, match="text_encoder_2: 1 of another shape weights"):
        DiffusionModel.load(path).load_encoders()


NOT_CARRIED: dict[str, tuple[str, dict[str, Any], str]] = {
    "sizes": (
        "unet/config.json",
        {"addition_time_embed_dim": 128, "projection_class_embeddings_input_dim": 6 * 128 + 128},
        "addition_time_embed_dim=128.*assume 256",
    ),
    "scale": ("vae/config.json", {"scaling_factor": 0.18215}, "assume 0.13025"),
    "activation": (
        "text_encoder_2/config.json",
        {"hidden_act": "quick_gelu"},
        "hidden_act=quick_gelu in text_encoder_2/config.json, and readers assume gelu",
    ),
    "heads": (
        "text_encoder_2/config.json",
        {"num_attention_heads": 1},
        "num_attention_heads=1 in text_encoder_2/config.json, and readers assume 2",
    ),
    "padding": (
        "tokenizer_2/tokenizer_config.json",
        {"pad_token": "<|endoftext|>"},
        "second tokenizer fills texts up with token 49407, and readers assume 0",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_CARRIED)
def test_what_no_file_carries_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    file_name, entries, message = NOT_CARRIED[name]
    copy = tmp_path / "sdxl"
    shutil.copytree(folder, copy)
    path = copy / file_name
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    if name == "sizes":
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(copy / "unet"))
        unet.save_pretrained(copy / "unet")
    with pytest.raises(UserError, match=f"can't be written as a single file.*{message}"):
        export(copy, tmp_path / "x.safetensors")
    assert [one.name for one in tmp_path.iterdir()] == ["sdxl"]


# stabilityai/stable-diffusion-xl-base-1.0, as published
TEXT_1: dict[str, Any] = {
    "vocab_size": 49_408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
TEXT_2: dict[str, Any] = TEXT_1 | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}


@pytest.fixture(scope="module")
def full_size() -> dict[str, tuple[Any, Any, dict[str, Tensor]]]:
    """By part: network on the meta device, config, weights by the names of a single file."""
    with torch.device("meta"):
        networks: dict[str, Any] = {
            "unet": UNet2DConditionModel(**SDXL_UNET),
            "vae": AutoencoderKL(**AUTOENCODER),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT_1)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2)),
        }
    configs = {"text_encoder": TEXT_1, "text_encoder_2": TEXT_2}
    parts = {}
    for part, network in networks.items():
        config = configs.get(part, network.config)
        state = {n: t for n, t in network.state_dict().items() if not n.endswith("position_ids")}
        parts[part] = (network, config, to_ldm(part, config, state, True))  # type: ignore[arg-type]
    return parts


@pytest.mark.slow
def test_the_full_architecture_has_the_published_keys(full_size: Any) -> None:
    """2,513 keys: 1,680 + 248 + 196 + 389, and the parameters of the published parts."""
    counts = [len(written) for _, _, written in full_size.values()]
    assert counts == [1680, 248, 196, 389] and sum(counts) == 2513
    parameters = [sum(t.numel() for t in w.values()) for _, _, w in full_size.values()]
    assert parameters == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]
    names = set().union(*(written for _, _, written in full_size.values()))
    assert {
        "model.diffusion_model.label_emb.0.0.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "conditioner.embedders.1.model.positional_embedding",
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_bias",
    } <= names
    for part, (network, config, written) in full_size.items():
        back = from_ldm(part, config, written)
        assert {tensor.shape for tensor in back.values()} == {
            tensor.shape for tensor in network.state_dict().values() if tensor.is_floating_point()
        }


@pytest.mark.slow
def test_the_full_architecture_is_carried_with_both_markers(
    full_size: Any, models: tuple[DiffusionModel, DiffusionModel]
) -> None:
    words = {"tokenizer": models[0].tokenizer, "tokenizers": models[0].tokenizers}
    networks = {part: network for part, (network, _, _) in full_size.items()}
    model: Any = SimpleNamespace(**networks, **words, process=ZERO_SNR, pixels=None)
    check_carried(model, "x")
    tensors = single_file_tensors(model)
    assert len(tensors) == 2513 + len(MARKERS) and tensors.keys() >= MARKERS


@pytest.mark.slow
def test_configs_of_the_full_architecture_follow_from_its_shapes(full_size: Any) -> None:
    def shapes(part: str, prefix: str) -> dict[str, tuple[int, ...]]:
        written = full_size[part][2]
        return {n.removeprefix(prefix): tuple(t.shape) for n, t in written.items()}

    found = unet_config(shapes("unet", UNET_PREFIX), 1024, 8, is_xl=True)
    expected = full_size["unet"][1]
    assert found["sample_size"] == 128 and not found["upcast_attention"]
    for name in SDXL_UNET:
        given = expected[name]
        assert found[name] == (list(given) if isinstance(given, tuple) else given), name
    vae = vae_config(shapes("vae", VAE_PREFIX), 0.13025)
    for name in ("block_out_channels", "layers_per_block", "norm_num_groups", "scaling_factor"):
        given = full_size["vae"][1][name]
        assert vae[name] == (list(given) if isinstance(given, tuple) else given), name
    first = clip_config(shapes("text_encoder", XL_CLIP_PREFIX))
    second = second_text_config(shapes("text_encoder_2", XL_OPEN_CLIP_PREFIX))
    assert TEXT_1.items() <= first.items() and TEXT_2.items() <= second.items()


def test_a_published_null_and_false_are_one_unet(folder: Path, tmp_path: Path) -> None:
    """upcast_attention is null in SDXL's unet/config.json, and false from a file's shapes."""
    copy = tmp_path / "sdxl"
    shutil.copytree(folder, copy)
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"upcast_attention": None}))
    assert unet_digest(resolve(copy)) == unet_digest(resolve(folder))
