"""Laws of sharded training: DDP's losses, an exact resume, checkpoints that any number reads."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.checkpoints.loading import SHARDED_STATE, read_ckpt
from blackpoint.sampling.checkpoints.merged import find_lora
from blackpoint.sampling.model import DiffusionModel
from blackpoint.scripts.sweep.content_digest import digest_of_weights
from blackpoint.train.callbacks.checkpoints import (
    AtomicCheckpointIO,
    checkpoint_steps,
    damage,
    remove_partial_files,
)
from blackpoint.train.callbacks.trainer import build_trainer
from blackpoint.train.cluster import sharding
from blackpoint.train.cluster.sharding import OWNED, SHARES, read_shares, shard, whole
from blackpoint.train.records.metrics_file import read_metrics
from blackpoint.train.run import fit
from tests.tiny_run import tiny_config
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]
STRATEGY = {"trainer.strategy": "fsdp"}


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """The mesh of a run of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def stepped(mesh: DeviceMesh | None) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Returns a small module after a step of fused AdamW, and a checkpoint of it."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1))
    if mesh is not None:
        shard(module, mesh)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    module(torch.ones(2, 3)).square().mean().backward()
    optimizer.step()
    states = {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    return module, {**states, "global_step": 1, "blackpoint": {"base": "x", "process": {}}}


def step_4(folder: Path, mesh: DeviceMesh) -> Path:
    path = folder / "step_00000004.ckpt"
    AtomicCheckpointIO().save_checkpoint(stepped(mesh)[1], path)
    return path


def test_a_sharded_checkpoint_holds_what_a_file_would(mesh: DeviceMesh, tmp_path: Path) -> None:
    plain = stepped(None)[1]
    path = step_4(tmp_path, mesh)
    assert checkpoint_steps(tmp_path) == {4: path} and damage(path) is None
    assert_close(
        AtomicCheckpointIO().load_checkpoint(path)["state_dict"], dict(plain["state_dict"])
    )
    stored = read_ckpt(path, "")
    assert_close(stored["optimizer_states"], plain["optimizer_states"])
    assert all(stored[key] == plain[key] for key in ("global_step", "blackpoint"))
    rows = read_shares(path, mesh)
    assert isinstance(rows["state_dict"]["0.weight"], DTensor)
    assert not isinstance(rows["optimizer_states"][0]["state"][0]["step"], DTensor)
    for key in OWNED[::2]:
        assert_close(gathered(rows[key]), stored[key], rtol=0, atol=0)


def gathered(tree: Any) -> Any:
    return sharding.replaced(tree, lambda _, tensor: whole(tensor))


def test_a_file_is_read_in_shares(mesh: DeviceMesh, tmp_path: Path) -> None:
    path = tmp_path / "step_00000004.ckpt"
    plain = stepped(None)[1]
    AtomicCheckpointIO().save_checkpoint(plain, path)
    rows = read_shares(path, mesh)
    path.unlink()  # copies, not the mapped file
    assert isinstance(rows["optimizer_states"][0]["state"][0]["exp_avg"], DTensor)
    assert_close(gathered(rows["state_dict"]), dict(plain["state_dict"]), rtol=0, atol=0)
    assert_close(gathered(rows["optimizer_states"]), plain["optimizer_states"], rtol=0, atol=0)


def test_what_is_damaged_or_partial_is_no_checkpoint(mesh: DeviceMesh, tmp_path: Path) -> None:
    path = step_4(tmp_path, mesh)
    [name] = read_ckpt(path)[SHARES]
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert damage(path) == f"{name} has changed since it was written"
    (path / name).unlink()
    assert damage(path) == f"{name} is missing"
    step_4(tmp_path, mesh)  # written again in its place
    assert damage(path) is None
    (path / SHARDED_STATE).write_bytes(b"")
    assert damage(path)
    with pytest.MonkeyPatch.context() as patch:  # killed before it has its name
        patch.setattr(sharding.os, "replace", lambda *paths: os._exit)
        AtomicCheckpointIO().save_checkpoint(stepped(mesh)[1], tmp_path / "step_00000005.ckpt")
    assert list(checkpoint_steps(tmp_path)) == [4] and len(list(tmp_path.iterdir())) == 2
    remove_partial_files(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_loaded_is_known_by_its_content(mesh: DeviceMesh, tmp_path: Path) -> None:
    path = step_4(tmp_path / "checkpoints", mesh)
    digest = digest_of_weights(tmp_path, "ema")
    [name] = read_ckpt(path)[SHARES]
    (path / name).write_bytes((path / name).read_bytes()[:-1] + b"x")
    digest_of_weights.cache_clear()
    assert digest is not None and digest_of_weights(tmp_path, "ema") not in (None, digest)
    with pytest.raises(UserError, match="the checkpoint of a full fine-tune, which has no adapt"):
        find_lora(str(path))


def test_what_can_not_be_written_says_why(mesh: DeviceMesh, tmp_path: Path) -> None:
    """DCP raises an error of its own, which holds that of each process."""
    with pytest.raises(RunFailed, match="ckpt can't be written: File name too long; make room"):
        AtomicCheckpointIO().save_checkpoint(stepped(mesh)[1], tmp_path / f"{'x' * 250}.ckpt")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainer.precision": "16-mixed"}, "trainer.precision=16-mixed do not combine: its loss"),
        ({"lora.rank": 4}, "lora.rank=4 do not combine: .*use trainer.strategy=ddp"),
        ({"trainer.channels_last": True}, "trainer.channels_last or trainer.compile .*set both"),
        ({"trainer.compile": True}, "trainer.channels_last or trainer.compile .*set both"),
        ({"optimizer.name": "adamw_8bit"}, "optimizer.name=adamw_8bit do not combine: .*use adamw"),
    ],
)
def test_options_that_shares_can_not_have_are_refused(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny_config(tmp_path, Path("sd"), Path("shards"), **values)
    with pytest.raises(UserError, match=f"trainer.strategy=fsdp and {message}"):
        tiny_config(tmp_path, Path("sd"), Path("shards"), **values, **STRATEGY)


def test_one_process_holds_the_whole_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, Path("sd"), Path("shards"), **STRATEGY)
    trainer = build_trainer(config, tmp_path, [], [])
    assert not isinstance(trainer.strategy, sharding.ShardedStrategy)
    assert "one process holds the whole model" in capsys.readouterr().err


