"""Paths of configs: ~ and variables, what is left alone, and where nothing can be written."""

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

from blackpoint.data.config import DataConfig
from blackpoint.data.files.paths import BadPath, Holds, expanded, obstacle
from blackpoint.sampling.options import SampleConfig
from blackpoint.scripts.cli import VERBS, main
from blackpoint.scripts.config import load
from blackpoint.scripts.config_fields import fields_of, holds, is_text, item_hint, nested_class
from tests.tiny_pipeline import make_tiny_pipeline

CONFIGS: dict[str, type] = {
    verb: importlib.import_module(module).config_class() for verb, (module, _) in VERBS.items()
}
NO_PATHS = {
    "module", "label", "file_column", "caption_column", "image_column", "image_key", "caption_key",
    "sampler", "project", "name",
    "negative_prompt", "device", "crop", "baseline", "variant", "targets",
}  # fmt: skip
"""Words of text fields that are neither a choice nor a path."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.delenv("NOT_SET", raising=False)
    return tmp_path / "home"


def text_fields(config_class: type) -> list[tuple[str, Any]]:
    """Lists the text fields of a config, those of its lists and mappings included."""
    found = []
    for path, field in fields_of(config_class).items():
        item = item_hint(field.hint)
        if (section := nested_class(item)) is not None:
            found += [(f"{path}.{name}", f.hint) for name, f in fields_of(section).items()]
        found += [(path, field.hint), (path, item)]
    return [(path, hint) for path, hint in found if hint is not None and is_text(hint)]


@pytest.mark.parametrize("verb", CONFIGS)
def test_every_text_field_is_a_path_a_choice_or_known_as_text(verb: str) -> None:
    from typing import Literal, get_args, get_origin

    for path, hint in text_fields(CONFIGS[verb]):
        is_choice = any(get_origin(each) is Literal for each in (hint, *get_args(hint)))
        word = path.rpartition(".")[2]
        plain = word in NO_PATHS or path in ("brief", "only", "preview.prompts", "model.classes")
        plain = plain or word == "labels"
        assert holds(hint, Holds.PATH) or is_choice or plain, f"{verb}: {path}"


@pytest.mark.parametrize("verb", CONFIGS)
def test_home_and_variables_are_expanded_in_every_path(verb: str, home: Path) -> None:
    from blackpoint.scripts.config_values import Texts

    for path, hint in text_fields(CONFIGS[verb]):
        if holds(hint, Holds.PATH):
            texts = Texts()
            assert texts.guarded(hint, "~/x", path) == f"{home}/x"
            assert texts.guarded(hint, "${DATA_ROOT}/x", path) == f"{home.parent}/data/x"


def test_yaml_and_command_line_expand_alike(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("checkpoint: $DATA_ROOT/sd\noutput: ~/out\nprompts: ~/p.txt\n")
    from_file = load(SampleConfig, [str(path)])
    given = ["checkpoint=${DATA_ROOT}/sd", "output=~/out", "prompts=$HOME/p.txt"]
    assert from_file == load(SampleConfig, given)
    assert (from_file.output, from_file.prompts) == (f"{home}/out", f"{home}/p.txt")


def test_entries_of_mappings_are_expanded(home: Path) -> None:
    from blackpoint.data.pack.pack import PackConfig
    from blackpoint.sampling.search.config import SearchConfig

    search = load(
        SearchConfig,
        ["checkpoint=c", "output=o", "prompts=a", "budget_nfe=9", "verifiers.a.kind=clip_score",
         "verifiers.a.checkpoint=~/clip"],
    )  # fmt: skip
    assert search.verifiers["a"].checkpoint == f"{home}/clip"
    mixture = load(DataConfig, ["mixture={a: {shards: ~/a}, b: {shards: $DATA_ROOT/b}}"])
    assert [each.shards for each in mixture.mixture.values()] == [
        f"{home}/a",
        f"{home.parent}/data/b",
    ]
    assert load(PackConfig, ["source=~/in", "output=~/out"]).source == f"{home}/in"


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/$DATA_ROOT/{000..009}.tar",
        "https://host/~user/${DATA_ROOT}.tar",
        "pipe:cat ~/a.tar | head -c ${N} $DATA_ROOT",
        "owner/name",
        "shards/shard-{000000..000009}.tar",
    ],
)
def test_what_is_no_local_path_stays(text: str, home: Path) -> None:
    assert load(DataConfig, [f"shards={text}"]).shards == text


def test_what_cannot_be_expanded_is_refused(home: Path, tmp_path: Path, capsys) -> None:
    given = ["checkpoint=c", "prompts=a"]
    assert main(["sample", *given, "output=$NOT_SET/x", "--print-config"]) == 2
    error = capsys.readouterr().err
    assert "output" in error and "NOT_SET is not set; set it, or write" in error
    with pytest.raises(BadPath, match="no home folder of ~nobody_here is known"):
        expanded("~nobody_here/x")
    literal = tmp_path / "$NOT_SET"
    literal.mkdir()
    assert expanded(str(literal)) == str(literal)


def test_no_folder_is_named_for_the_home_sign(home: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("output: ~/out\n")
    folder = make_tiny_pipeline(tmp_path / "sd")
    given = [f"checkpoint={folder}", "prompts=a one", "num_steps=1"]
    assert main(["sample", "c.yaml", *given]) == 0
    assert (home / "out/samples.jsonl").is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_places_that_cannot_be_made_are_refused_at_once(
    verb: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    """Before anything is loaded: the verb itself is never entered."""
    (tmp_path / "file").write_text("x")
    config_class = CONFIGS[verb]
    outputs = [p for p, field in fields_of(config_class).items() if holds(field.hint, Holds.OUTPUT)]
    if verb == "doctor":  # writes nothing
        return
    assert len(outputs) == 1, verb
    module = importlib.import_module(VERBS[verb][0])
    monkeypatch.setattr(module, "run", lambda config: pytest.fail("entered"))
    given = {
        "init": ["source=s", "checkpoint=c"],
        "train": ["checkpoint=c", "data.shards=s"],
        "sample": ["checkpoint=c", "prompts=a"],
        "search": ["checkpoint=c", "prompts=a", "budget_nfe=9", "verifiers.a.kind=luminance"],
        "evaluate": ["checkpoint=c", "prompts=a"],
        "sweep": ["evaluate.checkpoint=c"],
        "export": ["checkpoint=c"],
        "data pack": ["source=s"],
        "data encode": ["source=s", "checkpoint=c"],
        "data check": ["shards=s"],
        "report": ["run_dir=r"],
        "show": ["checkpoint=c"],
        "prefetch": ["config=c"],
    }
    for place, reason in (
        (tmp_path / "file" / "below", "file is a file, and nothing can lie below it"),
        (tmp_path / ("n" * 300), "a name of 300 bytes, where 255 is the most"),
        (tmp_path / "new" / ("n" * 300) / "out", "a name of 300 bytes"),
        (tmp_path / ("n" * 300) / ".." / "out", "a name of 300 bytes"),
        (tmp_path / ("/".join(["deep" * 50] * 30)), "is longer than the system takes"),
    ):
        arguments = [*given.get(verb, []), f"{outputs[0]}={place}"]
        assert main([*verb.split(), *arguments]) == 2
        error = capsys.readouterr().err
        assert reason in error and f"{outputs[0]}=" in error and "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_places_that_can_be_made_have_no_obstacle(tmp_path: Path) -> None:
    assert obstacle(tmp_path) is None
    assert obstacle(tmp_path / "a" / "b") is None
    assert obstacle(Path("relative/place")) is None
    assert "NUL" in str(obstacle(Path("a\0b")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write_is_an_obstacle(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "no right to write" in str(obstacle(tmp_path / "locked" / "out"))
