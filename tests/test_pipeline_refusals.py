"""What is no text-to-image pipeline that latents drive is refused with its reason, exit status 2.

Before anything is written, and where configs tell, before weights are read.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler, SCMScheduler

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.choices import LoraFile
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.options import SamplingOptions
from blackpoint.sampling.pipelines.agreement import check_agreement
from blackpoint.sampling.pipelines.catcher import Catcher
from blackpoint.sampling.pipelines.flow import FlowLevels
from blackpoint.sampling.pipelines.model import PipelineModel
from blackpoint.scripts.cli import main
from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_pipelines import build, flow, make

PART = ["diffusers", "X"]
STOP = "pipeline.skip_layer_guidance_stop=0.4"


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("sd3", tmp_path_factory.mktemp("pipelines"))


def said(capsys: Any, folder: Path, checkpoint: Path | str, *keys: str, status: int = 2) -> str:
    """Runs a search; returns what it said. Nothing may be written where it was refused."""
    output = folder / "out"
    arguments = [f"checkpoint={checkpoint}", "prompts=a cat", f"output={output}", "budget_nfe=99"]
    size = ["height=32", "width=32", "num_steps=4", "verifiers.black.kind=luminance"]
    size.append("verifiers.black.target=0")
    assert main(["search", *arguments, *size, *keys]) == status
    assert not output.exists()
    return str(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"_class_name": "DiTPipeline", "transformer": PART}, "DiTPipeline.*takes no prompt"),
        ({"_class_name": "StableVideoDiffusionPipeline", "unet": PART}, "takes no prompt.*image"),
        ({"_class_name": "IFPipeline", "unet": PART}, "takes no latents"),
        (
            {
                "_class_name": "StableCascadeCombinedPipeline",
                "scheduler": PART,
                "prior_scheduler": PART,
            },
            "takes no|cascade with 2 schedulers",
        ),
        (
            {
                "_class_name": "KandinskyV22CombinedPipeline",
                "scheduler": PART,
                "prior_scheduler": PART,
            },
            "cascade with 2 schedulers",
        ),
        ({"_class_name": "NoSuchPipeline", "transformer": PART}, "no pipeline of the installed"),
    ],
)
def test_other_kinds_are_refused_by_their_index(
    index: dict[str, Any], reason: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    text = said(capsys, tmp_path, tmp_path / "model")
    assert re.search(reason, text), text


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (["pipeline.max_sequence_lenght=16"], "no such argument; did you mean pipeline.max_seq"),
        (["pipeline.max_sequence_lenght=16"], "pipeline.skip_guidance_layers"),
        (["pipeline.num_inference_steps=9"], "set num_steps instead"),
        (
            ["pipeline.skip_guidance_layers=[0]", STOP, "guidance_scale=4"],
            "acts on some steps alone",
        ),
        (["offload=model", "device=cpu"], "offload=model moves parts to a GPU"),
        (["max_tokens=150"], "max_tokens=150 goes with Stable Diffusion 1.x"),
        (["attention=xformers"], "attention goes with the UNets"),
        (["height=33"], "cannot be driven|differs|height"),
    ],
)
def test_settings_that_a_pipeline_does_not_have_are_refused(
    keys: list[str], reason: str, sd3: Path, tmp_path: Path, capsys: Any
) -> None:
    text = said(capsys, tmp_path, sd3, *keys)
    assert re.search(reason, text), text


def test_loras_are_of_stable_diffusion_alone(sd3: Path) -> None:
    options = SamplingOptions(checkpoint=str(sd3), lora=[LoraFile("x.safetensors")])
    with pytest.raises(UserError, match="lora goes with Stable Diffusion.*StableDiffusion3Pipel"):
        options.load_model("cpu", torch.float32)


def test_call_arguments_are_of_pipelines_alone(tmp_path: Path, capsys: Any) -> None:
    folder = make_tiny_pipeline(tmp_path / "sd")
    text = said(capsys, tmp_path, folder, "pipeline.clip_skip=1")
    assert "goes with pipelines other than Stable Diffusion" in text


def test_a_hub_id_behind_a_licence_says_how_to_log_in(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_: Any, **__: Any) -> Any:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    text = said(capsys, tmp_path, "black-forest-labs/FLUX.1-dev")
    assert "needs a login" in text and "hf auth login" in text


@pytest.mark.parametrize("scheduler", [SCMScheduler, EDMEulerScheduler])
def test_processes_of_other_kinds_are_refused(scheduler: Any, tmp_path: Path) -> None:
    """Trigflow's consistency models, and EDM's preconditioning."""
    pipeline = build("pixart", tmp_path)
    pipeline.scheduler = scheduler()
    with pytest.raises(UserError, match=scheduler.__name__):
        PipelineModel(pipeline, 32, 32)


def test_a_learned_variance_is_refused() -> None:
    latents = torch.zeros(1, 4, 2, 2)
    with pytest.raises(UserError, match="learned variance"):
        Catcher(flow()).step(torch.zeros(1, 8, 2, 2), 1, latents)


def test_a_pipeline_that_does_something_else_between_steps_is_refused(tmp_path: Path) -> None:
    """One that scales its latents before each step but the first differs from its own images."""
    pipeline = build("flux", tmp_path)
    network, calls = pipeline.transformer, []

    def other(_: Any, __: Any, output: Any) -> Any:
        calls.append(1)
        return (output[0] * (1 + 0.01 * len(calls)),)

    network.register_forward_hook(other)
    with pytest.raises(UserError, match="differs by .* from two steps of the stock pipeline"):
        check_agreement(PipelineModel(pipeline, 32, 32), Guidance(3.0), 4)


@pytest.mark.parametrize(
    "lists", [([1.0, 0.5], [1.0, 0.5]), ([1.0, 0.5], [1.0, 1.0, 0.0]), ([1.0], [1.0, 0.5, 0.0])]
)
def test_levels_that_are_no_path_are_refused(lists: Any) -> None:
    with pytest.raises(UserError, match="num_steps=2: the pipeline's scheduler lists"):
        FlowLevels(lambda num_steps: lists).grid(2)
