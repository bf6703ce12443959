"""lora=FILE: every verb samples the merged model, knows it by its content and refuses misfits."""

import json
import re
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.fingerprint import (
    sampling_digest,
    text_encoder_digest,
    unet_digest,
)
from blackpoint.sampling.checkpoints.merged import find_lora, with_loras
from blackpoint.sampling.checkpoints.resolve import resolve
from blackpoint.sampling.choices import LoraFile
from blackpoint.sampling.model import DiffusionModel
from blackpoint.scripts.cli import main
from blackpoint.scripts.config import load_values
from blackpoint.scripts.sweep.cells import cells_of
from blackpoint.scripts.sweep.config import SweepConfig
from tests.lora_files import adapted_unet, adapters, unet_output, write_lora_checkpoint
from tests.tiny_pipeline import make_tiny_pipeline

TOLERANCE = {"rtol": 0, "atol": 1e-5}
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.fixture(scope="module")
def unet_lora(pipeline, tmp_path_factory):
    """diffusers' file of adapters of the UNet, rank 8 and alpha 8."""
    folder = tmp_path_factory.mktemp("lora")
    state = adapters(adapted_unet(pipeline, alpha=8))
    save_file({f"unet.{k}": t for k, t in state.items()}, folder / "a.safetensors")
    return folder / "a.safetensors"


@pytest.fixture(scope="module")
def text_lora(tmp_path_factory):
    """kohya's file of one adapter of the text encoder."""
    generator = torch.Generator().manual_seed(0)
    state = {f"{TEXT}.lora_down.weight": torch.randn(4, 32, generator=generator)}
    state[f"{TEXT}.lora_up.weight"] = torch.randn(32, 4, generator=generator)
    state[f"{TEXT}.alpha"] = torch.tensor(2.0)
    path = tmp_path_factory.mktemp("text_lora") / "text.safetensors"
    save_file(state, path)
    return path


def load(pipeline, *loras, **options):
    files = [LoraFile(str(path), scale) for path, scale in loras]
    return DiffusionModel.load(pipeline, loras=files, **options)


@pytest.mark.parametrize("scale", [1.0, 0.5, -1.0])
def test_the_scale_is_that_of_diffusers(pipeline, unet_lora, text_lora, scale):
    """Both parts, as load_lora_weights and set_adapters compute them."""
    model = load(pipeline, (unet_lora, scale), (text_lora, scale))
    stock = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    stock.load_lora_weights(unet_lora, adapter_name="a")
    stock.set_adapters(["a"], [scale])
    assert_close(unet_output(model.unet), unet_output(stock.unet), **TOLERANCE)
    weight = stock.text_encoder.state_dict()
    ours = model.text_encoder.state_dict()
    changed = [name for name in weight if not torch.equal(weight[name], ours[name])]
    assert [name.removeprefix("text_model.") for name in changed] == [
        "encoder.layers.0.self_attn.q_proj.weight"
    ]
    [(module, _)] = [(m, n) for n, m in find_lora(str(text_lora)).modules.items()]
    expected = weight[changed[0]] + scale * 2 / 4 * module.up @ module.down
    assert_close(ours[changed[0]], expected, rtol=1e-6, atol=1e-6)


def test_a_text_encoder_of_diffusers_agrees(pipeline, text_lora):
    stock = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    tokens = stock.tokenizer(["a black night"], padding="max_length", return_tensors="pt")
    model = load(pipeline, (text_lora, 1.0))
    ours = model.encode_prompts(["a black night"]).prompt_embeds
    plain = stock.text_encoder(tokens.input_ids)[0]
    module = find_lora(str(text_lora)).modules[f"text_encoder.{TEXT.removeprefix('lora_te_')}"]
    with torch.no_grad():
        stock.text_encoder.get_submodule(_q_proj(stock)).weight += 0.5 * module.up @ module.down
    assert_close(ours, stock.text_encoder(tokens.input_ids)[0], **TOLERANCE)
    assert (ours - plain).abs().max() > 1e-3


def _q_proj(stock):
    names = dict(stock.text_encoder.named_modules())
    return next(name for name in names if name.endswith("layers.0.self_attn.q_proj"))


