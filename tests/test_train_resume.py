"""Laws of what may change where a run is resumed: the weights stay what they would have been."""

import fnmatch
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from torch.testing import assert_close

import blackpoint.train.run
from blackpoint.data.files.dotted import flat
from blackpoint.data.files.errors import UserError
from blackpoint.data.files.yaml_text import read_yaml_file
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.records.continuing import check_continues
from blackpoint.train.records.resume_keys import RULES, Rule, When, rule_of
from blackpoint.train.records.run_directory import RunRecord, write_records
from tests.tiny_run import Killed, kill, load_checkpoint, stop_in_step, tiny_config

DOCS = Path(__file__).resolve().parents[1] / "docs" / "resume.md"
# What decides the weights, or what a number in the records means.
FIXED = (
    "seed",
    "allow_unsound",
    "model.channels",
    "model.blocks",
    "model.transformer_blocks",
    "model.head_channels",
    "model.codec",
    "model.patch",
    "model.condition",
    "model.classes",
    "model.seed",
    "dropout.*",
    "data.mixture",
    "data.mixture.*.weight",
    "data.validation_images",
    "data.resolution",
    "data.buckets.*",
    "data.max_upscale",
    "data.crop",
    "data.flip",
    "data.max_tokens",
    "data.caption_dropout",
    "data.max_image_pixels",
    "schedule.*",
    "loss.*",
    "lora.*",
    "optimizer.*",
    "ema.*",
    "trainer.precision",
    "trainer.encoder_dtype",
    "trainer.tf32",
    "trainer.attention",
    "trainer.channels_last",
    "trainer.compile",
    "trainer.compile_mode",
    "trainer.gradient_clip",
)
# Other values than those of the tiny run, for the rules that keep every bit.
CHANGED: dict[str, dict[str, Any]] = {
    "data.num_workers": {
        "data.num_workers": 1,
        "data.cache_gigabytes": 1.0,
        "data.allow_shell_urls": True,
    },
    "data.max_bad_share": {"data.max_bad_share": 0.5},
    "trainer.gradient_checkpointing": {"trainer.gradient_checkpointing": True},
    "trainer.log_every_steps": {
        "trainer.log_every_steps": 2,
        "trainer.validate_every_steps": 1,
        "trainer.checkpoint_every_steps": 1,
        "trainer.keep_checkpoints": 9,
        "trainer.keep_best": False,
    },
    "preview.*": {
        "preview.every_steps": 5,
        "preview.prompts": ["a dog"],
        "preview.num_steps": 2,
        "preview.num_images": 1,
        "watch.weights_every_steps": 2,
    },
    "export.*": {"export.every_steps": 2, "export.keep": 1},
    "wandb.*": {"wandb.enabled": True, "wandb.project": "other"},
}
SLOW = ("data.num_workers", "wandb.*")  # they start processes
ELSEWHERE = ("run_dir", "trainer.devices", "trainer.strategy", "plan")
"""Rules that other tests show: test_train_{identity,processes,sharding,plan}.py."""


@pytest.fixture(autouse=True)
def exports(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    calls: list[Path] = []

    def export(checkpoint: Path, output: Path, weights: str) -> None:
        calls.append(checkpoint)
        output.mkdir()

    monkeypatch.setattr(blackpoint.train.run, "export", export)
    yield calls


@pytest.fixture(scope="module")
def runs(pipeline: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`unbroken` of 6 steps, and `stopped` in the fourth."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
        )
        assert blackpoint.train.run.fit(config_of(folder / "unbroken", pipeline, shards)) == 0
        stop_in_step(patch, 4, kill)
        with pytest.raises(Killed):
            blackpoint.train.run.fit(config_of(folder / "stopped", pipeline, shards))
    return folder


def config_of(run_dir: Path, pipeline: Path, shards: Path, **overrides: Any) -> TrainConfig:
    values = {"data.validation_shards": str(shards), "dropout.probability": 0.2}
    return tiny_config(run_dir, pipeline, shards, **(values | overrides))


def assert_same_weights(run_dir: Path, other: Path, step: int = 6, **tolerance: float) -> None:
    one, two = load_checkpoint(run_dir, step), load_checkpoint(other, step)
    for key in ("state_dict", "current_model_state", "optimizer_states"):
        assert_close(one[key], two[key], **({"rtol": 0, "atol": 0} | tolerance))


def all_keys() -> set[str]:
    tree: Any = OmegaConf.to_container(OmegaConf.structured(TrainConfig))
    tree["data"]["mixture"] = {"one": {"shards": "x", "weight": 1.0}}
    return {"data.mixture", *flat(tree)}


@pytest.mark.parametrize("key", sorted(all_keys()))
def test_every_key_is_either_changeable_or_not(key: str) -> None:
    is_fixed = any(fnmatch.fnmatchcase(key, pattern) for pattern in FIXED)
    assert (rule_of(key) is not None) != is_fixed, "put it into RULES or FIXED"


def test_every_rule_is_for_keys_that_exist_and_is_documented() -> None:
    rows = re.findall(r"^\| (`.*)$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [row_of(rule) for rule in RULES]
    for pattern in [pattern for rule in RULES for pattern in rule.keys]:
        assert fnmatch.filter(all_keys(), pattern), pattern
    assert {*CHANGED, *ELSEWHERE} == {r.keys[0] for r in RULES if r.when is When.ALWAYS}


def row_of(rule: Rule) -> str:
    keys = ", ".join(f"`{key}`" for key in rule.keys)
    return f"{keys} | {rule.when.value} | {rule.reason} |"


@pytest.mark.parametrize(
    "rule",
    [pytest.param(r, marks=[pytest.mark.slow] if r in SLOW else []) for r in CHANGED],
)
def test_a_change_that_is_allowed_leaves_the_weights_as_they_were(
    rule: str, runs: Path, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "stopped", tmp_path / "run")
    assert (
        blackpoint.train.run.fit(config_of(tmp_path / "run", pipeline, shards, **CHANGED[rule]))
        == 0
    )
    assert_same_weights(tmp_path / "run", runs / "unbroken")
    saved = flat(read_yaml_file(tmp_path / "run" / "config.yaml"))
    assert {key: saved[key] for key in CHANGED[rule]} == CHANGED[rule]
    start = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"][-1]
    assert {*CHANGED[rule], "run_dir"} == {*start["changed"]}


@pytest.mark.parametrize(("batch_size", "accumulated"), [(2, 2), (1, 4)])
def test_a_step_takes_the_same_images_in_other_portions(
    batch_size: int, accumulated: int, runs: Path, pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "stopped", tmp_path / "run")
    portions = {"batch_size": batch_size, "trainer.accumulate_grad_batches": accumulated}
    config = config_of(tmp_path / "run", pipeline, shards, **portions)
    assert blackpoint.train.run.fit(config) == 0
    assert_same_weights(tmp_path / "run", runs / "unbroken", rtol=1e-3, atol=2e-5)
    assert load_checkpoint(tmp_path / "run", 6)["global_step"] == 6


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"batch_size": 2}),
        ({}, {"trainer.accumulate_grad_batches": 2}),
        (
            {"data.buckets.enabled": True, "data.buckets.step_px": 8},
            {"batch_size": 2, "trainer.accumulate_grad_batches": 2},
        ),
    ],
)
def test_a_step_of_other_images_is_another_run(
    before: dict[str, Any], after: dict[str, Any], tmp_path: Path
) -> None:
    paths = tmp_path, Path("sd"), Path("shards")
    write_records(RunRecord.read(tmp_path), tiny_config(*paths, **before))
    with pytest.raises(UserError, match="another config") as error:
        check_continues(tmp_path, tiny_config(*paths, **before, **after))
    assert all(key in str(error.value) for key in after)


