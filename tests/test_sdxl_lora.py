"""LoRA files for SDXL, adapters of both text encoders within, equal stock diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.peft
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from blackpoint.data.files.dotted import renamed
from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.fingerprint import sampling_digest
from blackpoint.sampling.checkpoints.ldm_keys import unet_modules
from blackpoint.sampling.checkpoints.merged import find_lora
from blackpoint.sampling.choices import LoraFile
from blackpoint.sampling.export.export import export
from blackpoint.sampling.model import DiffusionModel
from blackpoint.scripts.cli import main
from tests.lora_files import ATTENTION, CONVOLUTIONS
from tests.test_sdxl_model import ZERO_SNR
from tests.tiny_sdxl import UNET, WIDTHS, make_carried_sdxl, make_tiny_sdxl

TOLERANCE = {"rtol": 0, "atol": 1e-5}
PROMPTS = ["a red one", ""]
PARTS = ("unet", "text_encoder", "text_encoder_2")
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
RANK = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("model") / "sdxl")


def trained(folder: Path, alpha: float = RANK) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of adapters by part, as peft saves them; none of them is zero."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    states = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for part in PARTS:
            targets = ATTENTION + CONVOLUTIONS if part == "unet" else TEXT_LAYERS
            config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=targets)
            model = inject_adapter_in_model(config, getattr(pipeline, part))
            for name, tensor in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(tensor, std=0.1)
            state = get_peft_model_state_dict(model)
            states[part] = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    return states


@pytest.fixture(scope="module")
def states(folder: Path) -> dict[str, dict[str, Tensor]]:
    return trained(folder)


def of_parts(states: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Names as peft and diffusers have them: the part in front."""
    return {f"{part}.{name}": t for part, state in states.items() for name, t in state.items()}


def published(states: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The same, with the level text_model that transformers 5 drops from the first encoder."""
    first = "text_encoder.encoder."
    return {
        name.replace(first, "text_encoder.text_model.encoder.", 1): tensor
        for name, tensor in of_parts(states).items()
    }


def kohya(states: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Names by diffusers' own converter, with the prefixes lora_te1_ and lora_te2_."""
    found: dict[str, Tensor] = convert_state_dict_to_kohya(published(states))
    prefixes = {key.split("_")[1] for key in found}
    assert prefixes == {"unet", "te1", "te2"} and all(key.startswith("lora_") for key in found)
    return found


def ldm(states: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Names of kohya's trainer for SDXL: sgm's blocks, of which diffusers has a table, too."""
    blocks = unet_modules(UNET)
    modules = [name.rpartition(".lora_")[0] for name in states["unet"]]
    names = {flat(name): flat(new) for name, new in renamed(modules, blocks).items()}
    assert names.keys() == set(map(flat, modules))
    return {
        f"lora_unet_{names[module]}.{end}" if module in names else key: tensor
        for key, tensor in kohya(states).items()
        for module, _, end in [key.removeprefix("lora_unet_").partition(".")]
    }


def flat(name: str) -> str:
    return name.replace(".", "_")


SPELLINGS = {"peft": of_parts, "diffusers": published, "kohya": kohya, "kohya, sgm's blocks": ldm}


def written(states: dict[str, dict[str, Tensor]], spelling: str, folder: Path) -> Path:
    path = folder / "a.safetensors"
    save_file({k: t.contiguous() for k, t in SPELLINGS[spelling](states).items()}, path)
    return path


@torch.no_grad()
def outputs(unet: Any, embeds: Tensor, pooled: Tensor) -> tuple[Tensor, ...]:
    """Returns both embeddings, and the UNet's output for them."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)}
    output = unet(x, torch.tensor([999, 500]), embeds, added_cond_kwargs=added).sample
    return embeds, pooled, output


def of_ours(model: DiffusionModel) -> tuple[Tensor, ...]:
    condition = model.encode_prompts(PROMPTS)
    assert condition.pooled is not None
    return outputs(model.unet, condition.prompt_embeds, condition.pooled)


@torch.no_grad()
def of_stock(folder: Path, lora: Path | None, scale: float = 1.0) -> tuple[Tensor, ...]:
    stock = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    if lora is not None:
        stock.load_lora_weights(lora, adapter_name="a")
        stock.fuse_lora(lora_scale=scale)
    embeds, _, pooled, _ = stock.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    return outputs(stock.unet, embeds, pooled)


@pytest.fixture
def any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for a newer peft than there is; what is called here is in it."""
    monkeypatch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0.17.0")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_three_parts_are_merged_as_diffusers_fuses_them(
    folder: Path, states: Any, tmp_path: Path, any_peft: None, spelling: str
) -> None:
    path = written(states, spelling, tmp_path)
    ours = of_ours(loaded(folder, path, 0.5))
    assert_close(ours, of_stock(folder, path, 0.5), **TOLERANCE)
    for changed, plain in zip(ours, of_stock(folder, None), strict=True):
        assert (changed - plain).abs().max() > 1e-2


def test_alpha_of_each_part_is_in_the_header(
    folder: Path, states: Any, tmp_path: Path, any_peft: None
) -> None:
    """diffusers writes peft's settings there, with the part in front of their keys."""
    settings = {part: {"r": RANK, "lora_alpha": n + 3} for n, part in enumerate(PARTS)}
    for part in PARTS:
        names = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in states[part]}
        settings[part] |= {"target_modules": sorted(names)}
    layers = {f"{part}_lora_layers": state for part, state in states.items()}
    header = {f"{part}_lora_adapter_metadata": one for part, one in settings.items()}
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, **layers, **header)
    assert_close(of_ours(loaded(folder, tmp_path)), of_stock(folder, tmp_path), **TOLERANCE)
    alphas = [module.alpha for module in find_lora(str(tmp_path)).of("text_encoder_2").values()]
    assert set(alphas) == {5.0}


