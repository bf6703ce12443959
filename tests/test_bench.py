"""The benchmark measures pairs and writes a table with its raw seconds."""

import json
from pathlib import Path

import pytest

from scripts.bench import main
from scripts.config import to_yaml
from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_run import make_tiny_shards, tiny_config


@pytest.mark.slow
def test_bench_writes_table_and_raw_seconds(tmp_path: Path) -> None:
    base, shards = make_tiny_pipeline(tmp_path / "base"), make_tiny_shards(tmp_path / "images")
    config = tmp_path / "tiny.yaml"
    config.write_text(to_yaml(tiny_config(tmp_path / "unused", base, shards)))
    settings = {"config": config, "output": tmp_path / "out", "blocks": 2, "block_steps": 1}
    settings |= {"warmup_blocks": 1}
    settings |= {"sample_repeats": 1, "sample_images": 2, "num_steps": 2}
    main([f"{key}={value}" for key, value in settings.items()])
    result = json.loads((tmp_path / "out" / "benchmarks.json").read_text())
    assert len(result["raw"]["training_pairs_s"]) == 2
    assert result["training_over_bare"]["median"] > 0
    assert "bare training loop" in (tmp_path / "out" / "benchmarks.md").read_text()
