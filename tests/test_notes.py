"""Notes that would come without end are given once, and counted."""

import json
import logging
from pathlib import Path

import pytest

from blackpoint.data.files.notes import first, tell_counts
from blackpoint.sampling.checkpoints.pipeline_folder import PipelineFolder
from blackpoint.sampling.model import DiffusionModel
from blackpoint.scripts.cli import main
from tests.tiny_pipeline import NUM_TOKENS, make_tiny_pipeline

LONG = "a red one " * 20


def test_the_first_are_said_and_all_are_counted(caplog) -> None:
    assert [first("boxes", most=2) for _ in range(5)] == [True, True, False, False, False]
    assert first("cats") and first("dogs") and not first("dogs")
    with caplog.at_level(logging.WARNING):
        tell_counts()
        tell_counts()
    assert [record.message for record in caplog.records] == [
        "note: boxes: 5 in all; the first 2 are named above",
        "note: dogs: 2 in all; the first is named above",
    ]


def test_long_prompts_are_named_once_and_counted(tmp_path: Path, caplog) -> None:
    folder = make_tiny_pipeline(tmp_path / "sd")
    prompts = json.dumps([f"{LONG}{number}" for number in range(8)])
    given = [f"checkpoint={folder}", f"output={tmp_path / 'out'}", "num_steps=1"]
    assert main(["sample", *given, f"prompts={prompts}", "batch_size=2"]) == 0
    lines = [record.message for record in caplog.records if "cut to" in record.message]
    assert len(lines) == 2 and lines[0].startswith(f"cut to {NUM_TOKENS} of"), lines
    assert lines[1] == (
        "note: texts cut to what the text encoder reads: 8 in all; the first is named above"
    )


@pytest.mark.parametrize("length", [None, 1e30, 512])
def test_a_tokenizer_without_a_usable_length_takes_the_encoders(
    tmp_path: Path, length: float | None
) -> None:
    folder = make_tiny_pipeline(tmp_path / "sd")
    expected = DiffusionModel.load(folder).encode_prompts([LONG, "a one"]).prompt_embeds
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("model_max_length", None)
    path.write_text(json.dumps(config if length is None else config | {"model_max_length": length}))
    model = DiffusionModel.load(folder)
    found = model.encode_prompts([LONG, "a one"]).prompt_embeds
    assert found.shape == (2, NUM_TOKENS, expected.shape[-1])
    assert (found - expected).abs().max() == 0
    given = [f"checkpoint={folder}", f"output={tmp_path / 'out'}", "num_steps=1"]
    assert main(["sample", *given, "prompts=a one"]) == 0


def test_a_shorter_length_of_the_tokenizer_is_kept(tmp_path: Path) -> None:
    folder = make_tiny_pipeline(tmp_path / "sd")
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 12}))
    assert PipelineFolder(folder).tokenizer().model_max_length == 12
