"""What the table of clients says of a single file, against the clients' own rules.

The rules are written anew here from the clients' code (sampling/export/clients.py names it), and
judge what the exporter writes: keys, shapes, markers and NAME.yaml.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel

from blackpoint.sampling.checkpoints.ldm_keys import to_ldm
from blackpoint.sampling.checkpoints.prediction_evidence import STATISTIC, V_STATISTIC
from blackpoint.sampling.export.client_report import clients_table, file_report
from blackpoint.sampling.export.clients import (
    CLIENTS,
    Architecture,
    client_facts,
    client_notes,
    has_sd_betas,
    signs_of,
)
from blackpoint.sampling.export.model_card import model_card
from blackpoint.sampling.export.single_file import markers
from blackpoint.sampling.pixels.folder import PixelForm
from blackpoint.sampling.pixels.pixel_codec import PixelCodec
from blackpoint.sampling.process import Process
from blackpoint.scripts.measurements.make_random_base import ARCHITECTURES
from tests.test_ldm_keys import SDXL_UNET
from tests.toy_denoisers import SD, ZERO_SNR

SD1, LIKE_V, LIKE_EPS = Architecture("SD 1"), Architecture("SD 2", 0.12), Architecture("SD 2", 0.05)
SDXL = Architecture("SDXL", is_xl=True)
OF_SD = (SD1, LIKE_V, LIKE_EPS)
KNOWN = (*OF_SD, SDXL)
PUBLISHED = Process(SD, "epsilon", "leading")
V, ZERO = Process(SD), Process(ZERO_SNR)
SAMPLE = replace(ZERO, prediction_type="sample")
SHIFTED = (Process(SD.shifted(64, 128)), Process(ZERO_SNR.shifted(64, 128)))
UNET = "model.diffusion_model."
BY_NAME = {client.name: client for client in CLIENTS}


def unet_config(name):
    return SDXL_UNET if name == "sdxl" else ARCHITECTURES[name].unet


@cache
def weights_of(name):
    with init_empty_weights():
        unet = UNet2DConditionModel(**unet_config(name))
    return to_ldm("unet", unet.config, unet.state_dict())


def written_file(process, architecture):
    """What clients look at in the file: keys and shapes of all weights, values of one, markers."""
    name = {"SD 1": "sd15", "SD 2": "sd21_base", "SDXL": "sdxl"}[architecture.kind]
    tensors = dict(weights_of(name))
    spread = architecture.statistic or 0.0
    if architecture.kind != "SDXL":
        tensors[STATISTIC] = torch.tensor([spread, -spread]).repeat(160)
    if architecture.kind == "SD 2":
        key = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
        tensors[key] = torch.empty(3072, 1024, device="meta")
    return tensors | markers(SimpleNamespace(process=process))


def ldm_yaml_of(process):
    """The parameterization in NAME.yaml, None without the file."""
    return "v" if process.prediction_type == "v_prediction" else None


def context_of(file):
    """The first level with attention: the first in SD, the second in SDXL."""
    names = [f"{UNET}input_blocks.{n}.1.transformer_blocks.0.attn2.to_k.weight" for n in (1, 4)]
    return next(file[name] for name in names if name in file).shape[1]


def by_comfyui(file, yaml):
    """comfy/model_detection.py and supported_models.py: SD15, SD20, SDXL."""
    context = context_of(file)
    assert (f"{UNET}label_emb.0.0.weight" in file) == (context == 2048)  # adm_in_channels 2816
    assert file[f"{UNET}input_blocks.0.0.weight"].shape[0] == 320
    if context == 1024:
        is_v = torch.std(file[STATISTIC], unbiased=False) > 0.09
        return ("v" if is_v else "eps"), False
    if context == 2048 and "v_pred" in file:
        return "v", "ztsnr" in file
    return "eps", False


def by_forge(file, yaml):
    """backend/loader.py: a yaml that says v, else the guess; modules_forge: the key ztsnr."""
    return ("v" if yaml == "v" else by_comfyui(file, None)[0]), "ztsnr" in file


def by_a1111(file, yaml):
    """modules/sd_models_config.py: the yaml, else a config by keys; no key is read in 1.10.1.

    Without a yaml it runs the UNet of an SD 2, of which these files hold no weights.
    """
    weight = file.get("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight")
    assert (weight is not None and weight.shape[1] == 1024) == any("cond_stage" in k for k in file)
    assert file[f"{UNET}input_blocks.0.0.weight"].shape[1] not in (8, 9)  # inpainting, pix2pix
    return yaml or "eps", False


def by_diffusers(file, yaml):
    return "eps", False


def by_invokeai(file, yaml):
    """configs/main.py: by the width of the context, and global_step, which files of ours lack."""
    assert "global_step" not in file
    return {768: "eps", 1024: "v", 2048: "eps"}[context_of(file)], False


RULES = {
    "ComfyUI": by_comfyui,
    "Forge": by_forge,
    "reForge": by_forge,
    "A1111": by_a1111,
    "diffusers": by_diffusers,
    "InvokeAI": by_invokeai,
}


@pytest.mark.parametrize("architecture", KNOWN, ids=str)
@pytest.mark.parametrize("process", [PUBLISHED, V, ZERO], ids=["published", "v", "zero"])
def test_the_table_says_what_each_client_takes_a_file_for(process, architecture):
    file = written_file(process, architecture)
    assert RULES.keys() == BY_NAME.keys()
    for name, rule in RULES.items():
        parameterization, zero_snr = rule(file, ldm_yaml_of(process))
        text = " ".join(client_notes(BY_NAME[name], process, architecture))
        taken_for = {"v": "v-prediction", "eps": "epsilon"}[parameterization]
        assert text.startswith(f"Takes it for {taken_for}"), name
        assert (" with zero terminal SNR (" in text) == zero_snr, name
        true_type = {"v_prediction": "v", "epsilon": "eps"}[process.prediction_type]
        truth = (true_type, process.schedule.is_zero_terminal_snr)
        assert ("nothing to set" in text) == ((parameterization, zero_snr) == truth), name


def test_only_sdxl_files_are_known_by_their_keys_in_comfyui():
    for architecture, known in ((SD1, ("eps", False)), (SDXL, ("v", True))):
        file = written_file(ZERO, architecture)
        assert by_comfyui(file, None) == known and {"v_pred", "ztsnr"} <= file.keys()


def said(name, process, architecture):
    return " ".join(client_notes(BY_NAME[name], process, architecture))


def test_a_user_is_told_the_node_the_setting_and_the_scheduler():
    node = "`ModelSamplingDiscrete` with sampling `{}`, zsnr `{}`"
    assert node.format("v_prediction", "true") in said("ComfyUI", ZERO, SD1)
    assert node.format("v_prediction", "true") in said("ComfyUI", ZERO, LIKE_V)
    assert node.format("v_prediction", "false") in said("ComfyUI", V, LIKE_EPS)
    assert node.format("eps", "false") in said("ComfyUI", PUBLISHED, LIKE_V)
    assert "ModelSamplingDiscrete" not in said("ComfyUI", V, LIKE_V)
    assert said("ComfyUI", ZERO, SD1).count("ModelSamplingDiscrete") == 1
    assert "Zero Terminal SNR" in said("A1111", ZERO, SD1)
    assert "Zero Terminal SNR" not in said("A1111", V, SD1) + said("Forge", ZERO, SD1)
    assert "prediction type `v_prediction`" in said("InvokeAI", V, SD1)
    assert "prediction type" not in said("InvokeAI", V, LIKE_EPS)
    assert "has no setting" in said("Forge", PUBLISHED, LIKE_V)  # a yaml with eps has no effect
    for name in ("ComfyUI", "Forge", "reForge"):
        assert "right, nothing to set" in said(name, ZERO, SDXL)
    for client in CLIENTS:
        assert ("sgm_uniform" in said(client.name, ZERO, SD1)) == (client.name == "ComfyUI")
        assert "Karras" not in said(client.name, V, SD1)


def test_what_diffusers_is_told_makes_the_scheduler_of_the_process():
    """The report's own words, run: a DDIM scheduler with the model's noise and timesteps."""
    from diffusers import DDIMScheduler, PNDMScheduler

    text = said("diffusers", ZERO, SD1)
    call = text[text.index("DDIMScheduler.from_config") :].split("`")[0]
    pipe = SimpleNamespace(scheduler=PNDMScheduler.from_config(PUBLISHED.to_diffusers()))
    scheduler = eval(call, {"DDIMScheduler": DDIMScheduler, "pipe": pipe})
    expected = DDIMScheduler.from_config(ZERO.to_diffusers())
    assert torch.equal(scheduler.alphas_cumprod, expected.alphas_cumprod)
    names = (
        "prediction_type",
        "timestep_spacing",
        "set_alpha_to_one",
        "clip_sample",
        "steps_offset",
    )
    for key in names:
        assert scheduler.config[key] == expected.config[key]


def comfyui_timesteps(scheduler, count):
    """k-diffusion's and ComfyUI's schedulers on the zero-SNR noise levels, as timesteps.

    alpha_bar 0 is 4.8973451890853435e-08 there (comfy/model_sampling.py).
    """
    alpha_bar = ZERO_SNR.alpha_bar.clone()
    alpha_bar[-1] = 4.8973451890853435e-08
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
    low, high = sigmas[0].item(), sigmas[-1].item()
    match scheduler:
        case "simple":
            return [999 - int(i * 1000 / count) for i in range(count)]
        case "sgm_uniform":
            return torch.linspace(999, 0, count + 1)[:-1].tolist()
        case "ddim_uniform":
            return list(range(1, 1000, 1000 // count))[::-1]
        case "karras":
            ramp = torch.linspace(0, 1, count, dtype=torch.float64)
            levels = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        case "exponential":
            levels = torch.exp(
                torch.linspace(torch.tensor(high).log(), torch.tensor(low).log(), count)
            )
    return [(sigmas.log() - level.log()).abs().argmin().item() for level in levels]


def test_the_schedulers_that_the_table_names_are_trailing_and_the_others_are_not():
    """As measured in ComfyUI 0.3.64 at 20 steps."""
    assert comfyui_timesteps("simple", 20) == ZERO_SNR.trailing_timesteps(20)
    uniform = comfyui_timesteps("sgm_uniform", 20)
    assert (
        uniform[0] == 999
        and max(abs(a - b) for a, b in zip(uniform, ZERO_SNR.trailing_timesteps(20), strict=True))
        < 1
    )
    assert comfyui_timesteps("ddim_uniform", 20)[:2] == [951, 901]
    assert sum(t >= 990 for t in comfyui_timesteps("karras", 20)) == 9
    assert sum(t > 990 for t in comfyui_timesteps("exponential", 20)) == 5


@pytest.mark.parametrize("architecture", KNOWN, ids=str)
def test_no_client_samples_what_a_single_file_cannot_say(architecture):
    for process in SHIFTED:
        [fact] = client_facts(process, architecture)
        assert "Do not use them with this model" in fact
    [fact] = client_facts(SAMPLE, architecture)
    assert "predicts the sample" in fact


def test_no_card_advises_a_key_that_only_sdxl_has():
    for process in (PUBLISHED, V, ZERO, *SHIFTED):
        for architecture in OF_SD:
            assert "`v_pred`" not in " ".join(client_facts(process, architecture))


def test_only_stable_diffusions_betas_are_its_betas():
    assert has_sd_betas(PUBLISHED) and has_sd_betas(ZERO)
    others = (SD.linear(), SD.linear().zero_terminal_snr(), SD.scaled_linear(num_steps=500))
    for schedule in (*others, SD.scaled_linear(beta_end=0.0125), SD.cosine()):
        assert not has_sd_betas(Process(schedule))


@pytest.mark.parametrize(
    ("name", "kind"), [("sd15", "SD 1"), ("sd21_base", "SD 2"), ("sdxl", "SDXL")]
)
def test_the_architecture_is_read_from_the_unet(name, kind):
    with init_empty_weights():
        unet = UNet2DConditionModel(**unet_config(name))
    if kind == "SD 2":
        norm = unet.up_blocks[3].attentions[2].transformer_blocks[0].norm1
        norm.bias = torch.nn.Parameter(torch.tensor([0.1, -0.1]).repeat(160).half())
        found = Architecture.of(unet)
        assert found.statistic == pytest.approx(0.1, abs=1e-4)
        assert "statistic" in signs_of(V, found)
        # the bias that clients look at is this one under the name that files have
        written = to_ldm("unet", unet.config, unet.state_dict())[STATISTIC]
        assert torch.equal(written, norm.bias)
    assert Architecture.of(unet).kind == kind
    assert Architecture.of(unet, in_pixels=True) == Architecture("pixel")
    unet.register_to_config(cross_attention_dim=32)
    assert Architecture.of(unet) == Architecture("unknown", is_xl=kind == "SDXL")


def test_the_report_of_a_file_names_every_client_with_its_version():
    report = file_report("x.safetensors", ZERO, LIKE_EPS)
    assert report.startswith("x.safetensors: SD 2, v-prediction, zero terminal SNR")
    for client in CLIENTS:
        assert f"\n{client.name} {client.version}\n- Takes it for" in report
    assert max(map(len, report.splitlines())) <= 100
    assert "No client but blackpoint" in file_report("x", ZERO, Architecture("unknown"))


def test_the_page_of_clients_holds_the_table():
    page = (Path(__file__).parents[1] / "docs" / "clients.md").read_text(encoding="utf-8")
    assert clients_table() in page
    assert f"is above {V_STATISTIC}" in page


def test_the_card_holds_the_statements_and_wraps_them():
    card = model_card(ZERO, "ema", "base", architecture=LIKE_EPS)
    flat = " ".join(card.split())
    for fact in client_facts(ZERO, LIKE_EPS):
        assert " ".join(fact.split()) in flat
    assert max(map(len, card.split("## Schedulers")[1].splitlines())) <= 100
    for client in CLIENTS:
        assert f"**{client.name}** {client.version}" in card and client.evidence in flat


def test_the_card_of_a_pixel_model_sends_to_diffusers():
    pixels = PixelForm(PixelCodec("space_to_depth", 4), ("zero", "one"), False)
    card = model_card(ZERO, "ema", "base", None, pixels, Architecture("pixel"))
    assert "They do not know this UNet" in card and "ModelSamplingDiscrete" not in card
