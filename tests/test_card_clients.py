"""What the card says of ComfyUI, A1111 and Forge, as a function of process and architecture."""

from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel

from blackpoint.sampling.export.clients import Architecture, client_facts, has_sd_betas
from blackpoint.sampling.export.model_card import model_card
from blackpoint.sampling.pixels.folder import PixelForm
from blackpoint.sampling.pixels.pixel_codec import PixelCodec
from blackpoint.sampling.process import Process
from blackpoint.scripts.measurements.make_random_base import ARCHITECTURES
from tests.toy_denoisers import SD, ZERO_SNR

SD1, LIKE_V, LIKE_EPS = Architecture("SD 1"), Architecture("SD 2", 0.12), Architecture("SD 2", 0.05)
KNOWN = (SD1, LIKE_V, LIKE_EPS)
PUBLISHED = Process(SD, "epsilon", "leading")
V, ZERO = Process(SD), Process(ZERO_SNR)
SAMPLE = replace(ZERO, prediction_type="sample")
SHIFTED = (Process(SD.shifted(64, 128)), Process(ZERO_SNR.shifted(64, 128)))
WORDS = {
    "statistic": "by the standard deviation of one bias",
    "node": "ModelSamplingDiscrete",
    "zsnr": "zsnr `true`",
    "scheduler": "sgm_uniform",
    "yaml": "NAME.yaml",
    "ztsnr": "the key `ztsnr`",
    "no_sample": "cannot run it",
    "from_single_file": "from_single_file",
    "own_betas": "Do not use them with this model",
    "unknown": "They do not know this UNet",
}


def said(process, architecture):
    text = " ".join(client_facts(process, architecture))
    return {name for name, words in WORDS.items() if words in text}


TOLD = {"node", "yaml", "from_single_file"}
OF_ZERO = {*TOLD, "zsnr", "scheduler", "ztsnr"}
SHOWN = [
    (PUBLISHED, SD1, set()),
    (PUBLISHED, LIKE_EPS, set()),
    (PUBLISHED, LIKE_V, {"statistic", "node", "yaml"}),
    (V, SD1, TOLD),
    (V, LIKE_EPS, {*TOLD, "statistic"}),
    (V, LIKE_V, {"yaml", "from_single_file"}),
    (ZERO, SD1, OF_ZERO),
    (ZERO, LIKE_EPS, {*OF_ZERO, "statistic"}),
    (ZERO, LIKE_V, OF_ZERO),
    (SAMPLE, SD1, {"node", "zsnr", "scheduler", "no_sample", "from_single_file"}),
    *(
        (process, known, {"own_betas", "from_single_file"})
        for process in SHIFTED
        for known in KNOWN
    ),
    *(
        (process, Architecture(kind), {"unknown"})
        for process in (PUBLISHED, ZERO, *SHIFTED)
        for kind in ("pixel", "unknown")
    ),
]


@pytest.mark.parametrize(("process", "architecture", "names"), SHOWN)
def test_each_statement_is_made_where_it_is_so(process, architecture, names):
    assert said(process, architecture) == names


def test_a_client_is_told_the_prediction_type():
    for process, sampling in ((ZERO, "v_prediction"), (SAMPLE, "x0"), (PUBLISHED, "eps")):
        assert f"sampling `{sampling}`" in " ".join(client_facts(process, LIKE_V))
    assert "sampling `v_prediction`, zsnr `false`" in " ".join(client_facts(V, SD1))
    assert 'parameterization: "v"' in " ".join(client_facts(V, SD1))
    assert 'parameterization: "eps"' in " ".join(client_facts(PUBLISHED, LIKE_V))
    assert "`v1-inference.yaml`" in " ".join(client_facts(ZERO, SD1))
    assert "`v2-inference.yaml`" in " ".join(client_facts(ZERO, LIKE_EPS))
    assert "(0.050 here; above 0.09 means v)" in " ".join(client_facts(ZERO, LIKE_EPS))


def test_no_card_advises_a_key_that_only_sdxl_has():
    for process, architecture, _ in SHOWN:
        assert "`v_pred`" not in " ".join(client_facts(process, architecture))


def test_only_stable_diffusions_betas_are_its_betas():
    assert has_sd_betas(PUBLISHED) and has_sd_betas(ZERO)
    others = (SD.linear(), SD.linear().zero_terminal_snr(), SD.scaled_linear(num_steps=500))
    for schedule in (*others, SD.scaled_linear(beta_end=0.0125), SD.cosine()):
        assert not has_sd_betas(Process(schedule))


@pytest.mark.parametrize(("name", "kind"), [("sd15", "SD 1"), ("sd21_base", "SD 2")])
def test_the_architecture_is_read_from_the_unet(name, kind):
    with init_empty_weights():
        unet = UNet2DConditionModel(**ARCHITECTURES[name].unet)
    if kind == "SD 2":
        norm = unet.up_blocks[3].attentions[2].transformer_blocks[0].norm1
        norm.bias = torch.nn.Parameter(torch.tensor([0.1, -0.1]).repeat(160).half())
        assert Architecture.of(unet).statistic == pytest.approx(0.1, abs=1e-4)
        assert Architecture.of(unet).guess == "v_prediction"
    assert Architecture.of(unet).kind == kind
    assert Architecture.of(unet, in_pixels=True) == Architecture("pixel")
    unet.register_to_config(cross_attention_dim=32)
    assert Architecture.of(unet) == Architecture("unknown")


def test_the_card_holds_the_statements_and_wraps_them():
    card = model_card(ZERO, "ema", "base", architecture=LIKE_EPS)
    flat = " ".join(card.split())
    for fact in client_facts(ZERO, LIKE_EPS):
        assert " ".join(fact.split()) in flat
    assert max(map(len, card.split("## Schedulers")[1].splitlines())) <= 100
    assert "## ComfyUI, A1111, Forge" not in model_card(PUBLISHED, "raw", "base", architecture=SD1)


def test_the_card_of_a_pixel_model_sends_to_diffusers():
    pixels = PixelForm(PixelCodec("space_to_depth", 4), ("zero", "one"), False)
    card = model_card(ZERO, "ema", "base", None, pixels, Architecture("pixel"))
    assert "They do not know this UNet" in card and "ModelSamplingDiscrete" not in card