def test_digests_are_those_of_the_merged_export(pipeline, unet_lora, text_lora, tmp_path):
    """Content, not the way there: a folder with the same weights is the same model."""
    merged = load(pipeline, (unet_lora, 0.5), (text_lora, 1.0))
    merged.save(tmp_path / "merged")
    again = DiffusionModel.load(tmp_path / "merged")
    files = [LoraFile(str(unet_lora), 0.5), LoraFile(str(text_lora))]
    resolved = with_loras(resolve(pipeline), files, "ema")
    folder = resolve(tmp_path / "merged")
    assert unet_digest(resolved) == unet_digest(folder)
    assert text_encoder_digest(resolved.pipeline) == text_encoder_digest(folder.pipeline)
    assert sampling_digest(merged) == sampling_digest(again)
    others = [load(pipeline), load(pipeline, (unet_lora, 0.5)), load(pipeline, (text_lora, 1.0))]
    others.append(load(pipeline, (unet_lora, 0.6), (text_lora, 1.0)))
    assert len({sampling_digest(model) for model in [merged, *others]}) == 5


def test_a_run_of_adapters_is_a_lora_too(pipeline, unet_lora, tmp_path):
    unet = adapted_unet(pipeline, alpha=8)
    write_lora_checkpoint(tmp_path / "run/checkpoints/step=1.ckpt", unet, pipeline, alpha=8)
    expected = unet_output(load(pipeline, (unet_lora, 1.0)).unet)
    for path in (tmp_path / "run", tmp_path / "run/checkpoints/step=1.ckpt", unet_lora.parent):
        assert_close(unet_output(load(pipeline, (path, 1.0)).unet), expected, **TOLERANCE)


def test_a_lora_goes_onto_a_checkpoint_of_a_lora_run(pipeline, unet_lora, tmp_path):
    unet = adapted_unet(pipeline, alpha=8)
    path = write_lora_checkpoint(tmp_path / "a.ckpt", unet, pipeline, alpha=8)
    twice = load(path, (unet_lora, 1.0)).unet.state_dict()
    once, base = load(path).unet.state_dict(), load(pipeline).unet.state_dict()
    for name, tensor in twice.items():
        assert_close(tensor, 2 * once[name] - base[name], rtol=1e-5, atol=1e-5)


def test_the_merged_sum_is_cast_once(pipeline, unet_lora, text_lora):
    loras = ((unet_lora, 0.3), (text_lora, 0.3))
    whole, half = load(pipeline, *loras), load(pipeline, *loras, dtype=torch.float16)
    for part in ("unet", "text_encoder"):
        expected = getattr(whole, part).state_dict()
        for name, tensor in getattr(half, part).state_dict().items():
            assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def sample(pipeline, output, *arguments):
    fixed = ["prompts=a black night", "num_steps=2", "dtype=float32", "device=cpu"]
    return main(["sample", f"checkpoint={pipeline}", f"output={output}", *fixed, *arguments])


def test_sample_never_mixes_loras_and_scales(pipeline, unet_lora, tmp_path, capsys):
    output = tmp_path / "out"
    assert sample(pipeline, output, f"lora={unet_lora}") == 0
    record = json.loads((output / "sample.json").read_text())
    assert record["lora"] == [{"path": str(unet_lora), "scale": 1.0}]
    assert sample(pipeline, tmp_path / "plain") == 0
    image = "images/0_0.png"
    ours, plain = (Image.open(folder / image).tobytes() for folder in (output, tmp_path / "plain"))
    assert ours != plain
    for other in (f"lora=[{{path: {unet_lora}, scale: 0.5}}]", "seed=0"):
        capsys.readouterr()
        assert sample(pipeline, output, other) == 2
        assert "has other weights" in capsys.readouterr().err
    moved = tmp_path / "moved.safetensors"
    shutil.copy(unet_lora, moved)
    (output / image).unlink()
    assert sample(pipeline, output, f"lora={moved}") == 0  # the same by its content
    assert Image.open(output / image).tobytes() == ours


def test_what_was_sampled_without_goes_on(pipeline, tmp_path):
    """sample.json of before has no such key."""
    assert sample(pipeline, tmp_path / "out") == 0
    record = json.loads((tmp_path / "out/sample.json").read_text())
    assert record.pop("lora") is None
    (tmp_path / "out/sample.json").write_text(json.dumps(record))
    (tmp_path / "out/images/0_0.png").unlink()
    assert sample(pipeline, tmp_path / "out") == 0


