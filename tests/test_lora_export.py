"""format=lora: what peft trained, diffusers loads and kohya's readers merge is one and the same."""

import hashlib
import json
import re
import shutil

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

from blackpoint.data.files.errors import RunFailed
from blackpoint.sampling.export import lora_export
from blackpoint.sampling.export.lora_card import client_note
from blackpoint.sampling.export.lora_export import export_lora
from blackpoint.sampling.lora.adapters import Lora, LoraModule
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.scripts.cli import main
from tests.lora_files import (
    ALL_BLOCKS,
    ATTENTION,
    CONVOLUTIONS,
    adapted_unet,
    unet_output,
    write_lora_checkpoint,
)
from tests.tiny_pipeline import make_tiny_pipeline

TOLERANCE = {"rtol": 0, "atol": 1e-5}
DIFFUSERS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("base") / "sd", unet=ALL_BLOCKS)


@pytest.fixture(scope="module", params=[192, 278])
def exported(request, base, tmp_path_factory):
    """The UNet that peft trained at rank 8, alpha 4, and the folder of its files."""
    folder = tmp_path_factory.mktemp("run")
    targets = ATTENTION + (CONVOLUTIONS if request.param == 278 else [])
    unet = adapted_unet(base, targets=targets)
    path = write_lora_checkpoint(folder / "checkpoints/step=4.ckpt", unet, base)
    export_lora(path, folder / "black", verify=False)
    return request.param, unet, path, folder / "black"


def test_what_is_compared_fits_a_base_that_is_no_square():
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    with init_empty_weights():
        unet = UNet2DConditionModel((8, 32), block_out_channels=(32,), **blocks)
    assert lora_export._inputs(unet)["sample"].shape == (1, 4, 8, 8)