SCRIPT = """
import os, signal, sys
import pytest
from blackpoint.scripts.cli import main
from tests.tiny_run import stop_in_step

stop_in_step(pytest.MonkeyPatch(), 4, lambda: os.kill(os.getpid(), signal.SIGKILL))
sys.exit(main(sys.argv[1:]))
"""


def run(run_dir: Path, pipeline: Path, shards: Path, dies: bool = False, **values: Any) -> int:
    """Runs a training in processes of its own; its status. Where it `dies`, in the fifth step."""
    config = config_of(run_dir, pipeline, shards, **values)
    yaml, script = run_dir.with_suffix(".yaml"), run_dir.with_suffix(".py")
    yaml.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    script.write_text(SCRIPT)
    program = [str(script)] if dies else ["-m", "blackpoint.scripts.cli"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *program, "train", str(yaml)]
    return subprocess.run(command, env=environment, timeout=PATIENCE_S).returncode


def config_of(run_dir: Path, pipeline: Path, shards: Path, **values: Any) -> Any:
    values = {
        "trainer.devices": 2,
        "optimizer.learning_rate": 1e-4,
        "dropout.probability": 0.2,
        "loss.uncertainty": True,
        "data.validation_shards": str(shards),
        "watch.weights_every_steps": 2,
        "preview.every_steps": 3,
        "preview.prompts": ["a dog"],
        "preview.num_steps": 2,
        "preview.num_images": 1,
        "export.every_steps": 3,
    } | values
    return tiny_config(run_dir, pipeline, shards, **values)