def test_evaluate_knows_its_lora_by_content(pipeline, text_lora, tmp_path, capsys):
    """Also one of the text encoder, which the digest of an evaluation leaves out without it."""
    path, output = tmp_path / "a.safetensors", tmp_path / "out"
    shutil.copy(text_lora, path)
    arguments = ["evaluate", f"checkpoint={pipeline}", f"output={output}", f"lora={path}"]
    arguments += ["prompts=a black night", "num_steps=1", "dtype=float32", "device=cpu"]
    assert main(arguments) == 0
    save_file({k: t * 1.01 for k, t in load_file(text_lora).items()}, path)
    shutil.rmtree(output / "images", ignore_errors=True)
    for file in output.glob("*.parquet"):
        file.unlink()
    capsys.readouterr()
    assert main(arguments) == 2
    assert "has other weights" in capsys.readouterr().err


def test_search_knows_its_lora_by_content(pipeline, unet_lora, tmp_path, capsys):
    path, output = tmp_path / "a.safetensors", tmp_path / "out"
    shutil.copy(unet_lora, path)
    arguments = ["search", f"checkpoint={pipeline}", f"output={output}", f"lora={path}"]
    arguments += ["prompts=a black night", "num_steps=1", "budget_nfe=4", "device=cpu"]
    arguments += ["verifiers.black.kind=luminance", "verifiers.black.target=0", "dtype=float32"]
    assert main(arguments) == 0
    settings = json.loads((output / "search.json").read_text())
    assert settings["lora"] == [{"path": str(path), "scale": 1.0}]
    assert main(arguments) == 0
    save_file({k: t * 1.01 for k, t in load_file(unet_lora).items()}, path)
    capsys.readouterr()
    assert main(arguments) == 2
    assert "lora_digests" in capsys.readouterr().err


def test_cells_of_a_sweep_follow_lora_scale_and_content(unet_lora, tmp_path):
    path = tmp_path / "a.safetensors"
    shutil.copy(unet_lora, path)

    def folders(*loras):
        evaluate = {"checkpoint": "owner/model", "prompts": "a"}
        values = {"run_dir": str(tmp_path / "sweep"), "evaluate": evaluate}
        values["grid"] = {"evaluate.lora": list(loras)}
        return [cell.folder.name for cell in cells_of(load_values(SweepConfig, values, "test"))]

    half = [{"path": str(path), "scale": 0.5}]
    first = folders(None, str(path), half)
    assert len(set(first)) == 3
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    second = folders(None, str(path), half)
    assert first[0] == second[0] and not set(first[1:]) & set(second[1:])


@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
def test_export_writes_the_merged_model(pipeline, unet_lora, tmp_path, output, capsys):
    given = [f"checkpoint={pipeline}", f"output={tmp_path / output}", f"lora={unet_lora}"]
    if output.endswith(".safetensors"):
        assert main(["export", *given]) == 2  # tiny models have other heads than LDM's
        return
    assert main(["export", *given]) == 0
    assert f"LoRA merged in | 1 x {unet_lora}" in (tmp_path / output / "README.md").read_text()
    ours, again = load(pipeline, (unet_lora, 1.0)), DiffusionModel.load(tmp_path / output)
    assert torch.equal(unet_output(ours.unet), unet_output(again.unet))


def test_notes_tell_of_another_base(pipeline, unet_lora, tmp_path, caplog):
    told = {"ss_sd_model_name": "anything-v3.safetensors", "modelspec.prediction_type": "v"}
    told["ss_zero_terminal_snr"] = "True"
    save_file(load_file(unet_lora), tmp_path / "a.safetensors", told)
    load(pipeline, (tmp_path / "a.safetensors", 1.0))
    for text in ("was trained on anything-v3", "to predict v, .* epsilon", "for zero terminal SNR"):
        assert re.search(text, caplog.text), text
    caplog.clear()
    load(pipeline, (unet_lora, 1.0))
    assert caplog.text == ""


