"""Searches over pipelines of diffusers: exact costs, winners that the stock pipeline re-makes."""

import json
import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from blackpoint.sampling.choices import SCORE_DECIMALS
from blackpoint.sampling.options import SamplingOptions
from blackpoint.sampling.pipelines.model import PipelineModel
from blackpoint.sampling.process import Process
from blackpoint.sampling.search.config import ALGORITHMS
from blackpoint.sampling.search.driver import drive
from blackpoint.sampling.search.gradients import white
from blackpoint.sampling.search.journal import Journal
from blackpoint.sampling.search.problem import Correlation, Problem, Seeded
from blackpoint.sampling.search.runner import TrialRunner
from blackpoint.scripts.cli import main
from tests.interrupted_verb import interrupted
from tests.test_pipelines import stock
from tests.tiny_pipelines import FAMILIES, build, make

SIDE, STEPS, SCALE, BATCH = 32, 4, 3.0, 4
PROMPTS = {0: "a white cat", 1: "a black night on snow"}
FIRST = ("flux", "sd3", "pixart", "qwen")
TESTED = [
    name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES
]


class Brightness:
    """Scores an image by its mean; differentiable."""

    name, differentiable, preview_log_snr = "brightness", True, None

    def score(self, images: Tensor, prompts: Any, previews: Any = None) -> Tensor:
        return images.mean(dim=(1, 2, 3))


class Hook:
    """Counts rows of the network, as anybody's forward hook would."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.rows = 0
        network.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _: Any, args: Any, kwargs: Any) -> None:
        self.rows += len(args[0] if args else kwargs["hidden_states"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("pipelines")
    return cache(lambda family: PipelineModel(build(family, root), SIDE, SIDE))


def searched(
    model: PipelineModel, folder: Path, algorithm: str, batch_size: int = BATCH, images: int = 8
) -> tuple[TrialRunner, list[Any], int]:
    """Searches every prompt within the budget of so many images; returns the hook's rows, too."""
    declared, hook = ALGORITHMS[algorithm], Hook(model.loaded_parts()[0])
    eta = 1.0 if algorithm == "fk_steering" else None
    sampling = SamplingOptions(
        num_steps=STEPS,
        guidance_scale=SCALE,
        guidance_rescale=0.0,
        eta=eta,
        height=SIDE,
        width=SIDE,
    )
    verifiers: Any = [Brightness()]
    runner = TrialRunner(model, PROMPTS, sampling, verifiers, {"brightness": 1.0}, batch_size)
    full = runner.cost(0, STEPS)
    gradient = runner.gradient_cost() if declared.form == "gradient" else 0
    hook.rows = 0
    problems = [
        Problem(
            index,
            0,
            runner.grid,
            runner.cost,
            images * full,
            gradient_cost=gradient,
            kendall={level: Correlation(1.0, 1.0) for level in range(1, STEPS)},
        )
        for index in PROMPTS
    ]
    journal = Journal(folder)
    found = drive(
        runner, journal, problems, lambda problem: declared.start(problem, declared.config())
    )
    journal.close()
    return runner, sorted(found, key=lambda each: each.problem.prompt_index), hook.rows


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("family", TESTED)
def test_spent_is_the_ledger_and_the_hook(
    family: str, algorithm: str, model: Any, tmp_path: Path
) -> None:
    """A checkpointed evaluation is made twice: once more on the way back, which counts 2."""
    runner, found, rows = searched(model(family), tmp_path, algorithm)
    ledger = runner.ledger
    assert sum(each.spent_nfe for each in found) == ledger.nfe
    evaluated = ledger.conditional_rows + ledger.unconditional_rows
    assert rows == evaluated + ledger.backward_rows
    assert all(each.best is not None for each in found)


