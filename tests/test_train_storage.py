"""Training from storage that stops answering: the run goes on when it does again."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import blackpoint.data.shards.remote
from blackpoint.data.files.signals import RESUMABLE_STATUS
from blackpoint.scripts.cli import main
from tests.shard_server import serving
from tests.tiny_run import stop_in_step, tiny_config


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_server_that_stops_answering_leaves_a_run_that_the_same_command_continues(
    num_workers: int,
    pipeline: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(blackpoint.data.shards.remote, "PAUSES_S", (0.01,) * 2)
    with serving(shards) as server:
        values = {"data.cache_dir": str(tmp_path / "cache"), "data.cache_gigabytes": 0.0}
        values |= {"data.num_workers": num_workers, "trainer.max_steps": 12}
        config = tiny_config(tmp_path / "run", pipeline, Path("x"), **values)
        config.data.shards = f"{server.url}/shard-{{000000..000000}}.tar"
        yaml = tmp_path / "tiny.yaml"
        OmegaConf.save(OmegaConf.structured(config), yaml)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("BLACKPOINT_UNREACHABLE", str(tmp_path / "mark"))
            stop_in_step(patch, 4, lambda: setattr(server, "is_down", True))
            assert main(["train", str(yaml)]) == RESUMABLE_STATUS
        assert (tmp_path / "mark").exists()
        error = capsys.readouterr().err
        assert "after 3 tries" in error and "Traceback" not in error
        server.is_down = False
        assert main(["train", str(yaml)]) == 0
    # With a worker, batches that were read ahead are still trained on.
    assert re.search(rf"resuming {tmp_path / 'run'} at step (3|6|9)\b", capsys.readouterr().err)
