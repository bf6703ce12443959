"""Laws of the model bundle: what loads, what is refused, and that images belong to their seeds."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers.utils import logging as transformers_logging

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints import encoders
from blackpoint.sampling.checkpoints.loading import Part
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule
from tests.tiny_pipeline import make_tiny_pipeline
from tests.warm_verb import in_warm_process

# Sums of some hundred products of size 1: each is rounded by 6e-8, in the order that the CPU, the
# library and the number of threads choose. Two such orders differed by 1e-6.
ROUNDING = 1e-5
PROMPTS = ["a red one on a black background", "a blue two", "a photo of the night"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("model") / "sd")


@pytest.fixture(scope="module")
def model(base):
    """The tiny base, taught zero terminal SNR in its scheduler config alone."""
    loaded = DiffusionModel.load(base)
    loaded.process = Process(NoiseSchedule.scaled_linear().zero_terminal_snr())
    return loaded


def write_run(base, run_dir, names=("last.ckpt",)):
    """A run directory as `train` leaves it: averaged weights of 1, raw weights of 2."""
    process = Process(NoiseSchedule.scaled_linear().zero_terminal_snr())
    state = DiffusionModel.load(base).unet.state_dict()
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "config.yaml").write_text("seed: 0\n")
    for name in names:
        torch.save(
            {
                "state_dict": {f"unet.{k}": torch.full_like(v, 1) for k, v in state.items()},
                "current_model_state": {
                    f"unet.{k}": torch.full_like(v, 2) for k, v in state.items()
                },
                "global_step": 10,
                "blackpoint": {"base": str(base), "process": process.to_diffusers()},
            },
            run_dir / "checkpoints" / name,
        )
    return run_dir


def weights_of(loaded):
    return loaded.unet.conv_in.weight.flatten()[0].item()


def test_folder_loads_with_its_own_process(base):
    loaded = DiffusionModel.load(str(base))
    assert loaded.process.prediction_type == "epsilon"
    assert loaded.process.timestep_spacing == "leading"
    expected = NoiseSchedule.scaled_linear().alpha_bar
    assert_close(loaded.process.schedule.alpha_bar, expected, rtol=0, atol=0)
    assert loaded.image_size == 16 and loaded.latent_shape() == (4, 8, 8)
    assert loaded.latent_shape(32, 20) == (4, 16, 10)
    assert not any(p.requires_grad for p in loaded.unet.parameters())
    assert not loaded.unet.training


def test_fp16_variant_loads(tmp_path, base):
    half = DiffusionModel.load(make_tiny_pipeline(tmp_path / "sd", variant="fp16"))
    full = DiffusionModel.load(base)
    assert half.unet.dtype == half.text_encoder.dtype == torch.float32
    for ours, theirs in zip(half.unet.parameters(), full.unet.parameters(), strict=True):
        assert_close(ours, theirs.half().float(), rtol=0, atol=0)


def test_run_directory_and_checkpoint_load_averaged_and_raw_weights(base, tmp_path):
    run_dir = write_run(base, tmp_path / "run")
    for checkpoint in (run_dir, run_dir / "checkpoints/last.ckpt"):
        averaged = DiffusionModel.load(checkpoint)
        assert weights_of(averaged) == 1.0
        assert averaged.process.prediction_type == "v_prediction"
        assert averaged.process.schedule.is_zero_terminal_snr
        assert weights_of(DiffusionModel.load(checkpoint, weights="raw")) == 2.0


def test_run_directory_prefers_its_export_for_averaged_weights(base, tmp_path):
    run_dir = write_run(base, tmp_path / "run")
    shutil.copytree(base, run_dir / "export")
    expected = weights_of(DiffusionModel.load(base))
    assert weights_of(DiffusionModel.load(run_dir)) == expected
    assert weights_of(DiffusionModel.load(run_dir, weights="raw")) == 2.0


def test_encoders_are_loaded_on_first_use_frozen_and_where_the_model_is(base, monkeypatch):
    loaded = []
    load = Part.load
    monkeypatch.setattr(Part, "load", lambda part: (loaded.append(part.name), load(part))[1])
    model = DiffusionModel.load(base, dtype=torch.float64)
    assert loaded == ["unet"]
    vae = AutoencoderKL.from_pretrained(base / "vae")
    assert model.vae_scale == 2 and model.scaling_factor == vae.config.scaling_factor
    moments = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    latents = model.draw_latents(moments, noise)
    assert loaded == ["unet"]
    expected = DiagonalGaussianDistribution(moments)
    expected = (expected.mean + expected.std * noise) * model.scaling_factor
    assert_close(latents, expected, rtol=0, atol=ROUNDING)
    assert model.to("cpu").vae is model.vae and loaded == ["unet", "vae"]
    model.load_encoders()
    assert loaded == ["unet", "vae", "text_encoder"]
    for part in (model.vae, model.text_encoder):
        assert part.dtype == torch.float64 and not part.training
        assert not any(p.requires_grad for p in part.parameters())


def test_old_configs_lack_the_scaling_factor_and_get_its_default(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "sd")
    path = folder / "vae/config.json"
    config = json.loads(path.read_text())
    del config["scaling_factor"]
    path.write_text(json.dumps(config))
    assert DiffusionModel.load(folder).scaling_factor == 0.18215


def test_faults_of_an_encoder_show_on_first_use(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "sd")
    name = "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(base / name)
    first, *others = weights
    save_file({key: weights[key] for key in others}, folder / name)
    loaded = DiffusionModel.load(folder)
    with pytest.raises(UserError, match=f"vae: 1 missing weights, such as {first}"):
        loaded.decode(torch.zeros(1, 4, 8, 8))


def test_model_without_unet_weights_encodes_and_decodes(base):
    whole, bare = DiffusionModel.load(base), DiffusionModel.load(base, with_unet=False)
    assert bare.unet.device.type == "meta" and bare.device.type == "cpu"
    assert bare.latent_shape() == whole.latent_shape()
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert_close(bare.encode(images), whole.encode(images), rtol=0, atol=ROUNDING)
    ours, theirs = bare.encode_prompts(PROMPTS), whole.encode_prompts(PROMPTS)
    assert_close(ours.prompt_embeds, theirs.prompt_embeds, rtol=0, atol=ROUNDING)


def test_weights_of_a_checkpoint_take_the_asked_format_and_leave_the_file_alone(base, tmp_path):
    """They are mapped from the file: writing to them must not reach it."""
    path = write_run(base, tmp_path / "run") / "checkpoints/last.ckpt"
    assert DiffusionModel.load(path, dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    before = path.read_bytes()
    loaded = DiffusionModel.load(path)
    with torch.no_grad():
        for weight in loaded.unet.parameters():
            weight.add_(1)
    assert weights_of(loaded) == 2.0
    assert path.read_bytes() == before


def peak_over_weights(path, base):
    """Returns how far loading and writing a UNet raises the peak of memory, over its weights."""

    def peak():  # ru_maxrss would begin with what the parent process had
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])

    DiffusionModel.load(base)
    before = peak()
    model = DiffusionModel.load(path)
    with torch.no_grad():
        for weight in model.unet.parameters():
            weight.mul_(1.0)  # reads every page, and writes it as training does
    return (peak() - before) / sum(p.nbytes for p in model.unet.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("form", "limit"), [("float32", 1.1), ("fp16", 1.6), ("checkpoint", 1.1)])
def test_loading_holds_the_weights_once(base, tmp_path, form, limit):
    """Peak of resident memory over the size of the weights; fp16 files are mapped meanwhile."""
    unet = {"block_out_channels": (256, 512), "norm_num_groups": 32}
    variant = "fp16" if form == "fp16" else None
    folder = make_tiny_pipeline(tmp_path / "sd", unet=unet, variant=variant)
    path = write_run(folder, tmp_path / "run") if form == "checkpoint" else folder
    assert 0.8 < in_warm_process(peak_over_weights, path, base) < limit


def test_save_then_load_gives_the_same_model(model, tmp_path):
    model.save(tmp_path / "saved")
    again = DiffusionModel.load(tmp_path / "saved")
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(model, part).state_dict(), getattr(again, part).state_dict()
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert_close(theirs[key], tensor, rtol=0, atol=0)
    assert again.process.to_diffusers() == model.process.to_diffusers()
    options = {"seeds": [1], "num_steps": 2}
    first, second = model.sample(PROMPTS[:1], **options), again.sample(PROMPTS[:1], **options)
    assert_close(first, second, rtol=0, atol=ROUNDING)
    assert not list((tmp_path / "saved").rglob("*.bin"))


def test_prompts_are_encoded_as_by_the_stock_pipeline(model, base):
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    prompts = [*PROMPTS, "", "a red one " * 20]
    theirs, empty = pipeline.encode_prompt(prompts, "cpu", 1, True)
    assert_close(model.encode_prompts(prompts).prompt_embeds, theirs, rtol=0, atol=ROUNDING)
    assert_close(model.encode_prompts([""]).prompt_embeds, empty[:1], rtol=0, atol=ROUNDING)


def test_each_distinct_prompt_is_encoded_once(model, monkeypatch):
    rows = []
    forward = model.text_encoder.forward

    def counted(input_ids, *arguments, **options):
        rows.append(len(input_ids))
        return forward(input_ids, *arguments, **options)

    monkeypatch.setattr(model.text_encoder, "forward", counted)
    encoded = model.encode_prompts([PROMPTS[0], PROMPTS[1], PROMPTS[0]]).prompt_embeds
    assert rows == [2]
    assert_close(encoded[0], encoded[2], rtol=0, atol=0)


def test_cut_prompt_is_named(model, caplog):
    model.encode_prompts(["a red one " * 20])
    assert "cut to 16 of" in caplog.text


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "heun", "dpmpp_2m"])
def test_image_is_the_same_alone_in_any_batch_and_in_any_order(model, sampler):
    seeds, options = [5, 3, 8], {"num_steps": 3, "sampler": sampler}
    whole = model.sample(PROMPTS, seeds, **options)
    assert whole.shape == (3, 3, 16, 16) and whole.dtype == torch.float32
    assert whole.min() >= 0 and whole.max() <= 1
    split = model.sample(PROMPTS, seeds, batch_size=2, **options)
    turned = model.sample(PROMPTS[::-1], seeds[::-1], **options)
    assert_close(split, whole, rtol=0, atol=1e-4)
    assert_close(turned.flip(0), whole, rtol=0, atol=1e-4)
    alone = model.sample(PROMPTS[1], [3], **options)
    assert_close(alone, whole[1:2], rtol=0, atol=1e-4)
    assert (whole[0] - whole[1]).abs().max() > 1e-2


@pytest.mark.parametrize(("scale", "rows"), [(1.0, [2, 2, 2]), (3.0, [4, 4, 4])])
def test_scale_1_evaluates_one_branch(model, monkeypatch, scale, rows):
    seen = []
    forward = model.unet.forward

    def counted(sample, *arguments, **options):
        seen.append(len(sample))
        return forward(sample, *arguments, **options)

    monkeypatch.setattr(model.unet, "forward", counted)
    model.sample(PROMPTS[:2], [0, 1], num_steps=3, guidance_scale=scale)
    assert seen == rows


def test_one_prompt_goes_with_many_seeds_and_batches_are_reported(model):
    finished = []
    images = model.sample(
        "a one", [1, 2, 3], num_steps=1, batch_size=2, height=20, width=32, on_batch=finished.append
    )
    assert images.shape == (3, 3, 20, 32) and finished == [2, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 1001}, "num_steps=1001.*1..1000"),
        ({"sampler": "eular"}, "did you mean euler"),
        ({"sampler": "heun", "eta": 1.0}, "eta=1.0"),
        ({"height": 17}, "height=17 must be a positive multiple of 2"),
        ({"width": -4}, "width=-4"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
        ({"guidance_rescale": 2.0}, "guidance_rescale=2.0"),
        ({"seeds": [1, 2]}, "1 prompts and 2 seeds"),
    ],
)
def test_wrong_sampling_settings_are_refused(model, options, message):
    with pytest.raises(UserError, match=message):
        model.sample(["a one"], **{"seeds": [0], **options})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type=epsilon with zero terminal SNR"),
        ({"timestep_spacing": "leading"}, "timestep_spacing=leading with zero terminal SNR"),
    ],
)
def test_unsound_process_is_refused_unless_allowed(base, entries, message):
    loaded = DiffusionModel.load(base)
    loaded.process = Process(NoiseSchedule.scaled_linear().zero_terminal_snr(), **entries)
    with pytest.raises(UserError, match=f"{message}.*allow_unsound"):
        loaded.sample(["a one"], [0], num_steps=2)
    loaded.sample(["a one"], [0], num_steps=2, allow_unsound=True)


def test_autoencoder_in_slices_equals_the_whole(model, monkeypatch):
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents, decoded = model.encode(images), model.decode(model.encode(images))
    monkeypatch.setattr(encoders, "VAE_IMAGES", 2)
    assert_close(model.encode(images), latents, rtol=0, atol=ROUNDING)
    assert_close(model.decode(latents), decoded, rtol=0, atol=ROUNDING)


def test_encoding_is_the_scaled_posterior_of_the_autoencoder(model):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    vae: AutoencoderKL = model.vae
    with torch.no_grad():
        posterior = vae.encode(2 * images - 1).latent_dist
    scale = vae.config.scaling_factor
    assert_close(model.encode(images), posterior.mean * scale, rtol=0, atol=ROUNDING)
    drawn = (posterior.mean + posterior.std * noise) * scale
    assert_close(model.encode(images, noise), drawn, rtol=0, atol=ROUNDING)
    with torch.no_grad():
        expected = (vae.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1)
    assert_close(model.decode(posterior.mean * scale), expected, rtol=0, atol=ROUNDING)


def test_autoencoder_that_overflows_in_fp16_runs_in_float32(base, caplog):
    """SDXL's autoencoder is the known case: activations beyond 65504 turn into NaN."""
    loaded = DiffusionModel.load(base)
    loaded.vae.half()
    with torch.no_grad():
        loaded.vae.decoder.conv_in.weight.mul_(1e4)
        loaded.vae.decoder.conv_in.bias.fill_(6e4)
    images = loaded.decode(50 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.isfinite(images).all() and images.dtype == torch.float32
    assert "float32" in caplog.text


def test_loading_shows_no_bars_of_libraries_and_leaves_them_as_they_were(base, capfd):
    transformers_logging.enable_progress_bar()
    DiffusionModel.load(base).load_encoders()
    assert "%|" not in capfd.readouterr().err
    assert transformers_logging.is_progress_bar_enabled()