@pytest.mark.parametrize("family", TESTED)
def test_a_random_winner_is_made_again_by_the_stock_pipeline(
    family: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its seed, by anybody's call."""
    if family == "sana_dpm":
        pytest.skip("its own solver is not the sampler that searches here")
    one = model(family)
    if isinstance(one.process, Process):  # PixArt: diffusers' DDIM has trailing timesteps too
        monkeypatch.setattr(one, "process", one.process.respaced("trailing"))
    _, found, _ = searched(one, tmp_path / "out", "random")
    for search in found:
        assert isinstance(search.best.trial.start, Seeded)
        text = PROMPTS[search.problem.prompt_index]
        image = stock(build(family, tmp_path), text, search.best.trial.seed, STEPS, SCALE)
        assert image.mean().item() == pytest.approx(search.best.score, abs=1e-4)


@pytest.mark.parametrize("family", TESTED)
def test_the_batch_changes_nothing(family: str, model: Any, tmp_path: Path) -> None:
    """Qwen-Image pads prompts to the batch, and is run one prompt per batch."""
    one = model(family)
    assert one.one_prompt_per_batch == (family == "qwen")
    by_size = [searched(one, tmp_path / str(size), "random", size)[1] for size in (1, 5)]
    for alone, together in zip(*by_size, strict=True):
        scores = [[each.score for each in search.finals] for search in (alone, together)]
        assert_close(*map(torch.tensor, scores), rtol=0, atol=2 * 10**-SCORE_DECIMALS)
        assert alone.best.trial.seed == together.best.trial.seed


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_killed_search_from_the_command_line_ends_as_an_unbroken_one(
    family: str, tmp_path: Path
) -> None:
    folder, outputs = make(family, tmp_path), [tmp_path / name for name in ("whole", "killed")]

    def arguments(output: Path) -> list[str]:
        return [
            "search",
            f"checkpoint={folder}",
            'prompts=["a white cat", "a black night"]',
            f"output={output}",
            "algorithm=halving",
            "halving.calibration_prompts=1",
            "halving.calibration_candidates=2",
            "halving.min_kendall=-1",
            "verifiers.bright.kind=luminance",
            "verifiers.bright.target=1",
            "budget_nfe=48",
            f"num_steps={STEPS}",
            f"guidance_scale={SCALE}",
            "guidance_rescale=0",
            "height=32",
            "width=32",
            "batch_size=2",
        ]

    assert main(arguments(outputs[0])) == 0
    done = interrupted(signal.SIGKILL, 30, outputs[1], arguments(outputs[1]))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert main(arguments(outputs[1])) == 0
    whole, killed = (
        [json.loads(line) for line in (output / "winners.jsonl").read_text().splitlines()]
        for output in outputs
    )
    assert whole == killed
    ledgers = [json.loads((output / "ledger.json").read_text())["nfe"] for output in outputs]
    assert ledgers[0] == ledgers[1]


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_tilted_noise_is_white_where_the_decoder_looks(family: str, model: Any) -> None:
    """Of packed latents, (tokens, 4 C), what goes into the decoder has the flat spectrum: the
    decoder's own input shows it, apart from a factor and a shift per channel."""
    painter, seen = model(family), []
    noise = painter.noise([0, 1], SIDE, SIDE)
    order = painter.grid_order(noise)
    assert noise.ndim == 3 and order is not None
    assert torch.equal(order.flatten().sort().values, torch.arange(noise[0].numel()))
    vae = painter.pipeline.vae
    hooked, vae.decode = vae.decode, lambda z, **options: (seen.append(z), hooked(z, **options))[1]
    try:
        for latents in (white(noise, order).float(), torch.zeros_like(noise)):
            painter.decode(latents)
    finally:
        vae.decode = hooked
    spectrum = torch.fft.fft2((seen[0] - seen[1]).double()).abs().flatten(-2)
    # |F|^2 / (|F|^2 + delta^2) of Gaussian noise is 1 to 1e-4; the rest is float32.
    assert_close(
        spectrum, spectrum.mean(dim=-1, keepdim=True).expand_as(spectrum), rtol=1e-3, atol=0
    )


def test_latents_that_lie_as_the_decoder_has_them_need_no_order(model: Any) -> None:
    assert model("sd3").grid_order(model("sd3").noise([0], SIDE, SIDE)) is None
