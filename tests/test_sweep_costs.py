"""What a sweep says that it will cost is what its searches and evaluations then count."""

import json
from pathlib import Path
from typing import Any

import pytest

from blackpoint.sampling.search.algorithms.draft import DraftConfig
from blackpoint.sampling.search.algorithms.fk_steering import FkSteeringConfig
from blackpoint.sampling.search.algorithms.halving import HalvingConfig
from blackpoint.sampling.search.algorithms.noise_optimisation import NoiseOptimisationConfig
from blackpoint.sampling.search.algorithms.tilt import TiltConfig
from blackpoint.sampling.search.config import PreviewConfig
from blackpoint.sampling.search.costs import Ledger
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.sampling.verifiers.load import VerifierConfig
from blackpoint.scripts.cli import main
from blackpoint.scripts.sweep.costs import costs_of_search, costs_table
from tests.evaluations import arguments, evaluate, write_prompts
from tests.test_search_verb import PROMPTS, config
from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_sweep import cells, sweep

STABLE: dict[str, Any] = {"kind": "stability", "inversion": "fixed_point", "num_iterations": 3}
ASCENT = {"algorithm": "noise_optimisation", "batch_size": 2}
SEARCHES: dict[str, dict[str, Any]] = {
    "random, guided": {"budget_nfe": 30, "guidance_scale": 3.0},
    "random, two evaluations a step": {"budget_nfe": 15, "sampler": "heun", "num_steps": 3},
    "zero order": {"algorithm": "zero_order", "budget_nfe": 22},
    "paths": {"algorithm": "paths", "num_steps": 8, "budget_nfe": 120},
    "halving": {
        "algorithm": "halving",
        "halving": HalvingConfig([0.5], 0.5, -1.0, "mean", calibration_prompts=1),
    },
    "halving by stability": {
        "algorithm": "halving",
        "budget_nfe": 60,
        "verifiers": {"stable": VerifierConfig(**STABLE)},
        "halving": HalvingConfig([0.5], 0.5, -1.0, "mean", calibration_prompts=1),
    },
    "drafts": {
        "algorithm": "draft",
        "guidance_scale": 3.0,
        "budget_nfe": 48,
        "draft": DraftConfig(2, min_kendall=-1.0, calibration_prompts=1),
    },
    "drafts by stability": {
        "algorithm": "draft",
        "budget_nfe": 60,
        "verifiers": {"stable": VerifierConfig(**STABLE)},
        "draft": DraftConfig(2, min_kendall=-1.0, calibration_prompts=1, share_new=0.5),
    },
    "FK steering": {"algorithm": "fk_steering", "sampler": "euler_ancestral"},
    "tilted noise": {"algorithm": "tilt", "eta": 1.0, "guidance_scale": 3.0, "budget_nfe": 20},
    "tilted noise through the network, two verifiers": {
        "algorithm": "tilt",
        "tilt": TiltConfig(gradient="x_t"),
        "sampler": "euler_ancestral",
        "verifiers": {
            "dark": VerifierConfig(kind="luminance", target=0.0),
            "half": VerifierConfig(kind="luminance", target=0.5, weight=2.0),
        },
    },
    "tilted noise by verifiers of two halves, shown": {
        "algorithm": "tilt",
        "eta": 1.0,
        "previews": PreviewConfig(every=2),
        "verifier_levels": {"early": [0.0, 0.5]},
        "verifiers": {
            "early": VerifierConfig(kind="luminance", target=0.0),
            "late": VerifierConfig(kind="luminance", target=0.5),
            "other": VerifierConfig(kind="luminance", target=1.0),
        },
    },
    "FK steering of tilted noise": {
        "algorithm": "fk_steering",
        "fk_steering": FkSteeringConfig(resample_every_steps=2, tilt=0.2),
        "eta": 1.0,
    },
    "gradient of a reward": ASCENT | {"budget_nfe": 30},
    "gradient of stability": ASCENT
    | {"budget_nfe": 100, "verifiers": {"stable": VerifierConfig(**STABLE)}},
    "inverse held fixed": ASCENT
    | {
        "budget_nfe": 35,
        "verifiers": {"stable": VerifierConfig(**STABLE)},
        "noise_optimisation": NoiseOptimisationConfig(gradient="fixed_inverse"),
    },
    "a shared inversion, a guided one, a preview": {
        "budget_nfe": 48,
        "verifiers": {
            "stable": VerifierConfig(**STABLE),
            "residual": VerifierConfig(**STABLE, measure="residual"),
            "guided": VerifierConfig(
                kind="stability", inversion_guidance_scale=2.0, partial_steps=2
            ),
            "seen": VerifierConfig(kind="self_supervised", module="tests.tiny_vision:ThreeColors"),
        },
    },
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_costs_what_was_planned(name: str, pipeline: Path, tmp_path: Path) -> None:
    """Rows with and without guidance, rows that gradients go back through, decodes and calls."""
    if name == "paths":  # whose levels depend on the schedule: Stable Diffusion's is assumed
        scheduler = {"timestep_spacing": "trailing"}
        pipeline = make_tiny_pipeline(tmp_path / "model", scheduler=scheduler)
    asked = config(pipeline, tmp_path / "out", **SEARCHES[name])
    one = costs_of_search(asked)
    output, _ = search_to_folder(asked)
    found = json.loads((output / "ledger.json").read_text())
    counts = [key for key in vars(Ledger()) if not key.endswith("_s")]
    assert {key: found[key] for key in counts} == {
        key: len(PROMPTS) * value for key, value in vars(one).items() if key in counts
    }
    assert 0 < one.nfe <= asked.budget_nfe


def test_an_evaluation_costs_what_was_planned(pipeline: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    given = arguments(pipeline, prompts, tmp_path / "out")
    summary = evaluate(given)
    keys = dict(argument.split("=", 1) for argument in given)
    del keys["output"]
    found = cells(tmp_path, evaluate=keys, grid={"evaluate.num_steps": [2, 3]})
    [row] = costs_table(found[:1]).rows
    assert (row["arm"], row["NFE per prompt"], row["prompts"]) == ("in all", "8", 5)
    assert row["NFE"] == summary.nfe == 40
    assert row["decodes"] == row["verifier calls"] == summary.num_images == 10
    [both] = costs_table(found).rows
    assert (both["cells"], both["NFE per prompt"], both["NFE"]) == (2, "8 to 12", 100)


def test_prompts_and_budgets_that_will_not_do_are_told_together(
    tmp_path: Path, capsys: Any
) -> None:
    search = {"checkpoint": "model", "num_steps": 4, "guidance_scale": 1.0, "budget_nfe": 8}
    search |= {"verifiers.dark.kind": "luminance", "verifiers.dark.target": 0.0, "prompts": "cat"}
    path = sweep(
        tmp_path,
        evaluate={},
        search=search,
        arms={
            "good": {},
            "poor": {"search.budget_nfe": 3},
            "absent": {"search.prompts": str(tmp_path / "GenEval_prompts.jsonl")},
            "another": {"search.prompts": str(tmp_path / "mine.txt")},
        },
    )
    assert main(["sweep", str(path)]) == 2
    error = capsys.readouterr().err
    assert "budget_nfe=3 is smaller than one image, which takes 4 NFE" in error
    assert "GenEval_prompts.jsonl: no such file; save there prompts/evaluation_metadata" in error
    assert "mine.txt: no such file; give a prompt" in error and "Traceback" not in error
    assert not (tmp_path / "sweep").exists()
