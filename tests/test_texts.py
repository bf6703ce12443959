"""What a user types as text stays that text, in every text field, and is read back from YAML."""

import contextlib
import dataclasses
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blackpoint.sampling.options import SampleConfig
from blackpoint.sampling.prompts.prompt_set import read_prompts
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.scripts.cli import main
from blackpoint.scripts.config import load, to_yaml
from blackpoint.scripts.config_fields import fields_of, is_text
from blackpoint.scripts.sweep.config import SweepConfig
from tests.tiny_pipeline import make_tiny_pipeline

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)))
ODD = (
    "#3", "- a cat", "[a, b]", '"hello" on a wall', "*star*", "@user", "{red|blue}", "null", "~",
    "a ${b} cat", "${", "???", "", " ", "yes", "010", "1e5", "1:30", "key: value", "'quoted'", "!",
    "a\\${b}", "\\\\${", "%", "a\x85b\u2028c\r\nd", "\ue0000", "[", "{", "&a", ">-", "a # b", "=",
)  # fmt: skip
GIVEN = ["checkpoint=c", "output=o"]


def resolved(verb: str, *arguments: str) -> Any:
    """Runs the command with --print-config and returns what it prints, read as YAML."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([verb, *arguments, "--print-config"])
    assert status == 0, err.getvalue()
    return yaml.safe_load(out.getvalue())


def is_json_list(text: str) -> bool:
    try:
        return isinstance(json.loads(text, strict=False), list)
    except (ValueError, RecursionError):
        return False


def names_a_file(text: str) -> bool:
    return "/" in text or text.lower().endswith((".txt", ".jsonl", ".tsv", ".csv", ".parquet"))


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_reach_the_config_as_they_are(text: str) -> None:
    found = resolved("sample", *GIVEN, f"prompts={text}", f"negative_prompt={text}")
    assert found["prompts"] == text and found["negative_prompt"] == text


@settings(max_examples=150, deadline=None)
@given(TEXTS)
@example("a\n\nb")
def test_prompts_on_the_command_line_are_texts(text: str) -> None:
    found = resolved("sample", *GIVEN, f"prompts={text}", f"negative_prompt={text}")
    assert found["negative_prompt"] == text
    if not is_json_list(text):
        assert found["prompts"] == text or (names_a_file(text) and text[0] in "~$")
    in_a_list = resolved("sample", *GIVEN, f"prompts={json.dumps([text, 'b'])}")
    assert in_a_list["prompts"] == [text, "b"]
    assert read_prompts(in_a_list["prompts"]) == [text, "b"]
    if not names_a_file(text) and not is_json_list(text):
        assert read_prompts(text) == [text]


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.lists(TEXTS, max_size=3))
@example("a ${b}", ["???", "${"])
def test_a_config_written_as_yaml_is_read_back(text: str, texts: list[str]) -> None:
    config = SampleConfig("c", [text, *texts], "o", negative_prompt=text)
    written = to_yaml(config)
    assert yaml.safe_load(written) == json.loads(json.dumps(dataclasses.asdict(config)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(written, encoding="utf-8")
        assert load(SampleConfig, [str(path)]) == config


@pytest.mark.parametrize("verb", ["sample", "search", "evaluate", "train", "data pack"])
def test_every_text_field_takes_any_text(verb: str) -> None:
    """Choices and paths aside, which have rules of their own."""
    import importlib

    from blackpoint.data.files.paths import Holds
    from blackpoint.scripts.cli import VERBS
    from blackpoint.scripts.config_fields import container_of, holds, item_hint
    from blackpoint.scripts.config_values import Texts, parse

    config_class = importlib.import_module(VERBS[verb][0]).config_class()
    for path, field in fields_of(config_class).items():
        hint = field.hint
        if is_text(hint) and not holds(hint, Holds.PATH):
            for text in set(ODD) - {"null"}:
                assert parse(hint, path, text) == text
        if container_of(hint) in (list, tuple) and is_text(item_hint(hint)):
            assert parse(hint, path, json.dumps(ODD)) == list(ODD), path
            texts = Texts()
            guarded = texts.guarded(hint, list(ODD), path)
            assert texts.instance(hint, guarded) == list(ODD)


def test_lists_of_words_need_no_quotes() -> None:
    prompts = """[a cat, 'one, two', "#3", no, it's]"""
    given = ["run_dir=r", "checkpoint=c", "data.shards=s", f"preview.prompts={prompts}"]
    found = resolved("train", *given)["preview"]["prompts"]
    assert found == ["a cat", "one, two", "#3", "no", "it's"]


@pytest.mark.parametrize("text", ["[a,,b]", "[,]", "[a, , b]"])
def test_an_empty_item_is_refused(text: str, capsys) -> None:
    arguments = ["run_dir=r", "checkpoint=c", "data.shards=s", f"preview.prompts={text}"]
    assert main(["train", *arguments, "--print-config"]) == 2
    assert 'an item is empty; write ""' in capsys.readouterr().err


def test_null_unsets_what_may_be_null_and_is_a_word_elsewhere(capsys) -> None:
    found = resolved("train", "run_dir=r", "checkpoint=c", "data.shards=s", "wandb.name=null")
    assert found["wandb"]["name"] is None
    assert main(["sample", *GIVEN, "prompts=a", "negative_prompt=null", "--print-config"]) == 0
    caught = capsys.readouterr()
    assert "negative_prompt=null is the word null; negative_prompt= is an empty text" in caught.err
    assert main(["sample", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "key=null unsets one that may be null" in out and 'key=["a cat", "a dog"]' in out


def test_one_text_in_brackets_is_said_to_be_one(capsys) -> None:
    assert main(["sample", *GIVEN, "prompts=[a, b]", "--print-config"]) == 0
    assert "prompts=[a, b] is one text; a list is written as JSON" in capsys.readouterr().err


def test_texts_of_yaml_files_are_texts(tmp_path: Path, capsys) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "checkpoint: c\noutput: o\nprompts: [no, 'a ${b}', \"???\"]\nnegative_prompt: 010\n"
    )
    found = load(SampleConfig, [str(path)])
    assert found.prompts == ["no", "a ${b}", "???"] and found.negative_prompt == "010"
    path.write_text("checkpoint: c\noutput: o\nprompts: a\nnegative_prompt: 1.10\n")
    assert main(["sample", str(path), "--print-config"]) == 2
    assert "negative_prompt = 1.1 " in (error := capsys.readouterr().err) and "in quotes" in error
    path.write_text("checkpoint: c\noutput: o\nprompts: ???\n")
    assert main(["sample", str(path), "--print-config"]) == 2
    assert "required and not set" in capsys.readouterr().err


def test_interpolation_of_other_keys_stays_in_numbers_and_paths(tmp_path: Path, capsys) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "checkpoint: c\noutput: runs/${seed}\nnum_images: ${seed}\nseed: 3\nprompts: a\n"
    )
    found = load(SampleConfig, [str(path)])
    assert (found.output, found.num_images) == ("runs/3", 3)
    path.write_text("checkpoint: c\noutput: o\nseed: 3\nprompts: a\nnegative_prompt: a ${seed}\n")
    assert load(SampleConfig, [str(path)]).negative_prompt == "a ${seed}"
    assert "negative_prompt holds ${seed}, which stays as it is" in capsys.readouterr().err


def test_entries_of_a_sweep_have_the_types_of_their_verbs() -> None:
    found = load(
        SweepConfig,
        [
            "run_dir=r", "evaluate.prompts=#3", "evaluate.checkpoint=c", "evaluate.num_steps=3",
            "grid.evaluate.negative_prompt=[no, 010]", "grid.evaluate.num_steps=[1,2]",
            "arms.a.evaluate.negative_prompt=a ${b}", "evaluate.verifiers.x.kind=luminance",
        ],
    )  # fmt: skip
    assert found.evaluate["prompts"] == "#3" and found.evaluate["num_steps"] == 3
    assert found.grid["evaluate"]["negative_prompt"] == ["no", "010"]
    assert found.grid["evaluate"]["num_steps"] == [1, 2]
    assert found.arms["a"]["evaluate"]["negative_prompt"] == "a ${b}"


@pytest.mark.parametrize("text", ["#3", "[a, b]", "a ${b}", "null"])
def test_the_prompt_that_is_sampled_is_the_one_that_was_typed(tmp_path: Path, text: str) -> None:
    folder = make_tiny_pipeline(tmp_path / "sd")
    output = tmp_path / "out"
    arguments = [f"checkpoint={folder}", f"output={output}", "num_steps=1", f"prompts={text}"]
    assert main(["sample", *arguments]) == 0
    assert json.loads((output / "samples.jsonl").read_text())["prompt"] == text


def test_a_search_of_any_prompt_is_continued(tmp_path: Path) -> None:
    from blackpoint.sampling.prompts.prompt_set import Prompt
    from blackpoint.sampling.search.folder import SETTINGS, check_folder

    config = load(
        SearchConfig,
        ["checkpoint=c", f"output={tmp_path}", "prompts=a ${ cat", "negative_prompt=${b}",
         "budget_nfe=9", "verifiers.b.kind=luminance"],
    )  # fmt: skip
    prompts = [Prompt("a ${ cat")]
    kept = check_folder(config, tmp_path, prompts)
    (tmp_path / SETTINGS).write_text(json.dumps(kept))
    assert json.loads(json.dumps(check_folder(config, tmp_path, prompts))) == json.loads(
        json.dumps(kept)
    )


def test_a_prompt_that_looks_like_a_path_has_a_remedy_that_works(tmp_path: Path, capsys) -> None:
    folder = make_tiny_pipeline(tmp_path / "sd")
    arguments = [f"checkpoint={folder}", f"output={tmp_path / 'out'}", "num_steps=1"]
    assert main(["sample", *arguments, "prompts=/a cat"]) == 2
    assert 'prompts=["/a cat"]' in capsys.readouterr().err
    assert main(["sample", *arguments, 'prompts=["/a cat"]']) == 0


def test_a_word_that_is_a_file_here_is_a_prompt(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "dog").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert read_prompts("dog") == ["dog"]
