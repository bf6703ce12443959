"""Noise optimisation: exact gradients, the ascent, its budget, its memory, and where it stops."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.grid import Prediction, SampleState, SamplingGrid
from blackpoint.sampling.guidance import Guidance
from blackpoint.sampling.inversion import Inverter, invert
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.noise import seeded_noise
from blackpoint.sampling.options import SamplingOptions
from blackpoint.sampling.samplers import run
from blackpoint.sampling.search.algorithms.noise_optimisation import (
    NoiseOptimisationConfig,
    noise_optimisation,
    rate,
)
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.driver import PromptSearch
from blackpoint.sampling.search.gradients import checkpointed, fixed_inverse, through_the_run
from blackpoint.sampling.search.problem import Problem
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.sampling.search.runner import TrialRunner
from blackpoint.sampling.verifiers.load import VerifierConfig, load_verifier
from blackpoint.sampling.verifiers.stability import Stability
from tests.search_problems import GaussianModel, search
from tests.toy_denoisers import ZERO_SNR, reader

NUM_STEPS = 6


class Toy(GaussianModel):
    """A nonlinear model that decodes with gradients and counts the rows it is asked for."""

    def denoiser(self, condition: Any, empty: Any, guidance: Guidance) -> Any:
        toy = reader(self.process.schedule)

        def denoise(x: torch.Tensor, t: int) -> Any:
            self.rows += len(x)
            return toy(x, t)

        return denoise

    def decode_with_gradient(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


class Brightness:
    """A differentiable verifier."""

    name, preview_log_snr, differentiable = "brightness", None, True

    def score(self, images: torch.Tensor, prompts: Any, previews: Any = None) -> torch.Tensor:
        return -(images - 1).square().flatten(1).mean(dim=1)


def runner_of(verifier: Any, model: Toy | None = None) -> TrialRunner:
    settings = SamplingOptions(num_steps=NUM_STEPS, guidance_scale=1.0)
    weights = {verifier.name: 1.0}
    return TrialRunner(model or Toy(), {0: "a", 1: "b"}, settings, [verifier], weights, 5)  # type: ignore[arg-type]


def ascend(
    one: TrialRunner, folder: Path, steps: int, **settings: Any
) -> tuple[list[PromptSearch], list[dict[str, Any]]]:
    config = NoiseOptimisationConfig(**settings)
    one.holds_inverse_fixed = config.gradient == "fixed_inverse"
    budget = steps * one.gradient_cost()

    def make(problem: Problem) -> Any:
        own = vars(problem) | {"gradient_cost": one.gradient_cost()}
        return noise_optimisation(Problem(**own), config)

    found = search(one, folder, make, budget)
    rows = [json.loads(line) for line in (folder / "candidates.jsonl").open()]
    return found, rows


VERIFIERS = {
    "brightness": lambda: Brightness(),
    "ddim": lambda: Stability(Inverter("ddim")),
    "fixed point": lambda: Stability(Inverter("fixed_point", 3)),
    "residual": lambda: Stability(Inverter("fixed_point", 3), "residual"),
}


@pytest.mark.parametrize("name", VERIFIERS)
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    one = runner_of(VERIFIERS[name]())
    noise = torch.stack([seeded_noise(seed, one.model.shape) for seed in (1, 2)]).double()
    conditions = one.conditions([0, 1])

    def scores(e: torch.Tensor) -> torch.Tensor:
        return through_the_run(one, e, conditions, ["a", "b"])[0]

    gradient = through_the_run(one, noise, conditions, ["a", "b"])[1]
    generator, step = torch.Generator().manual_seed(0), 1e-5
    for _ in range(5):
        along = torch.randn(noise.shape, generator=generator).double()
        expected = (scores(noise + step * along) - scores(noise - step * along)) / (2 * step)
        assert_close((gradient * along).flatten(1).sum(1), expected, rtol=1e-5, atol=1e-9)


def test_with_the_inverse_held_fixed_the_gradient_is_the_cosines_own() -> None:
    verifier = Stability(Inverter("ddim"))
    one = runner_of(verifier)
    noise = torch.stack([seeded_noise(seed, one.model.shape) for seed in (1, 2)]).double()
    found = fixed_inverse(one, verifier, noise, one.conditions([0, 1]))
    x = run("ddim", reader(ZERO_SNR), one.grid, SampleState(noise)).x
    back = invert(reader(ZERO_SNR), one.grid, x, verifier.inverter).x
    leaf = noise.clone().requires_grad_()
    cosine = torch.cosine_similarity(leaf.flatten(1), back.flatten(1), dim=1)
    [expected] = torch.autograd.grad(cosine.sum(), leaf)
    assert_close(found[0], cosine.detach())
    assert_close(found[1], expected)
    size = (1 - cosine.detach() ** 2).sqrt() / noise.flatten(1).norm(dim=1)
    assert_close(found[1].flatten(1).norm(dim=1), size)


@pytest.mark.parametrize("gradient", ["full", "fixed_inverse"])
def test_the_ledger_counts_a_differentiated_row_three_times(gradient: Any, tmp_path: Path) -> None:
    model = Toy()
    one = runner_of(Stability(Inverter("fixed_point", 3)), model)
    found, rows = ascend(one, tmp_path, 3, gradient=gradient)
    whole = NUM_STEPS + 3 * NUM_STEPS
    factor = 3 if gradient == "full" else 1
    assert len(rows) == 2 * 3 and all(row["nfe"] == factor * whole for row in rows)
    assert one.ledger.nfe == factor * 2 * 3 * whole
    assert one.ledger.conditional_rows == 2 * 3 * whole
    assert one.ledger.backward_rows == (2 * 3 * whole if gradient == "full" else 0)
    # checkpointing evaluates every row again on the way back; that is in the 3
    assert model.rows == (2 if gradient == "full" else 1) * 2 * 3 * whole
    assert all(each.spent_nfe == factor * 3 * whole for each in found)


@pytest.mark.parametrize("norm", ["sphere", "regularised", "free"])
def test_the_ascent_raises_the_score_and_the_best_seen_wins(norm: Any, tmp_path: Path) -> None:
    one = runner_of(Brightness())
    learning_rate = 60_000.0 if norm == "sphere" else 3_000.0
    found, rows = ascend(one, tmp_path, 30, learning_rate=learning_rate, norm=norm)
    for each in found:
        index = each.problem.prompt_index
        own = [row["score"] for row in rows if row["prompt_index"] == index]
        assert each.best is not None and each.best.score == max(own)
        assert max(own) > own[0] + 0.1
        assert not each.note


def test_the_norm_stays_on_the_sphere(tmp_path: Path) -> None:
    one = runner_of(Brightness())
    found, _ = ascend(one, tmp_path, 10, learning_rate=1e5)
    for each in found:
        first = each.finals[0].trial.start.noise(one.draw).norm()
        last = each.finals[-1].trial.start.noise(one.draw)
        assert_close(last.norm(), first, rtol=1e-5, atol=0)


def test_an_ascent_that_leaves_stops_and_keeps_the_best(tmp_path: Path) -> None:
    one = runner_of(Brightness())
    found, rows = ascend(one, tmp_path, 30, learning_rate=1e8, norm="free")
    for each in found:
        assert "far from" in each.note and "lower the learning rate" in each.note
        assert each.best is not None and math.isfinite(each.best.score)
    assert len(rows) < 2 * 30

    class Broken(Brightness):
        def score(self, images: torch.Tensor, prompts: Any, previews: Any = None) -> torch.Tensor:
            calls.append(len(images))
            scores = super().score(images, prompts)
            return scores * torch.nan if len(calls) > 3 else scores

    calls: list[int] = []
    found, _ = ascend(runner_of(Broken()), tmp_path / "nan", 30, learning_rate=10.0)
    for each in found:
        assert "not finite" in each.note and each.num_rejected == 1
        assert each.best is not None and math.isfinite(each.best.score)


def test_a_resumed_ascent_pays_nothing_twice(tmp_path: Path) -> None:
    settings = {"learning_rate": 60_000.0}
    whole, _ = ascend(runner_of(Brightness()), tmp_path / "whole", 8, **settings)

    class Killing(Brightness):
        def score(self, images: torch.Tensor, prompts: Any, previews: Any = None) -> torch.Tensor:
            calls.append(1)
            if len(calls) > 5:
                raise KeyboardInterrupt
            return super().score(images, prompts)

    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        ascend(runner_of(Killing()), tmp_path / "broken", 8, **settings)
    model = Toy()
    found, rows = ascend(runner_of(Brightness(), model), tmp_path / "broken", 8, **settings)
    assert model.rows == 2 * 3 * 2 * NUM_STEPS  # two prompts, three steps left, there and back
    assert len(rows) == 16
    for one, two in zip(found, whole, strict=True):
        assert one.best is not None and two.best is not None
        assert one.best.score == pytest.approx(two.best.score, abs=1e-4)


def test_the_rate_is_that_of_the_paper_at_its_size() -> None:
    config = NoiseOptimisationConfig()
    assert rate(config, torch.zeros(4, 128, 128)) == pytest.approx(100.0)
    assert rate(config, torch.zeros(4, 32, 32)) == pytest.approx(6.25)


def test_what_a_run_keeps_for_its_gradient_does_not_grow_with_the_network() -> None:
    """Tensors saved for the backward pass: with checkpointing, a few latents a step."""

    def kept(num_steps: int, wrap: Any) -> int:
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        one = runner_of(Brightness())
        grid = SamplingGrid.of(ZERO_SNR, ZERO_SNR.trailing_timesteps(num_steps))

        def wide(x: torch.Tensor, t: int) -> Prediction:
            hidden = x.repeat(1, 64, 1, 1)
            for _ in range(4):
                hidden = torch.tanh(hidden)
            out = hidden.view(len(x), 64, *x.shape[1:]).mean(dim=1)
            return Prediction(out, x - out)

        noise = seeded_noise(0, one.model.shape)[None].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run("ddim", wrap(wide), grid, SampleState(noise))
        return total

    latent = 16
    plain, lean = ([kept(n, wrap) for n in (4, 50)] for wrap in (lambda f: f, checkpointed))
    assert plain[0] > 4 * 200 * latent
    assert (lean[1] - lean[0]) / 46 <= 8 * latent


def test_the_verb_optimises_a_noise_and_keeps_it(pipeline: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "checkpoint": str(pipeline),
        "prompts": ["a red photo", "a blue night"],
        "algorithm": "noise_optimisation",
        "budget_nfe": 96,
        "num_steps": 4,
        "guidance_scale": 1.0,
        "verifiers": {"bright": VerifierConfig(kind="luminance", target=1.0)},
        "held_out": {"dark": VerifierConfig(kind="luminance", target=0.0)},
        "noise_optimisation": NoiseOptimisationConfig(learning_rate=1e5),
    }
    search_to_folder(SearchConfig(output=str(tmp_path / "out"), **settings))
    model = DiffusionModel.load(pipeline)
    for line in (tmp_path / "out" / "winners.jsonl").open():
        row = json.loads(line)
        assert row["nfe"] == 96 and row["note"] == ""
        assert row["score"] > row["baseline"]["scores"]["bright"]
        name = row["image"].replace(".png", ".noise.safetensors")
        noise = load_file(tmp_path / "out" / name)["noise"][None]
        grid = model.process.grid(4)
        with torch.no_grad():
            denoise = model.denoiser(model.encode_prompts([row["prompt"]]))
            image = model.decode(run("ddim", denoise, grid, SampleState(noise)).x)
        bright: Any = load_verifier(settings["verifiers"]["bright"], torch.device("cpu"))
        score = bright.score(image, [row["prompt"]])
        assert score.item() == pytest.approx(row["score"], abs=2e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compile": True}, "compile=true: algorithm=noise_optimisation differentiates"),
        ({"eta": 1.0}, "needs a deterministic sampler"),
        ({"sampler": "euler_ancestral"}, "needs a deterministic sampler"),
        ({"verifiers": {}}, "verifiers is empty"),
        (
            {"noise_optimisation": NoiseOptimisationConfig(gradient="fixed_inverse")},
            "goes with kind=stability",
        ),
        (
            {"verifiers": {"a": VerifierConfig("luminance"), "b": VerifierConfig("luminance")}},
            "ascends one score and 2 verifiers are set",
        ),
    ],
    ids=str,
)
def test_searches_without_a_gradient_are_refused(changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {
        "algorithm": "noise_optimisation",
        "verifiers": {"bright": VerifierConfig(kind="luminance", target=1.0)},
    }
    with pytest.raises(UserError, match=message):
        SearchConfig("x", "a red photo", "out", budget_nfe=99, **(settings | changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0"),
        ({"momentum": 1.0}, "momentum=1"),
        ({"norm_weight": -1.0}, "norm_weight=-1"),
        ({"largest_gradient": 0.0}, "largest_gradient=0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        NoiseOptimisationConfig(**settings)


def test_a_verifier_without_gradient_is_refused(pipeline: Path, tmp_path: Path) -> None:
    own = VerifierConfig(kind="custom", module="tests.search_problems:linear")
    config = SearchConfig(
        checkpoint=str(pipeline),
        prompts="a red photo",
        output=str(tmp_path / "out"),
        budget_nfe=99,
        num_steps=4,
        algorithm="noise_optimisation",
        verifiers={"own": own},
    )
    with pytest.raises(UserError, match="verifiers.own: algorithm=noise_optimisation needs a grad"):
        search_to_folder(config)
    assert not (tmp_path / "out").exists()