def test_a_run_on_a_changed_base_is_refused(pipeline, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(pipeline, base)
    path = write_lora_checkpoint(tmp_path / "a.ckpt", adapted_unet(base), base)
    stored = torch.load(path, weights_only=True)
    stored["blackpoint"]["base_digest"] = unet_digest(resolve(base))
    torch.save(stored, path)
    DiffusionModel.load(path)
    shutil.rmtree(base)
    make_tiny_pipeline(base, seed=1)
    with pytest.raises(UserError, match=r"adapters of another UNet.*put back.*lora="):
        DiffusionModel.load(path)
    assert load(base, (path, 1.0))  # the remedy


def test_misfits_exit_2_and_write_nothing(pipeline, unet_lora, tmp_path, capsys):
    wide = make_tiny_pipeline(tmp_path / "wide", unet={"block_out_channels": (32, 64)})
    full = DiffusionModel.load(pipeline)
    record = {"base": str(pipeline), "process": full.process.to_diffusers()}
    state = {f"unet.{name}": tensor for name, tensor in full.unet.state_dict().items()}
    torch.save({"state_dict": state, "blackpoint": record}, tmp_path / "full.ckpt")
    cases = {
        (wide, f"lora={unet_lora}"): r"does not fit the checkpoint: \d+ of \d+ modules",
        (pipeline, "lora=nowhere"): "does not exist",
        (pipeline, f"lora={pipeline}"): "whole pipeline; give it as checkpoint",
        (pipeline, f"lora={tmp_path / 'full.ckpt'}"): "full fine-tune, which has no adapters",
        (pipeline, f"lora=[{{path: {unet_lora}, scale: two}}]"): "could not be converted to Float",
        (pipeline, f"lora=[{{path: {unet_lora}, scale: .inf}}]"): "must be a finite number",
        (pipeline, "lora="): "must be the file of a LoRA",
        (pipeline, f"lora=[{{file: {unet_lora}}}]"): "is not a key here",
    }
    for (checkpoint, argument), reason in cases.items():
        assert sample(checkpoint, tmp_path / "out", argument) == 2
        assert re.search(reason, capsys.readouterr().err), argument
    assert not (tmp_path / "out").exists()


def test_data_encode_takes_the_text_encoders_part(pipeline, text_lora, shards, tmp_path):
    """The encoding's digest is that of the merged export, from which training then starts."""
    load(pipeline, (text_lora, 1.0)).save(tmp_path / "merged")
    encoding = ["resolution=16", "num_workers=0", "num_processes=1", "device=cpu"]
    given = {"lora": [pipeline, f"lora={text_lora}"], "merged": [tmp_path / "merged"]}
    stored = {}
    for name, (checkpoint, *more) in given.items():
        output = tmp_path / f"latents_{name}"
        arguments = [f"source={shards}", f"checkpoint={checkpoint}", f"output={output}"]
        assert main(["data", "encode", *arguments, *encoding, *more]) == 0
        stored[name] = json.loads((output / "encoding.json").read_text())["text_encoder"]
    assert stored["lora"] == stored["merged"] != text_encoder_digest(resolve(pipeline).pipeline)


def test_a_repository_of_the_hub_gives_its_lora(unet_lora, tmp_path, monkeypatch):
    """diffusers' file where there is one; peft's config comes with its adapters."""
    import huggingface_hub

    asked = {}

    class Api:
        def model_info(self, hub_id):
            names = ["README.md", "pytorch_lora_weights.safetensors", "sub/other.safetensors"]
            siblings = [type("File", (), {"rfilename": name}) for name in names]
            return type("Info", (), {"siblings": siblings})

    def snapshot_download(hub_id, allow_patterns):
        asked[hub_id] = allow_patterns
        shutil.copy(unet_lora, tmp_path / "pytorch_lora_weights.safetensors")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    lora = find_lora("owner/style")
    assert lora.digest() == find_lora(str(unet_lora)).digest()
    patterns = ["pytorch_lora_weights.safetensors", "adapter_config.json"]
    assert asked == {"owner/style": patterns}


def test_a_repository_that_cannot_be_reached_is_named():
    with pytest.raises(UserError, match=r"lora=owner/style is not a local folder.*folder$"):
        find_lora("owner/style")


def test_help_names_the_keys(capsys):
    for verb in ("sample", "search", "evaluate", "export"):
        assert main([verb, "--help"]) == 0
        out = capsys.readouterr().out
        assert "lora[].path" in out and "lora[].scale" in out
