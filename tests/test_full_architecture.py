"""Laws of the full-size runs: published sizes, one copy of the weights, figures that are right."""

import gc
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.loading import forget_pages
from blackpoint.sampling.export.placement import moved_into_place
from blackpoint.sampling.model import DiffusionModel
from blackpoint.scripts.cli import VERBS
from blackpoint.scripts.config import load
from blackpoint.scripts.measurements import full_architecture, make_random_base
from blackpoint.scripts.measurements import full_architecture_checks as checks
from blackpoint.scripts.measurements.full_architecture import markdown
from blackpoint.scripts.measurements.full_architecture_verbs import RANK, Verb, verbs
from blackpoint.scripts.measurements.make_random_base import (
    ARCHITECTURES,
    RandomBaseConfig,
    build_on_meta,
)
from blackpoint.scripts.measurements.measured_process import run_measured
from blackpoint.scripts.stand_alone import describe_machine
from blackpoint.train import run
from blackpoint.train.config.lora_config import LoraConfig
from blackpoint.train.ema import Ema
from blackpoint.train.lora import target_layers
from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_run import make_tiny_shards, tiny_config
from tests.warm_verb import WarmVerb

PUBLISHED = {
    "sd15": (859_520_964, 83_653_863, 123_060_480),
    "sd21_base": (865_910_724, 83_653_863, 340_387_840),
    "sd21": (865_910_724, 83_653_863, 340_387_840),
    "sdxl": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "small"
    return make_random_base.make(RandomBaseConfig("small", str(folder)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_architectures_have_the_published_number_of_parameters(name):
    architecture = ARCHITECTURES[name]
    parts = [build_on_meta(architecture, part) for part in architecture.parts]
    counts = tuple(sum(weight.numel() for weight in part.parameters()) for part in parts)
    assert counts == PUBLISHED[name]


def test_random_base_paints_something_and_has_prompts_of_clips_length(small):
    model = DiffusionModel.load(small)
    assert model.encode_prompts(["a cat"]).prompt_embeds.shape == (1, 77, 64)
    assert len(model.tokenizer) == 49_408
    assert model.tokenizer("").input_ids == [49_406, 49_407]
    picture = model.sample(["a cat"], seeds=[0], num_steps=1, height=64, width=64)
    assert torch.isfinite(picture).all() and picture.std() > 0.01
    for weight in model.unet.parameters():
        assert weight.half().isfinite().all()
    counts = full_architecture.count_parameters(small)
    assert counts["unet"] == model.unet.num_parameters()
    adapted = target_layers(model.unet, LoraConfig(rank=1)).values()
    sides = sum(layer.weight.shape[0] + layer.weight[0].numel() for layer in adapted)
    assert counts["adapters"] == RANK * sides


def test_taken_folder_is_refused(small, capsys):
    assert make_random_base.main([f"output={small}"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_written_files_are_open_to_colleagues(tmp_path):
    with moved_into_place(tmp_path / "out") as folder:
        (folder / "unet").mkdir(mode=0o700)
        (folder / "unet" / "weights").touch(mode=0o600)
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "out" / "unet" / "weights").stat().st_mode == usual


def test_a_mapped_tensor_is_read_again_after_its_pages_are_dropped(tmp_path):
    value = torch.randn(5000)
    torch.save({"a": value, "b": torch.ones(3)}, tmp_path / "x.ckpt")
    loaded = torch.load(tmp_path / "x.ckpt", weights_only=True, mmap=True)
    for _ in range(2):
        assert_close(loaded["a"], value, rtol=0, atol=0)
        forget_pages(loaded["a"])
    assert_close(loaded["b"], torch.ones(3), rtol=0, atol=0)


def test_average_is_where_the_weights_will_be():
    """Lightning moves the weights after it sets up callbacks: the average stayed on the CPU."""
    module = LightningModule()
    module.unet = torch.nn.Linear(2, 1)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    ema = Ema(0.9)
    ema.setup(trainer, module, "fit")
    assert all(weight.is_meta for weight in ema._average_model.module.parameters())
    assert not ema._average_model.n_averaged.is_meta


def test_training_has_left_memory_when_the_export_starts(tmp_path, monkeypatch):
    def num_unets():
        gc.collect()
        return sum(isinstance(thing, UNet2DConditionModel) for thing in gc.get_objects())

    before, during = num_unets(), []
    monkeypatch.setattr(run, "export", lambda *_, **__: during.append(num_unets()))
    pipeline = make_tiny_pipeline(tmp_path / "sd")
    shards = make_tiny_shards(tmp_path / "images")
    config = tiny_config(tmp_path / "run", pipeline, shards, **{"trainer.max_steps": 1})
    run.fit(config)
    assert during == [before]


def test_a_command_is_measured(tmp_path):
    code = "import sys; held = bytearray(200_000_000); held[::4096] = b'1' * len(held[::4096])"
    code += "; import time; time.sleep(.5); sys.exit(3)"
    measured = run_measured([sys.executable, "-c", code], tmp_path / "log")
    assert measured.status == 3 and measured.seconds >= 0.5
    assert 0.2e9 < measured.peak_rss_bytes < 0.5e9
    assert sys.platform != "linux" or 0.2e9 < measured.peak_anonymous_bytes < 0.5e9


def test_too_little_memory_or_disk_is_said_before_the_training(tmp_path, monkeypatch):
    wanted = [Verb("train", [], bytes_expected=20.0 * PUBLISHED["sd15"][0])]
    monkeypatch.setattr(full_architecture, "available_memory", lambda: int(10e9))
    with pytest.raises(UserError, match="18.7 GB of memory and 10.0 GB"):
        full_architecture.check_room(tmp_path, {}, wanted)
    full_architecture.check_room(tmp_path, {"train, resumed for 2 more": {}}, wanted)
    monkeypatch.setattr(full_architecture, "available_memory", lambda: None)
    monkeypatch.setattr(full_architecture.shutil, "disk_usage", lambda _: SimpleNamespace(free=5e9))
    with pytest.raises(UserError, match="34 GB of disk and 5 GB"):
        full_architecture.check_room(tmp_path, {}, wanted)


@pytest.mark.parametrize("parts", [3, 4])
def test_every_command_has_keys_of_its_verb_and_reads_what_another_wrote(parts, tmp_path):
    """Of SD, and of SDXL, whose own weights are not trained: that would need 51 GB."""
    names = ("unet", "vae", "text_encoder", "text_encoder_2")[:parts]
    listed = verbs(tmp_path, dict.fromkeys(names, 1) | {"adapters": 1}, 64, 64)
    written = {tmp_path / "base", tmp_path / "photos"}
    for verb in listed:
        values = (Path(word.partition("=")[2] or word) for word in verb.command)
        named = [path.relative_to(tmp_path) for path in values if tmp_path in path.parents]
        roots = {tmp_path / path.parts[0] for path in named if not path.suffix or path.parts[1:]}
        roots -= set(verb.writes)
        assert roots <= written, verb.name
        written = (written | set(verb.writes)) - set(verb.done_with)
        if verb.command[1] not in ("-c", "-m"):
            words = verb.command[2:]
            name = " ".join(words[: 1 + (words[0] == "data")])
            module = importlib.import_module(VERBS[name][0])
            load(module.config_class(), words[len(name.split()) :])
    is_adapted = ["lora.rank" in " ".join(v.command) for v in listed if "train" in v.command]
    assert is_adapted == [parts == 4] * 2
    weights = {tmp_path / name for name in ("single", "unpacked", "export", "adapters")}
    assert not weights & written


@pytest.mark.slow
def test_xl_computes_what_diffusers_does(tmp_path, capsys):
    base, file = tmp_path / "base", tmp_path / "tensors.safetensors"
    make_random_base.make(RandomBaseConfig("small_xl", str(base)))
    assert checks.main(["ours", str(base), str(file), "64"]) == 0
    report = tmp_path / "differences.json"
    assert checks.main(["stock", str(base), str(file), "64", str(report)]) == 0
    rows = json.loads(report.read_text())
    assert list(rows) == list(checks.TOLERANCES)
    assert all(row["largest"] > 0 for row in rows.values())
    tensors = load_file(file)
    tensors["pooled"][0, 0] += 1e-3
    save_file(tensors, file)
    assert checks.main(["stock", str(base), str(file), "64", str(report)]) == 1
    assert "pooled: not those of diffusers" in capsys.readouterr().err


def test_wrong_key_ends_with_status_2(capsys):
    assert full_architecture.main(["architecture=sdxl_refiner"]) == 2
    assert "architecture" in capsys.readouterr().err


def test_table_sets_the_peak_beside_the_arithmetic():
    row = {"seconds": 9.6, "peak_anonymous_gb": 1.0, "holds": "weights", "command": ""}
    verbs = {
        "imports alone": row | {"peak_rss_gb": 0.5, "arithmetic_gb": 0.0},
        "train": row | {"peak_rss_gb": 2.7, "arithmetic_gb": 2.0},
    }
    found = {"settings": {"dtype": "float16"}, "parameters": {"unet": 1000}, "verbs": verbs}
    row = {"largest": 2.0, "difference": 3e-7, "tolerance": 1e-5}
    found["differences"] = {"pooled": row}
    text = markdown({"small": found | describe_machine()})
    assert "| pooled | 2 | 3.0e-07 | 1e-05 |" in text
    assert "| train | 10 | 2.70 | 1.00 | 2.00 | 1.10 | weights |" in text
    assert "unet 1,000" in text and "dtype=float16" in text


def peaks(work: Path, action: str) -> list[float]:
    """Measures in a process that has everything imported, and has done nothing else."""
    process = WarmVerb(str(work), action, module="tests.peak_memory")
    output, error = process.communicate()
    assert process.returncode == 0, error
    return json.loads(output.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_verb_holds_a_second_copy_of_the_weights(tmp_path):
    """Peak memory over that of the imports, in units of the UNet's weights (305 MB)."""
    load, touch, save = peaks(tmp_path, "load")
    assert load < 1.3 and touch < 1.3
    assert save < 0.3
    # Weights, gradients, two moments, average: 5; activations, and what the C library keeps of
    # freed blocks, 0.2 to 0.8 from run to run. A second copy adds 1.
    [fit] = peaks(tmp_path, "fit")
    assert fit < 6.1
    [resume] = peaks(tmp_path, "resume")
    assert resume < 6.1
    [exported] = peaks(tmp_path, "export")
    assert exported < 1.7
