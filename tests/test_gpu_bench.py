"""The GPU bench: its FLOPs are those of the published architectures; its rows run in small form."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from blackpoint.scripts.bench import gpu
from blackpoint.scripts.bench.gpu_models import FULL_SIZE, SMALL_FORM, Family, unet_flops

PARAMETERS = {"sd15": 859_520_964, "sdxl": 2_567_463_684}
"""Of the published UNets."""


@pytest.mark.parametrize("name", FULL_SIZE)
def test_models_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL_SIZE[name].unet)
    assert sum(weight.numel() for weight in unet.parameters()) == PARAMETERS[name]


@pytest.mark.slow
def test_flops_are_those_that_were_counted_on_the_published_unet() -> None:
    """SD 1.5, 512 px: forward and backward 77.1 TFLOP at batch 32, 25.7 for 32 rows forward."""
    family = FULL_SIZE["sd15"]
    assert 32 * unet_flops(family, "full") == pytest.approx(77.1e12, rel=5e-3)
    assert 32 * unet_flops(family, "forward") == pytest.approx(25.7e12, rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_FORM)
def test_a_backward_pass_costs_what_its_products_say(name: str) -> None:
    """A product a b has two gradients, g b' and a' g, each with as many FLOPs as itself. Inputs of
    the model need none; adapters need none of weights, but both where a and b are activations, as
    in attention, and none of the products that read the text alone."""
    family: Family = SMALL_FORM[name]
    forward, full, lora = (unet_flops(family, work) for work in ("forward", "full", "lora"))
    assert 2.5 * forward < full <= 3 * forward
    assert 1.5 * forward < lora < full


@pytest.mark.slow
def test_every_row_runs_in_the_small_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """compile traces alone: the C++ compiler would take minutes for the kernels."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: original(self, backend="aot_eager", **options),
    )
    output = tmp_path / "gpu"
    given = ["device=cpu", f"output={output}", "rounds=1", "steps=1", "num_steps=1"]
    assert gpu.main([*given, "limit_s=100000"]) == 0
    printed = capsys.readouterr().out
    content = json.loads(output.with_suffix(".json").read_text())
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"row"')]
    assert lines == content["rows"] and gpu.page(content) in printed
    assert output.with_suffix(".md").read_text() == gpu.page(content)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in gpu.ROWS}
    for line in lines:
        results[line["row"]].append(line)
    notes = {
        "fp16": "trainer.precision=16-mixed needs a GPU",
        "bf16_true": "trainer.precision has no bf16-true",
    }
    for name, found in results.items():
        measured = [line for line in found if "ms" in line]
        assert measured, found
        for line in measured:
            assert line["ms"] > 0 and line["peak_gb"] > 0 and line["images_per_s"] > 0
            assert line["flop_floor_ms"] > 0 and line["byte_floor_ms"] > 0
        assert [line["of_base"] is None for line in measured] == [
            True,
            *[False] * (len(measured) - 1),
        ]
        left_out = [line["note"] for line in found if "ms" not in line]
        assert not left_out or left_out == [notes.get(name)] or "xformers" in left_out[0], found
    assert [line["what"] for line in results["sdxl_lora"]] == ["bare loop", "ours, with EMA"]
    assert len(results["sdxl_sampling"]) == 4
    difference = results["sdxl_sampling"][2]["note"].rpartition(" ")[2]
    assert float(difference) < 1e-3  # float32 here: the same work
    kept = [line for line in content["rows"] if line["row"] != "search"]
    assert gpu.main([*given, "only=search"]) == 0
    again = json.loads(output.with_suffix(".json").read_text())["rows"]
    assert [line for line in again if line["row"] != "search"] == kept
    assert [line["row"] for line in again] == [line["row"] for line in content["rows"]]


def test_what_cannot_be_measured_is_said(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    given = [f"output={tmp_path / 'gpu'}", "rounds=1"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(given) == 2
    assert "device=cuda: there is no GPU (CUDA); device=cpu runs" in capsys.readouterr().err
    assert gpu.main([*given, "only=sd3"]) == 2
    assert "only=sd3: is none of sd15_full, sdxl_full" in capsys.readouterr().err
    (tmp_path / "gpu.json").write_text(json.dumps({"card": "NVIDIA A10G", "rows": []}))
    assert gpu.main([*given, "device=cpu", "only=search"]) == 2
    assert "its rows are of NVIDIA A10G" in capsys.readouterr().err


def test_a_row_that_fails_leaves_the_others(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(bench: gpu.Bench) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def fine(bench: gpu.Bench) -> None:
        bench.result("fine", [0.5, 0.25, 1.0], 4, 1e9)

    rows = {"a": gpu.RowOf(full), "b": gpu.RowOf(fine), "c": gpu.RowOf(fine, needs_s=1e9)}
    monkeypatch.setattr(gpu, "ROWS", rows)
    output = tmp_path / "gpu"
    assert gpu.main(["device=cpu", f"output={output}", "rounds=1"]) == 0
    a, b, c = json.loads(output.with_suffix(".json").read_text())["rows"]
    assert a["note"].startswith("failed: out of memory")
    assert (b["ms"], b["images_per_s"], b["highest_ms"]) == (500.0, 8.0, 1000.0)
    speed = json.loads(output.with_suffix(".json").read_text())["tflop_per_s"]["float32"] * 1e12
    assert b["share_of_peak"] == pytest.approx(1e9 / 0.5 / speed)
    assert b["flop_floor_ms"] == pytest.approx(1e3 * 1e9 / speed)
    assert "left out for want of time; only=c" in c["note"]


def test_the_page_says_nothing_of_cards_that_were_not_measured() -> None:
    docs = Path(__file__).parents[1] / "docs"
    page = (docs / "gpu.md").read_text()
    if not (docs / "gpu.json").exists():
        assert page.endswith("not measured yet.\n")
    else:
        assert page == gpu.page(json.loads((docs / "gpu.json").read_text()))