@pytest.fixture(scope="module")
def runs(pipeline: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two processes each: `ddp` and `fsdp` of 6 steps; `dead`, which was killed in the fifth."""
    folder = tmp_path_factory.mktemp("sharded")
    assert run(folder / "ddp", pipeline, shards, **{"trainer.strategy": "ddp"}) == 0
    assert run(folder / "fsdp", pipeline, shards, **STRATEGY) == 0
    assert run(folder / "dead", pipeline, shards, dies=True, **STRATEGY) < 0
    assert list(checkpoint_steps(folder / "dead/checkpoints")) == [3]
    return folder


def assert_same_losses(run_dir: Path, other: Path) -> None:
    """Within what float32's order of sums does in six steps, far below the 1e-4 that is wanted."""
    metrics = [read_metrics(folder / "metrics.csv") for folder in (run_dir, other)]
    assert metrics[0].keys() == metrics[1].keys()
    compared = [name for name in metrics[0] if name.startswith(("train/loss", "validation/"))]
    for name in (*compared, "train/gradient_norm", "weights/norm", "weights/ema_distance"):
        one, two = (dict(table[name]) for table in metrics)
        assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_shares_train_as_whole_models_do(runs: Path) -> None:
    assert_same_losses(runs / "fsdp", runs / "ddp")
    for export in ("export", "exports/step_00000003"):
        one, two = (unet_of(runs / name / export) for name in ("fsdp", "ddp"))
        assert_close(one, two, rtol=0, atol=1e-6)
    raw, average = (
        DiffusionModel.load(runs / "fsdp" / "checkpoints/step_00000006.ckpt", weights=weights)
        for weights in ("raw", "ema")
    )
    assert_close(dict(average.unet.state_dict()), unet_of(runs / "fsdp/export"), rtol=0, atol=0)
    stored = read_ckpt(runs / "fsdp/checkpoints/step_00000006.ckpt", "")["current_model_state"]
    weights = {f"unet.{name}": weight for name, weight in raw.unet.state_dict().items()}
    assert_close(weights, {k: v for k, v in stored.items() if k in weights}, rtol=0, atol=0)


def unet_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_each_process_holds_its_chunk_of_every_tensor(runs: Path) -> None:
    path = runs / "fsdp/checkpoints/step_00000006.ckpt"
    tensors = dict[str, Tensor]()
    stored = read_ckpt(path, "")
    for key in OWNED:
        sharding.replaced(stored[key], tensors.__setitem__, (key,))
    for rank, name in enumerate(sorted(read_ckpt(path)[SHARES])):
        rows = {key: chunk(tensor, rank) for key, tensor in tensors.items() if tensor.ndim}
        assert_close(load_file(path / name), rows, rtol=0, atol=0)


def chunk(tensor: Tensor, rank: int) -> Tensor:
    size = -(-len(tensor) // 2)
    return tensor[rank * size : (rank + 1) * size]


@pytest.mark.slow
def test_a_killed_run_of_shares_goes_on_to_the_same_bits(
    runs: Path, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "dead", tmp_path / "run")
    assert run(tmp_path / "run", pipeline, shards, **STRATEGY) == 0
    folders = (runs / "fsdp", tmp_path / "run")
    one, two = (read_ckpt(folder / "checkpoints/step_00000006.ckpt", "") for folder in folders)
    for key in (*OWNED, "averaging_state"):
        assert_close(one[key], two[key], rtol=0, atol=0)
    metrics = [read_metrics(folder / "metrics.csv") for folder in folders]
    measured = ("train/images_per_s", "train/data_wait_share", "memory/")
    for name in metrics[0]:
        if not name.startswith(measured):
            assert metrics[0][name] == metrics[1][name]


@pytest.mark.slow
def test_a_run_of_shares_goes_on_in_one_process(
    runs: Path, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "dead", tmp_path / "run")
    assert fit(config_of(tmp_path / "run", pipeline, shards, **{"trainer.devices": 1})) == 0
    assert_same_losses(tmp_path / "run", runs / "ddp")
    assert (tmp_path / "run/checkpoints/step_00000006.ckpt").is_file()


@pytest.mark.slow
def test_a_run_of_whole_models_goes_on_in_shares(
    runs: Path, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "ddp", tmp_path / "run")
    for path in ("export", "exports/step_00000006"):
        shutil.rmtree(tmp_path / "run" / path)
    (tmp_path / "run/checkpoints/step_00000006.ckpt").unlink()
    assert run(tmp_path / "run", pipeline, shards, **STRATEGY) == 0
    assert_same_losses(tmp_path / "run", runs / "ddp")
    path = tmp_path / "run/checkpoints/step_00000006.ckpt"
    assert path.is_dir() and damage(path) is None