def test_digests_are_those_of_the_merged_folder(folder: Path, states: Any, tmp_path: Path) -> None:
    merged = loaded(folder, written(states, "kohya", tmp_path))
    merged.save(tmp_path / "merged")
    models = [merged, DiffusionModel.load(tmp_path / "merged"), DiffusionModel.load(folder)]
    digests = [sampling_digest(model) for model in models]
    assert digests[0] == digests[1] != digests[2]
    second = {"text_encoder_2": states["text_encoder_2"]}
    save_file(of_parts(second), tmp_path / "second.safetensors")
    alone = loaded(folder, tmp_path / "second.safetensors")
    found, plain = (of_ours(model) for model in (alone, models[2]))
    width = WIDTHS["text_encoder"]
    assert_close(found[0][..., :width], plain[0][..., :width], rtol=0, atol=0)
    assert sampling_digest(alone) not in digests


@pytest.mark.slow
def test_adapters_go_onto_a_single_file(tmp_path: Path) -> None:
    """There q, k and v of the second encoder are one matrix, and its projection is transposed."""
    folder = make_carried_sdxl(
        tmp_path / "sdxl", DDIMScheduler.from_config(ZERO_SNR.to_diffusers())
    )
    file = export(folder, tmp_path / "model.safetensors", verify=False, dtype="float32")
    path = written(trained(folder), "kohya, sgm's blocks", tmp_path)
    assert_close(of_ours(loaded(file, path)), of_ours(loaded(folder, path)), **TOLERANCE)


def test_adapters_of_one_of_the_encoders_without_its_name_are_refused(
    folder: Path, states: Any, tmp_path: Path
) -> None:
    """peft's own folder of a text encoder: both encoders have modules of these names."""
    save_file(states["text_encoder_2"], tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"of which text encoder\? .*text_encoder_2\. belongs"):
        loaded(folder, tmp_path / "a.safetensors")


def test_a_misfit_of_another_sdxl_is_not_called_one_for_sdxl(
    folder: Path, states: Any, tmp_path: Path
) -> None:
    wide = {f"text_encoder_2.{name}": t for name, t in states["text_encoder"].items()}
    save_file(wide, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="does not fit the checkpoint") as told:
        loaded(folder, tmp_path / "a.safetensors")
    assert "for a weight of [48, 48]" in str(told.value) and "made for" not in str(told.value)


def test_a_file_for_sdxl_fits_no_other_model(
    pipeline: Path, states: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = written(states, "kohya", tmp_path), tmp_path / "out"
    given = [f"checkpoint={pipeline}", f"lora={path}", "prompts=a", f"output={output}"]
    assert main(["sample", *given]) == 2
    assert "it looks made for SDXL" in capsys.readouterr().err and not output.exists()


def loaded(checkpoint: Path, lora: Path, scale: float = 1.0) -> DiffusionModel:
    return DiffusionModel.load(checkpoint, loras=[LoraFile(str(lora), scale)])
