"""Number formats of search, evaluate, data encode and sweeps: what is recorded, and who goes on.

`auto` is made to take bfloat16 on the CPU; without that it takes float32, as on another device.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from blackpoint.data.latents import Encoding
from blackpoint.sampling.evaluation.rows import read_images, read_rows, write_rows
from blackpoint.sampling.model import DiffusionModel
from blackpoint.scripts.cli import main
from blackpoint.train.encode.config import EncodeConfig
from blackpoint.train.encode.encode import encode
from tests.devices import auto_takes_bfloat16
from tests.evaluations import arguments, write_prompts
from tests.tiny_sweep import EVALUATE, cells, start_cells_warm, sweep

RECORD = {"device": "cpu", "dtype": "bfloat16", "tf32": False}
BRIGHT = ["verifiers.bright.kind=luminance", "verifiers.bright.target=1"]
PAINT = "blackpoint.sampling.evaluation.generate.ImageGenerator.generate"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def search(pipeline: Path, output: Path) -> list[str]:
    given = ["search", f"checkpoint={pipeline}", 'prompts=["snow", "a blue night"]', "budget_nfe=8"]
    given += [f"output={output}", "num_steps=2", "guidance_scale=1"]
    return [*given, "verifiers.dark.kind=luminance", "verifiers.dark.target=0"]


def unfinish(output: Path) -> None:
    """Leaves a search as if it had been stopped after its first prompt."""
    (output / "hacking.json").unlink()
    for name in ("winners.jsonl", "candidates.jsonl"):
        kept = [row for row in rows(output / name) if row["prompt_index"] == 0]
        (output / name).write_text("".join(json.dumps(row) + "\n" for row in kept))


def forget(path: Path, *names: str) -> None:
    """Takes the record out of a file of settings, as earlier versions wrote it."""
    content = json.loads(path.read_text())
    for name in names:
        del content[name]
    path.write_text(json.dumps(content))


def test_a_search_records_its_formats_and_goes_on_in_no_others(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    output = tmp_path / "out"
    given = search(pipeline, output)
    with monkeypatch.context() as patch:
        auto_takes_bfloat16(patch)
        assert main(given) == 0
    settings = json.loads((output / "search.json").read_text())
    assert (settings["dtype"], settings["tf32"]) == ("bfloat16", False)
    assert json.loads((output / "ledger.json").read_text())["formats"] == RECORD
    before = rows(output / "candidates.jsonl")
    assert all({key: row[key] for key in RECORD} == RECORD for row in before)
    assert main(given) == 0  # finished: nothing is computed

    unfinish(output)
    capsys.readouterr()
    assert main(given) == 2
    told = capsys.readouterr().err
    assert f"output={output}: dtype was bfloat16 there, and auto takes float32 on this" in told
    assert "set dtype=bfloat16 to continue it here" in told
    assert main([*given, "dtype=float32"]) == 2
    assert "dtype: bfloat16 there, float32 now" in capsys.readouterr().err
    assert main([*given, "dtype=bfloat16"]) == 0
    untimed = [
        [{k: v for k, v in row.items() if k not in ("seconds", "spent")} for row in each]
        for each in (before, rows(output / "candidates.jsonl"))
    ]
    assert untimed[0] == untimed[1]


def test_a_search_without_a_record_goes_on_in_float32(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    assert main(search(pipeline, output)) == 0
    whole = [row["scores"] for row in rows(output / "candidates.jsonl")]
    unfinish(output)
    forget(output / "search.json", "tf32")
    auto_takes_bfloat16(monkeypatch)
    assert main(search(pipeline, output)) == 0
    assert [row["scores"] for row in rows(output / "candidates.jsonl")] == whole
    assert rows(output / "candidates.jsonl")[-1]["dtype"] == "float32"
    # Another process of the same start must see what the first saw.
    assert "tf32" not in json.loads((output / "search.json").read_text())


def test_an_evaluation_records_its_formats_and_goes_on_in_no_others(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    output = tmp_path / "out"
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    given = ["evaluate", *arguments(pipeline, prompts, output)]
    with monkeypatch.context() as patch:
        auto_takes_bfloat16(patch)
        assert main(given) == 0
    settings = json.loads((output / "evaluation.json").read_text())
    assert (settings["dtype"], settings["tf32"]) == ("bfloat16", False)
    assert all({key: row[key] for key in RECORD} == RECORD for row in read_images(output))
    with monkeypatch.context() as patch:
        patch.setattr(PAINT, None)
        assert main(given) == 0  # finished: nothing is computed
    capsys.readouterr()
    assert main([*given, *BRIGHT]) == 2
    told = capsys.readouterr().err
    assert "dtype was bfloat16 there, and auto takes float32" in told
    assert "set dtype=bfloat16 to continue it here" in told
    assert (output / "metrics.json").is_file()
    assert main([*given, *BRIGHT, "dtype=bfloat16"]) == 0
    (output / "metrics.json").unlink()
    assert main(given) == 2


def test_an_evaluation_without_a_record_goes_on_in_float32(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    output = tmp_path / "out"
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    given = ["evaluate", *arguments(pipeline, prompts, output)]
    assert main(given) == 0
    whole = [row["luminance"] for row in read_images(output)]
    forget(output / "evaluation.json", "tf32")
    kept = [row for row in read_rows(output).values() if row["prompt_index"] < 2]
    for row in kept:
        for name in RECORD:
            del row[name]
    (output / "metrics.json").unlink()
    write_rows(output / "images.parquet", kept, {})
    auto_takes_bfloat16(monkeypatch)
    assert main(given) == 0
    assert "without a record of number formats; it goes on with dtype=float32" in caplog.text
    found = read_images(output)
    assert [row["luminance"] for row in found] == whole
    assert {row["dtype"] for row in found} == {None, "float32"}


def test_pictures_of_auto_are_those_of_what_it_takes(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    given = ["sample", f"checkpoint={pipeline}", "prompts=snow", "num_steps=2"]
    assert main([*given, f"output={tmp_path / 'asked'}", "dtype=bfloat16"]) == 0
    assert main([*given, f"output={tmp_path / 'plain'}"]) == 0
    assert "dtype=auto" not in caplog.text  # nothing but float32 was taken
    auto_takes_bfloat16(monkeypatch)
    assert main([*given, f"output={tmp_path / 'auto'}"]) == 0
    assert "dtype=auto took bfloat16" in caplog.text
    names = ("asked", "auto", "plain")
    asked, auto, plain = ((tmp_path / n / "images" / "0_0.png").read_bytes() for n in names)
    assert auto == asked != plain


def encode_config(shards: Path, pipeline: Path, output: Path, **options: Any) -> EncodeConfig:
    fixed = {"resolution": 16, "batch_size": 4, "num_workers": 0, "device": "cpu"}
    return EncodeConfig(
        str(shards),
        str(pipeline),
        str(output),
        **fixed,
        num_processes=1,
        dtype="float32",
        **options,
    )


def test_latents_are_encoded_in_the_format_that_is_recorded(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    plain, low = tmp_path / "plain", tmp_path / "low"
    encode(encode_config(shards, pipeline, plain))
    with monkeypatch.context() as patch:
        auto_takes_bfloat16(patch)
        encode(encode_config(shards, pipeline, low))
    records = [Encoding.read(folder) for folder in (plain, low)]
    assert [each.encoder_dtype for each in records] == ["float32", "bfloat16"]
    assert not any(each.tf32 for each in records) and records[0].key != records[1].key
    expected, found = (load_file(f / "empty.safetensors")["prompt_embeds"] for f in (plain, low))
    embeds = DiffusionModel.load(pipeline, dtype=torch.bfloat16).encode_prompts([""]).prompt_embeds
    assert_close(found, embeds[0], rtol=0, atol=0)
    assert not torch.equal(found, expected)
    given = ["data", "encode", f"source={shards}", f"checkpoint={pipeline}", f"output={low}"]
    given += ["resolution=16", "batch_size=4", "num_workers=0", "device=cpu", "dtype=float32"]
    assert main(given) == 2
    assert "encoder_dtype was bfloat16 there, and auto takes float32" in capsys.readouterr().err
    assert main([*given, "encoder_dtype=bfloat16"]) == 0  # made already


def test_a_cache_without_a_record_keeps_its_key_and_goes_on_in_float32(
    pipeline: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    output = tmp_path / "out"
    config = encode_config(shards, pipeline, output, samples_per_shard=4)
    encode(config)
    forget(output / "encoding.json", "encoder_dtype", "tf32")
    auto_takes_bfloat16(monkeypatch)
    assert encode(config).num_kept_shards == 3  # the key is that of the settings of its time
    told = "it goes on with encoder_dtype=float32, tf32=false"
    assert told in capsys.readouterr().err
    partial = tmp_path / ".out.partial"
    for name in ("shards", "parts", "claims", "working"):
        (partial / name).mkdir(parents=True)
    settings = Encoding.read(output).settings()
    del settings["encoder_dtype"], settings["tf32"]
    (partial / "settings.json").write_text(json.dumps(settings))
    output.rename(tmp_path / "before")
    encode(config)
    assert told in capsys.readouterr().err
    assert Encoding.read(output).key == Encoding.read(tmp_path / "before").key


@pytest.mark.slow
def test_a_cell_that_would_go_on_in_other_formats_fails_with_the_reason(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"evaluate": {**EVALUATE, "checkpoint": str(pipeline)}}
    [cell] = cells(tmp_path, **settings)
    folder = cell.folder / "evaluation"
    own = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in cell.sections["evaluate"].items()
    ]
    with monkeypatch.context() as patch:
        auto_takes_bfloat16(patch)
        assert main(["evaluate", *own, f"output={folder}"]) == 0
    for each in ("metrics.json", "images.parquet"):
        (folder / each).unlink()
    start_cells_warm(monkeypatch)
    assert main(["sweep", str(sweep(tmp_path, **settings))]) == 1
    outcome = json.loads((cell.folder / "cell.json").read_text())
    assert outcome["state"] == "failed"
    assert "dtype was bfloat16 there, and auto takes float32" in outcome["reason"]