def metadata_of(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def test_diffusers_loads_what_peft_trained(base, exported):
    _, unet, path, folder = exported
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.load_lora_weights(folder)
    assert_close(unet_output(pipeline.unet), unet_output(unet), **TOLERANCE)
    assert_close(unet_output(DiffusionModel.load(path).unet), unet_output(unet), **TOLERANCE)


def test_the_factor_is_in_up_for_readers_that_know_no_alpha(base, exported):
    """W + B A of diffusers' file, whatever its header says."""
    _, unet, _, folder = exported
    state, plain = (
        load_file(folder / DIFFUSERS),
        UNet2DConditionModel.from_pretrained(base / "unet"),
    )
    with torch.no_grad():
        for key, down in state.items():
            if key.endswith(".lora_A.weight"):
                name = key.removesuffix(".lora_A.weight").removeprefix("unet.")
                up, weight = state[f"unet.{name}.lora_B.weight"], plain.get_submodule(name).weight
                weight += (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    assert_close(unet_output(plain), unet_output(unet), **TOLERANCE)
    header = json.loads(metadata_of(folder / DIFFUSERS)["lora_adapter_metadata"])
    assert header["unet.r"] == header["unet.lora_alpha"] == 8


def test_the_kohya_file_merged_by_its_formula(base, exported):
    """W + (alpha / r) B A, in the reader's own few lines: 192 modules, or 278; alpha 4, rank 8."""
    count, unet, _, folder = exported
    state = load_file(folder / "black.safetensors")
    merged = UNet2DConditionModel.from_pretrained(base / "unet")
    modules = {"lora_unet_" + n.replace(".", "_"): m for n, m in merged.named_modules()}
    names = {key.split(".")[0] for key in state}
    assert len(names) == count and len(state) == 3 * count
    with torch.no_grad():
        for name in names:
            down, up = (state[f"{name}.lora_{side}.weight"] for side in ("down", "up"))
            alpha, weight = state[f"{name}.alpha"], modules[name].weight
            assert (alpha.item(), alpha.shape, len(down)) == (4.0, (), 8)
            weight += alpha / len(down) * torch.einsum("or,r...->o...", up.flatten(1), down)
    ours = DiffusionModel.load(exported[2]).unet
    for name, tensor in merged.state_dict().items():
        assert_close(ours.state_dict()[name], tensor, rtol=0, atol=1e-6)
    assert_close(unet_output(merged), unet_output(unet), **TOLERANCE)


def test_metadata_has_what_clients_sort_by(exported):
    """A1111 and Forge: kohya's keys, ModelSpec's and the hash of the bytes behind the header."""
    count, _, _, folder = exported
    metadata = metadata_of(folder / "black.safetensors")
    expected = {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": "4",
        "ss_output_name": "black",
        "ss_zero_terminal_snr": "True",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.prediction_type": "v",
        "modelspec.title": "black",
    }
    assert expected.items() <= metadata.items()
    arguments = {"conv_dim": "8", "conv_alpha": "4"} if count == 278 else {}
    assert json.loads(metadata["ss_network_args"]) == arguments
    content = (folder / "black.safetensors").read_bytes()
    behind = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(behind).hexdigest()
    assert metadata["modelspec.hash_sha256"] == "0x" + metadata["sshs_model_hash"]


def test_the_scheduler_of_the_run_lies_beside(exported):
    folder = exported[3]
    scheduler = DDIMScheduler.from_pretrained(folder)
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr
    assert scheduler.config.timestep_spacing == "trailing"


def test_a_changed_process_is_told_in_card_and_command(exported, tmp_path, capsys):
    _, _, path, folder = exported
    card = (folder / "README.md").read_text()
    assert "No client learns that" in " ".join(card.split()) and "load_lora_weights" in card
    assert main(["export", f"checkpoint={path}", f"output={tmp_path / 'x'}", "format=lora"]) == 0
    out = capsys.readouterr().out
    assert "verified against peft and diffusers" in out
    assert "prediction type epsilon -> v_prediction and non-zero -> zero terminal SNR" in out
    assert "Pass on the merged model" in out
    assert sorted(f.name for f in (tmp_path / "x").iterdir()) == [
        "README.md",
        DIFFUSERS,
        "scheduler_config.json",
        "x.safetensors",
    ]


def test_a_kept_process_needs_no_warning(pipeline, tmp_path):
    process = DiffusionModel.load(pipeline, with_unet=False).process
    path = write_lora_checkpoint(
        tmp_path / "a.ckpt", adapted_unet(pipeline), pipeline, process=process
    )
    run = export_lora(path, tmp_path / "out")
    assert client_note(run) == "" and run.changes == []
    assert "No client" not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("alpha", [4, 3])
def test_half_precision_is_verified_to_its_rounding(pipeline, tmp_path, alpha):
    """alpha / rank = 3/8 is no power of two: up is rounded once more in diffusers' file."""
    unet = adapted_unet(pipeline, alpha=alpha)
    path = write_lora_checkpoint(tmp_path / "a.ckpt", unet, pipeline, alpha=alpha)
    export_lora(path, tmp_path / "out", dtype="float16")
    state = load_file(tmp_path / "out/out.safetensors")
    assert {t.dtype for k, t in state.items() if "alpha" not in k} == {torch.float16}


def test_files_that_are_read_otherwise_are_not_written(pipeline, tmp_path, monkeypatch):
    path = write_lora_checkpoint(tmp_path / "a.ckpt", adapted_unet(pipeline), pipeline)

    def unfolded(lora):
        tensors = {}
        for name, module in lora.modules.items():
            tensors[f"{name}.lora_A.weight"] = module.down.contiguous()
            tensors[f"{name}.lora_B.weight"] = module.up.contiguous()
        return tensors

    monkeypatch.setattr(lora_export, "diffusers_tensors", unfolded)
    with pytest.raises(RunFailed, match=r"load_lora_weights: differs by(.|\n)*\d+ adapters"):
        export_lora(path, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.ckpt"]


def test_what_cannot_be_a_lora_file_is_refused(pipeline, tmp_path, capsys):
    dora = adapted_unet(pipeline, targets=["to_q"], use_dora=True)
    write_lora_checkpoint(tmp_path / "dora.ckpt", dora, pipeline)
    model = DiffusionModel.load(pipeline)
    state = {f"unet.{name}": tensor for name, tensor in model.unet.state_dict().items()}
    record = {"base": str(pipeline), "process": model.process.to_diffusers()}
    torch.save({"state_dict": state, "blackpoint": record}, tmp_path / "full.ckpt")
    cases = {
        f"checkpoint={tmp_path / 'dora.ckpt'}": "DoRA.*leave format out for the merged",
        f"checkpoint={tmp_path / 'full.ckpt'}": "no run that trained low-rank adapters",
        f"checkpoint={pipeline}": "no run that trained low-rank adapters",
        f"lora={tmp_path}": "leave lora out",
        "output=a.safetensors": "format=lora writes a folder",
    }
    for argument, reason in cases.items():
        given = {"checkpoint": f"{pipeline}", "output": f"{tmp_path / 'out'}"}
        key, _, value = argument.partition("=")
        given[key] = value
        arguments = [f"{key}={value}" for key, value in given.items()]
        assert main(["export", "format=lora", *arguments]) == 2
        assert re.search(reason, capsys.readouterr().err), argument
    assert not (tmp_path / "out").exists()


def test_a_run_directory_gives_its_last_checkpoint(pipeline, tmp_path):
    run = tmp_path / "run"
    unet = adapted_unet(pipeline)
    write_lora_checkpoint(run / "checkpoints/step=2.ckpt", adapted_unet(pipeline, rank=4), pipeline)
    write_lora_checkpoint(run / "checkpoints/step=4.ckpt", unet, pipeline)
    (run / "config.yaml").write_text(
        f"checkpoint: {pipeline}\nseed: 7\noptimizer: {{learning_rate: 0.1}}\n"
        "batch_size: 2\ntrainer: {accumulate_grad_batches: 16}\n"
    )
    shutil.copytree(pipeline, run / "export")  # the merged model, which holds no adapters
    export_lora(run, run / "export_lora")
    metadata = metadata_of(run / "export_lora/export_lora.safetensors")
    assert metadata["ss_network_dim"] == "8" and metadata["ss_learning_rate"] == "0.1"
    assert metadata["ss_total_batch_size"] == "32"  # kohya's: of all devices, accumulated
    assert metadata["ss_seed"] == "7" and metadata["ss_sd_model_name"] == pipeline.name


def test_betas_alone_are_a_change_too(pipeline, tmp_path):
    shifted = NoiseSchedule.scaled_linear().shifted(256, 512)
    path = write_lora_checkpoint(
        tmp_path / "a.ckpt", adapted_unet(pipeline), pipeline, process=Process(shifted, "epsilon")
    )
    assert export_lora(path, tmp_path / "out", verify=False).changes == ["betas"]


def test_sdxl_has_the_block_names_that_kohya_trains():
    """LDM's, 722 modules and 788 with convolutions; diffusers' reader maps them back."""
    with init_empty_weights():
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=4,
        )
    tensor = torch.ones(1, 1)
    counts = {}
    for targets in (ATTENTION, ATTENTION + CONVOLUTIONS):
        names = [
            name
            for name, module in unet.named_modules()
            if name.endswith(tuple(f".{target}" for target in targets))
            and hasattr(module, "weight")
        ]
        lora = Lora({f"unet.{name}": LoraModule(tensor, tensor, 1.0) for name in names})
        tensors = lora_export.kohya_tensors(lora, unet)
        state = _maybe_map_sgm_blocks_to_diffusers(dict(tensors), unet.config)
        back = {key.split(".")[0].removeprefix("lora_unet_") for key in state}
        # This reader has a second step, for the names of blocks and what is in their resnets.
        for old, new in (("input_b", "down_b"), ("middle_block", "mid_block"), ("output_", "up_")):
            back = {name.replace(old, new) for name in back}
        attention = {name.replace(".", "_") for name in names if ".attentions." in name}
        assert attention <= back
        counts[len(names)] = {key.split(".")[0] for key in tensors}
    assert [*counts] == [722, 788] and [len(keys) for keys in counts.values()] == [722, 788]
    assert {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_output_blocks_5_2_conv",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_output_blocks_0_0_skip_connection",
        "lora_unet_middle_block_2_emb_layers_1",
    } <= counts[788]