@pytest.mark.slow
def test_a_finished_run_goes_on_where_it_is_to_be_longer(
    runs: Path, pipeline: Path, shards: Path, tmp_path: Path, exports: list[Path]
) -> None:
    shutil.copytree(runs / "unbroken", tmp_path / "run")
    longer = config_of(tmp_path / "run", pipeline, shards, **{"trainer.max_steps": 8})
    assert blackpoint.train.run.fit(longer) == 0
    assert [path.name for path in exports] == ["step_00000008.ckpt"]
    assert (tmp_path / "run" / "export_step_00000006").is_dir()
    assert read_yaml_file(tmp_path / "run" / "config.yaml")["trainer"]["max_steps"] == 8
    whole = config_of(tmp_path / "whole", pipeline, shards, **{"trainer.max_steps": 8})
    assert blackpoint.train.run.fit(whole) == 0
    assert_same_weights(tmp_path / "run", tmp_path / "whole", 8)
    assert blackpoint.train.run.fit(longer) == 0  # and is finished again
    assert len(exports) == 2
    with pytest.raises(UserError, match=r"max_steps=7: .* has done 8 steps already"):
        blackpoint.train.run.fit(
            config_of(tmp_path / "run", pipeline, shards, **{"trainer.max_steps": 7})
        )


def test_a_run_may_end_at_the_step_that_it_has_saved(
    runs: Path, pipeline: Path, shards: Path, tmp_path: Path, exports: list[Path]
) -> None:
    shutil.copytree(runs / "stopped", tmp_path / "run")
    config = config_of(tmp_path / "run", pipeline, shards, **{"trainer.max_steps": 3})
    assert blackpoint.train.run.fit(config) == 0
    assert [path.name for path in exports] == ["step_00000003.ckpt"]
    assert read_yaml_file(tmp_path / "run" / "config.yaml")["trainer"]["max_steps"] == 3


def test_without_its_checkpoints_a_finished_run_cannot_go_on(tmp_path: Path) -> None:
    paths = tmp_path, Path("sd"), Path("shards")
    write_records(RunRecord.read(tmp_path), tiny_config(*paths))
    (tmp_path / "export").mkdir()
    check_continues(tmp_path, tiny_config(*paths))
    with pytest.raises(UserError, match=r"holds no checkpoints .* start another run from its exp"):
        check_continues(tmp_path, tiny_config(*paths, **{"trainer.max_steps": 9}))


@pytest.mark.parametrize("decay", ["linear", "cosine", "none"])
def test_a_decay_to_the_last_step_keeps_it_where_it_is(decay: str, tmp_path: Path) -> None:
    paths = tmp_path, Path("sd"), Path("shards")
    values = {"optimizer.decay": decay, "optimizer.warmup_steps": 2}
    write_records(RunRecord.read(tmp_path), tiny_config(*paths, **values))
    longer = tiny_config(*paths, **values, **{"trainer.max_steps": 12})
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    for done in (0, 2):
        (checkpoints / f"step_{done:08d}.ckpt").touch()
        check_continues(tmp_path, longer)
    (checkpoints / "step_00000003.ckpt").touch()  # which holds the rate of step 4
    if decay == "none":
        check_continues(tmp_path, longer)
        return
    then, now = {"linear": ("0.00075", "0.0009"), "cosine": ("0.000854", "0.000976")}[decay]
    expected = rf"step 4 has {then} and would have had {now}"
    with pytest.raises(UserError, match=expected):
        check_continues(tmp_path, longer)
