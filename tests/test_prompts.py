"""Prompts: the published formats, parts of a set, size, and every refusal."""

import csv
import json
import logging
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.prompts.prompt_set import (
    Prompt,
    iterate_prompts,
    read_prompt_set,
    read_prompts,
)

ROOT = Path(__file__).resolve().parents[1]


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


def test_strings_and_lists_are_kept_as_they_are() -> None:
    assert read_prompt_set("a one") == [Prompt("a one")]
    assert read_prompt_set(["a one", "", " a two"]) == [
        Prompt("a one", index=0),
        Prompt("", index=1),
        Prompt(" a two", index=2),
    ]
    assert read_prompts("") == [""]


def test_empty_lines_are_left_out_and_counted(tmp_path: Path, caplog) -> None:
    path = write(tmp_path / "list.txt", "\ufeffa one\r\n\n  \n a two \n\n")
    with caplog.at_level(logging.WARNING):
        assert read_prompt_set(path) == [Prompt("a one", index=0), Prompt("a two", index=1)]
    assert "list.txt: left out 3 empty lines" in caplog.text
    assert read_prompts(Path(path)) == ["a one", "a two"]


def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / "a.txt", "a\u2028b\x0cc\n")) == ["a\u2028b\x0cc"]


def test_geneval_keeps_tasks_as_categories(tmp_path: Path) -> None:
    rows = [
        {"tag": "colors", "include": [{"class": "cow", "count": 1}], "prompt": "a red cow"},
        {"tag": "counting", "include": [], "exclude": [{"class": "cow"}], "prompt": "two cows"},
    ]
    path = write(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_prompt_set(path) == [
        Prompt("a red cow", "colors", 0, {"include": rows[0]["include"]}),
        Prompt("two cows", "counting", 1, {"include": [], "exclude": [{"class": "cow"}]}),
    ]


def test_partiprompts_keep_their_quotes(tmp_path: Path) -> None:
    """A prompt of the published file starts with a quoted word: its TSV knows no quoting."""
    path = write(
        tmp_path / "PartiPrompts.tsv",
        'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tnote\n"A B" on a wall\tArt\tx\t',
    )
    assert read_prompt_set(path) == [
        Prompt("bond", "Abstract", 0, {"Challenge": "Basic", "Note": "note"}),
        Prompt('"A B" on a wall', "Art", 1, {"Challenge": "x", "Note": ""}),
    ]


def test_drawbench_is_read_as_csv_writes_it(tmp_path: Path) -> None:
    texts = ['A "red", round ball', "two lines\nof text", "plain"]
    with (tmp_path / "drawbench.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(
            [["Prompts", "Category"], *([text, "Colors"] for text in texts), [], ["", ""]]
        )
    found = read_prompt_set(tmp_path / "drawbench.csv")
    assert found == [Prompt(text, "Colors", index) for index, text in enumerate(texts)]


def test_t2i_compbench_files_are_categories(tmp_path: Path) -> None:
    for name in ("color_val.txt", "3d_spatial_val.txt", "complex_val_action.txt"):
        write(tmp_path / name, f"from {name}\n")
    categories = {prompt.text: prompt.category for prompt in read_prompt_set(f"{tmp_path}/")}
    assert categories == {
        "from 3d_spatial_val.txt": "3d_spatial",
        "from color_val.txt": "color",
        "from complex_val_action.txt": "complex",
    }
    assert read_prompt_set(tmp_path / "color_val.txt")[0].category == "color"
    assert read_prompt_set(write(tmp_path / "mine.txt", "a one"))[0].category == ""
    found = read_prompt_set(str(tmp_path / "co*_val*.txt"))
    assert [(prompt.category, prompt.index) for prompt in found] == [("color", 0), ("complex", 1)]


def test_splits_that_repeat_each_other_are_refused(tmp_path: Path) -> None:
    for name in ("color.txt", "color_train.txt", "color_val.txt", "color_val_seen.txt"):
        write(tmp_path / name, "a red cow\n")
    with pytest.raises(UserError, match=r"color_train.txt repeats .* color.txt; .*\*_val.txt"):
        read_prompt_set(str(tmp_path))
    assert len(read_prompt_set(str(tmp_path / "*_val.txt"))) == 1


def test_pick_a_pic_tables_leave_their_images_unread(tmp_path: Path) -> None:
    captions = ["a cat", None, "a dog", " "]
    table = pyarrow.table(
        {
            "jpg_0": [b"1"] * 4,
            "caption": captions,
            "label_0": [1.0, 0.0, 0.5, 0.0],
            "tag": pyarrow.array(["pets"] * 4).dictionary_encode(),
            "embedding": [[0.0]] * 4,
        }
    )
    parquet.write_table(table, tmp_path / "pick.parquet")
    expected = [
        Prompt("a cat", "pets", 0, {"label_0": 1.0}),
        Prompt("a dog", "pets", 1, {"label_0": 0.5}),
    ]
    assert read_prompt_set(tmp_path / "pick.parquet") == expected
    path = write(tmp_path / "pick.jsonl", '{"caption": "a cat", "label_0": 1}\n{"Text": "a dog"}')
    assert read_prompt_set(path) == [Prompt("a cat", "", 0, {"label_0": 1}), Prompt("a dog", "", 1)]


def test_part_of_a_set_keeps_its_indices_and_reads_no_further(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"number {number}"}) for number in range(10)]
    whole = read_prompt_set(write(tmp_path / "a.jsonl", "\n".join(lines)))
    part = read_prompt_set(write(tmp_path / "b.jsonl", "\n".join([*lines, "{broken"])), 3, 7)
    assert part == whole[7:]
    assert read_prompt_set(["a", "b", "c"], 5, 1) == [Prompt("b", index=1), Prompt("c", index=2)]
    assert next(iterate_prompts(tmp_path / "b.jsonl")) == whole[0]


