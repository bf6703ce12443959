"""`sample`, `evaluate` and `search` with a pipeline of diffusers as checkpoint, by their verbs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from blackpoint.data.files.yaml_text import read_yaml_file
from blackpoint.sampling.runtime.pictures import eight_bit, read_picture
from blackpoint.sampling.runtime.tasks import Task
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.sampling.verifiers.load import VerifierConfig
from blackpoint.scripts.cli import main
from tests.tiny_pipelines import build, make

ROOT = Path(__file__).resolve().parents[1]
PROMPT, STEPS, SIDE, SCALE = "a white cat", 3, 32, 3.0
SIZE = [f"num_steps={STEPS}", f"height={SIDE}", f"width={SIDE}", f"guidance_scale={SCALE}"]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("flux", tmp_path_factory.mktemp("pipelines"))


def stock(folder: Path, seed: int) -> torch.Tensor:
    image: torch.Tensor = build("flux", folder)(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        height=SIDE,
        width=SIDE,
        max_sequence_length=64,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="pt",
    ).images[0]
    return image


def test_sample_writes_the_stock_pipelines_pictures(flux: Path, tmp_path: Path) -> None:
    """To the rounding of a picture file, one step of 255; a second call finds nothing to do."""
    output = tmp_path / "out"
    command = ["sample", f"checkpoint={flux}", f"prompts={PROMPT}", f"output={output}", *SIZE]
    command += ["guidance_rescale=0", "num_images=2", "pipeline.max_sequence_length=64"]
    assert main(command) == 0
    for seed in range(2):
        written = eight_bit(read_picture(output / f"images/0_{seed}.png")).int()
        assert (written - eight_bit(stock(tmp_path, seed)).int()).abs().max() <= 1
    before = (output / "images/0_0.png").stat().st_mtime_ns
    assert main(command) == 0
    assert (output / "images/0_0.png").stat().st_mtime_ns == before


def test_evaluate_counts_the_rows_of_the_network(flux: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    output = tmp_path / "out"
    command = ["evaluate", f"checkpoint={flux}", f"prompts={PROMPT}", f"output={output}", *SIZE]
    assert main([*command, "num_images=2", "guidance_rescale=0", "batch_size=2"]) == 0
    rows = pq.read_table(output / "images.parquet").to_pylist()
    assert [row["nfe"] for row in rows] == [STEPS, STEPS]


@pytest.mark.parametrize(("algorithm", "images"), [("random", 4), ("noise_optimisation", 3)])
def test_stability_of_a_pipelines_noise_is_searched(
    algorithm: str, images: int, flux: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The inversion walks the pipeline's levels; its NFE count, too, and all are told before."""
    output = tmp_path / "out"
    command = ["search", f"checkpoint={flux}", f"prompts={PROMPT}", f"output={output}", *SIZE]
    command += ["guidance_rescale=0", "verifiers.stable.kind=stability", f"algorithm={algorithm}"]
    if algorithm == "noise_optimisation":
        command.append("noise_optimisation.gradient=fixed_inverse")
    assert main([*command, f"budget_nfe={images * 2 * STEPS}"]) == 0
    [winner] = [json.loads(line) for line in (output / "winners.jsonl").read_text().splitlines()]
    assert winner["nfe"] == images * 2 * STEPS and 0 < winner["score"] <= 1
    ledger = json.loads((output / "ledger.json").read_text())
    assert ledger["nfe"] == winner["nfe"]
    assert f"{winner['nfe']} NFE" in caplog.text and "GB of weights" in caplog.text


def test_the_number_of_processes_changes_nothing(flux: Path, tmp_path: Path) -> None:
    def winners(name: str, *tasks: Task) -> list[dict[str, Any]]:
        config = SearchConfig(
            checkpoint=str(flux),
            prompts=[PROMPT, "a black night on snow"],
            output=str(tmp_path / name),
            budget_nfe=4 * STEPS,
            num_steps=STEPS,
            height=SIDE,
            width=SIDE,
            verifiers={"dark": VerifierConfig(kind="luminance", target=0.0)},
        )
        for task in tasks:
            search_to_folder(config, task)
        text = (tmp_path / name / "winners.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    for one, two in zip(
        winners("one", Task()), winners("two", Task(1, 2), Task(0, 2)), strict=True
    ):
        assert one["seed"] == two["seed"] and one["candidate"] == two["candidate"]
        assert one["score"] == pytest.approx(two["score"], abs=2e-4)


@pytest.mark.parametrize(
    ("name", "rows", "images"),
    [("search_flux", 1, 16), ("search_sdxl_turbo", 1, 32), ("search_pixart", 2, 16)],
)
def test_budgets_of_the_configs_pay_for_the_images_that_they_say(
    name: str, rows: int, images: int
) -> None:
    config: Any = read_yaml_file(ROOT / "configs" / f"{name}.yaml")
    assert config["budget_nfe"] == images * rows * config["num_steps"]