def test_many_prompts_take_little_memory_and_time(tmp_path: Path) -> None:
    """A tenth of 10^6 lines in a tenth of 300 MB and 10 s, beside what the interpreter takes."""
    line = json.dumps({"prompt": "a photograph of a red panda on a black background", "tag": "x"})
    (tmp_path / "many.jsonl").write_text(f"{line}\n" * 100_000)
    code = (
        "import resource, sys, time\n"
        "from blackpoint.sampling.prompts.prompt_set import read_prompt_set\n"
        "memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before, start = memory(), time.process_time()\n"
        "prompts = read_prompt_set(sys.argv[1])\n"
        "print(len(prompts), memory() - before, time.process_time() - start)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "many.jsonl")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    count, megabytes, seconds = map(float, result.stdout.split())
    assert count == 100_000
    assert megabytes < 28
    assert seconds < 2  # twice its share, for a machine that has other work


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n\n", r"a.txt holds no prompt; write one per line"),
        ("a.txt", b"a\ncaf\xe9\n", r"a.txt line 2 is not UTF-8 text; save it as UTF-8"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt', r"a.jsonl line 2 is not JSON .*; write one obj"),
        ("a.jsonl", "\n[1]", r"a.jsonl line 2 is list, not an object; write \{"),
        ("a.jsonl", '{"promt": "a"}', r"line 1 has no field called prompt, .*'promt'; name"),
        ("a.jsonl", '{"prompt": 3}', r"a.jsonl line 1: prompt=3 is not text; put it in quotes"),
        ("a.jsonl", '{"prompt": "a \\ud83d"}', r"line 1: '\\ud83d' is half of a character; write"),
        ("a.csv", "", r"a.csv line 1 has no field called .* but nothing"),
        ("a.csv", "prompt,tag\na,b\na, b,c\n", r"line 3 has 3 fields where .* 2; .*comma"),
        ("a.csv", 'prompt\n"a\nb\n', r"a.csv line 2: damaged CSV .*; close each quoted field"),
        ("a.tsv", "Prompt\tTag\na\n", r"a.tsv line 2 has 1 fields where .* 2; .*no tab"),
        ("a.parquet", "no table", r"a.parquet: damaged Parquet after row 0 .*; write it anew"),
        ("a.yaml", "prompt: a", r"a.yaml: not a format of prompts; give a .txt, .*or .parquet"),
    ],
)
def test_damaged_files_name_file_line_rule_and_remedy(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompt_set(str(tmp_path / name))


def test_a_parquet_row_that_is_no_text_is_named(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"prompt": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet row 1: prompt=1 is not text"):
        read_prompt_set(tmp_path / "a.parquet")


def test_what_is_no_prompt_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    for wrong, message in (
        ("nowhere.jsonl", "nowhere.jsonl: no such file; give a prompt, a list, a file"),
        ("/nowhere/", "no such file"),
        (str(tmp_path / "bare"), r"bare holds no prompt file; give a folder with one .txt"),
        (str(tmp_path / "*.csv"), "holds no prompt file; give a pattern that fits files"),
        ([], "prompts is empty; give at least one prompt"),
        (["a", "\udcff"], "prompts: '.udcff' is half of a character; write texts in UTF-8"),
        ({"a": "b"}, "must be a prompt, a list of prompts.*quote a prompt"),
    ):
        with pytest.raises(UserError, match=message):
            read_prompt_set(wrong)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / "a.txt", "a one")

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UserError, match=r"a.txt cannot be read \(Permission denied\); look at"):
        read_prompt_set(path)


def test_limit_and_offset_are_checked() -> None:
    with pytest.raises(UserError, match="limit=0 must be at least 1; leave it out"):
        read_prompt_set(["a"], limit=0)
    with pytest.raises(UserError, match="offset=-1 must not be negative; 0 starts"):
        read_prompt_set(["a"], offset=-1)
    with pytest.raises(UserError, match="offset=2: prompts holds 2; give less than that"):
        read_prompt_set(["a", "b"], offset=2)
