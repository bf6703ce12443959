"""Tilted step noise: its spectrum, what it gains, its costs, its records, and refusals."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.grid import SampleState
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.noise import initial_noise
from blackpoint.sampling.options import SamplingOptions
from blackpoint.sampling.samplers import run
from blackpoint.sampling.search.algorithms.fk_steering import FkSteeringConfig
from blackpoint.sampling.search.algorithms.tilt import TiltConfig
from blackpoint.sampling.search.gradients import TiltedSteps, score_gradient, tilted_noise, white
from blackpoint.sampling.search.problem import Seeded, Tilt, Trial
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.sampling.search.runner import TrialRunner
from blackpoint.sampling.verifiers.load import VerifierConfig
from tests.search_problems import GaussianModel
from tests.test_search_verb import PROMPTS, config, image_of, rows
from tests.toy_denoisers import ZERO_SNR, ideal_gaussian, reader

NUM_STEPS = 6


class Gaussian(GaussianModel):
    """Its decoder lets gradients through."""

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        return latents


class Toy(Gaussian):
    """A nonlinear network."""

    def denoiser(self, *_: Any) -> Any:
        return reader(self.process.schedule)


class Reward:
    """A differentiable verifier made of a function of images."""

    preview_log_snr, differentiable = None, True

    def __init__(self, function: Any, name: str = "reward") -> None:
        self.function, self.name, self.calls = function, name, 0

    def score(self, images: Tensor, prompts: Any, previews: Any = None) -> Tensor:
        self.calls += len(images)
        return self.function(images)


class Reddish:
    """A user's verifier: the first channel, squared so that its gradient is not constant."""

    differentiable = True

    def score(self, images: Tensor, prompts: Any, previews: Any = None) -> Tensor:
        return images[:, 0].square().mean(dim=(1, 2))


def detached(images: Tensor, prompts: Any) -> Tensor:
    """Declares a gradient that it does not give."""
    return images.detach().mean(dim=(1, 2, 3))


detached.differentiable = True  # type: ignore[attr-defined]


def first_pixel(images: Tensor) -> Tensor:
    return images[:, 0, 0, 0]


def curved(images: Tensor) -> Tensor:
    return torch.sin(2 * images).flatten(1).mean(dim=1) - images.square().flatten(1).mean(dim=1)


def runner_of(
    *verifiers: Any, model: Any = None, batch_size: int = 64, tilt: Tilt | None = None, **more: Any
) -> TrialRunner:
    settings = SamplingOptions(
        **({"num_steps": NUM_STEPS, "guidance_scale": 1.0, "eta": 1.0} | more)
    )
    one = TrialRunner(
        model or Gaussian(),
        dict(enumerate(PROMPTS)),
        settings,
        list(verifiers),
        {verifier.name: weight for verifier, weight in zip(verifiers, (1.0, 2.0), strict=False)},
        batch_size,
    )
    one.tilt_steps(tilt)
    return one


def scores_of(one: TrialRunner, count: int) -> list[float]:
    stop = one.grid.num_steps
    trials = [(0, Trial(0, seed, Seeded(seed), stop, "final", seed)) for seed in range(count)]
    found = dict(one.run(trials))
    return [found[number].outcome.score for number in range(count)]


def test_a_direction_has_a_flat_spectrum_the_phases_of_the_gradient_and_the_norm_of_noise() -> None:
    gradient = torch.randn(3, 4, 8, 6, generator=torch.Generator().manual_seed(0)) ** 3
    direction = white(gradient)
    spectrum = torch.fft.fft2(direction)
    size = spectrum.abs()
    # |F|^2 / (|F|^2 + delta^2) differs from 1 by at most (1e-5 max / min)^2.
    before = torch.fft.fft2(gradient.double())
    spread = (before.abs().amax() / before.abs().amin()).item()
    assert_close(size, size.mean().expand_as(size), rtol=(1e-5 * spread) ** 2 + 1e-9, atol=0)
    assert_close(spectrum / size, before / before.abs(), rtol=1e-9, atol=1e-9)
    norms = direction.flatten(1).norm(dim=1)
    assert_close(norms, torch.full_like(norms, math.sqrt(4 * 8 * 6)))


def test_frequencies_that_a_gradient_lacks_are_not_made_of_its_rounding() -> None:
    constant = torch.full((1, 1, 16, 16), 0.3) + 1e-8 * torch.randn(1, 1, 16, 16)
    assert_close(white(constant), torch.ones(1, 1, 16, 16).double(), rtol=0, atol=1e-4)


def test_a_gradient_of_no_use_leaves_the_noise_of_its_sample_as_it_was() -> None:
    noise, gradient = initial_noise([1, 2, 3], (1, 4, 4)), initial_noise([4, 5, 6], (1, 4, 4))
    alone = tilted_noise(noise[2:], gradient[2:], 0.5)
    gradient[0], gradient[1, 0, 1, 1] = 0, torch.nan
    tilted = tilted_noise(noise, gradient, 0.5)
    assert torch.equal(tilted[:2], noise[:2]) and torch.equal(tilted[2:], alone)
    assert torch.equal(tilted_noise(noise[2:], gradient[2:], 0.0), noise[2:])


def test_a_linear_score_gains_what_its_impulse_says() -> None:
    """The gradient of the first pixel is the same at each step, and so is its direction w: a run is
    the one without noise, sqrt(1 - c^2) times what its noise adds, and c times what w adds."""
    impulse, last, count = torch.zeros(1, 1, 4, 4), NUM_STEPS - 1, 8
    impulse[..., 0, 0] = 4.0  # a flat spectrum, and the norm sqrt(16)
    one = runner_of(Reward(first_pixel))
    ideal, starts = ideal_gaussian(ZERO_SNR), one.draw(range(count))

    def end(x: Tensor, noise: Tensor) -> Tensor:
        def draw(step: int) -> Tensor:
            return noise * (step < last)

        return first_pixel(run("ddim", ideal, one.grid, SampleState(x), eta=1.0, noise=draw).x)

    still = end(starts, torch.zeros_like(starts))
    origin = torch.zeros_like(impulse)
    gain = (end(origin, impulse) - end(origin, origin)).item()
    plain = torch.tensor(scores_of(one, count))
    assert gain > 0.1
    for strength in (0.2, 0.5):
        tilted = scores_of(runner_of(Reward(first_pixel), tilt=Tilt(strength)), count)
        expected = still + math.sqrt(1 - strength**2) * (plain - still) + strength * gain
        assert_close(torch.tensor(tilted), expected, rtol=0, atol=2e-4)  # scores have 4 decimals


@pytest.mark.parametrize("sums_scores", [True, False])
def test_the_gradient_at_x0_is_that_of_finite_differences(sums_scores: bool) -> None:
    first, second = Reward(curved, "first"), Reward(first_pixel, "second")
    one = runner_of(first, second)
    x0 = one.draw([1, 2]).double()
    found = score_gradient(one, x0, ["a", "b"], 1, sums_scores)
    along, step = one.draw([3, 4]).double(), 1e-5

    def difference(reward: Any) -> Tensor:
        return (reward(x0 + step * along) - reward(x0 - step * along)) / (2 * step)

    def norm(reward: Any) -> Tensor:
        leaf = x0.clone().requires_grad_()
        [gradient] = torch.autograd.grad(reward(leaf).sum(), leaf)
        return torch.ones(2) if sums_scores else gradient.flatten(1).norm(dim=1)

    expected = difference(curved) / norm(curved) + 2 * difference(first_pixel) / norm(first_pixel)
    assert_close((found * along).flatten(1).sum(dim=1), expected, rtol=1e-6, atol=1e-9)
    assert one.ledger.verifier_gradients == one.ledger.verifier_calls == first.calls * 2 == 4


def test_the_gradient_through_the_network_is_that_of_finite_differences() -> None:
    tilt, prompts = Tilt(1.0, "x_t"), ["a", "b"]
    one = runner_of(Reward(curved), model=Toy(), tilt=tilt)
    denoise, t = reader(ZERO_SNR), one.grid.timesteps[1]
    x = one.draw([1, 2]).double()
    steps = TiltedSteps(one, tilt, denoise, lambda step: torch.zeros_like(x), prompts)
    plain = steps.denoise(x, t)
    assert not plain.x0.requires_grad and torch.equal(plain.x0, denoise(x, t).x0)
    leaf = x.clone().requires_grad_()
    [gradient] = torch.autograd.grad(curved(denoise(leaf, t).x0).sum(), leaf)
    assert_close(steps.noise(1), white(gradient), rtol=1e-6, atol=1e-6)
    step, along = 1e-5, one.draw([3, 4]).double()
    ahead, back = (curved(denoise(x + sign * step * along, t).x0) for sign in (1, -1))
    assert_close((gradient * along).flatten(1).sum(1), (ahead - back) / (2 * step))


def test_a_tilt_of_nothing_is_ancestral_sampling_bit_for_bit(
    pipeline: Path, tmp_path: Path
) -> None:
    plain, _ = search_to_folder(config(pipeline, tmp_path / "plain", eta=1.0))
    none = {"algorithm": "tilt", "tilt": TiltConfig(strength=0.0)}
    tilted, _ = search_to_folder(config(pipeline, tmp_path / "none", eta=1.0, **none))
    for name in ("candidates.jsonl", "winners.jsonl"):
        for one, two in zip(rows(plain, name), rows(tilted, name), strict=True):
            assert (one["scores"], one["nfe"]) == (two["scores"], two["nfe"])
    for row in rows(plain, "winners.jsonl"):
        assert torch.equal(image_of(plain, row), image_of(tilted, row))


@pytest.mark.parametrize("gradient", ["x0", "x_t"])
def test_the_ledger_counts_what_hooks_see(gradient: Any, pipeline: Path) -> None:
    """Rows of the UNet there and back, decodes, scores; a backward pass decodes again."""
    model, reward = DiffusionModel.load(pipeline), Reward(curved)
    tilt = Tilt(0.3, gradient)
    one = runner_of(reward, model=model, tilt=tilt, guidance_scale=3.0, batch_size=2, height=32)
    seen = dict.fromkeys(("there", "back", "decoded", "decoded back"), 0)

    def count(what: str) -> Any:
        def hook(module: Any, taken: Any, given: Any) -> None:
            seen[what] += len(given[0]) if isinstance(given, tuple) else len(given)

        return hook

    model.unet.conv_out.register_forward_hook(count("there"))
    model.unet.conv_out.register_full_backward_hook(count("back"))
    model.vae.decoder.conv_out.register_forward_hook(count("decoded"))
    model.vae.decoder.conv_out.register_full_backward_hook(count("decoded back"))
    outcomes = [
        result.outcome
        for _, result in one.run(
            [(0, Trial(0, k, Seeded(k), NUM_STEPS, "final", k)) for k in range(3)]
        )
    ]
    tilted, ledger = 3 * (NUM_STEPS - 1), one.ledger
    assert seen["there"] == ledger.conditional_rows + ledger.unconditional_rows
    assert seen["there"] == 3 * 2 * NUM_STEPS
    assert seen["back"] == ledger.backward_rows == (2 * tilted if gradient == "x_t" else 0)
    assert ledger.decoded_images == seen["decoded back"] + 3 == tilted + 3
    assert seen["decoded"] == ledger.decoded_images + tilted
    assert ledger.verifier_gradients == tilted and ledger.verifier_calls == reward.calls
    assert ledger.nfe == sum(outcome.nfe for outcome in outcomes) == 3 * one.cost(0, NUM_STEPS)
    assert min(ledger.denoising_s, ledger.decoding_s, ledger.verifying_s) > 0


@pytest.mark.parametrize("algorithm", ["tilt", "fk_steering"])
def test_a_users_verifier_leads_and_its_winner_is_made_again(
    algorithm: Any, pipeline: Path, tmp_path: Path
) -> None:
    """By an import path; what a winner needs is its row's seed and the settings."""
    red = {"red": VerifierConfig(kind="custom", module="tests.test_search_tilt:Reddish")}
    changes: dict[str, Any] = {
        "tilt": TiltConfig(strength=0.5),
        "fk_steering": FkSteeringConfig(resample_every_steps=2, tilt=0.5),
    }
    common = {"eta": 1.0, "verifiers": red, "budget_nfe": 12, "seed": 1}
    output, _ = search_to_folder(
        config(pipeline, tmp_path / "out", algorithm=algorithm, **common, **changes)
    )
    ledger = json.loads((output / "ledger.json").read_text())
    assert ledger["verifier_gradients"] == 2 * 3 * 3 and ledger["nfe"] == 24
    assert ledger["beside"]["nfe"] == 2 * 4 and ledger["beside"]["verifier_gradients"] == 0
    candidates = {
        (row["prompt_index"], row["candidate"]): row for row in rows(output, "candidates.jsonl")
    }
    for row in rows(output, "winners.jsonl"):
        assert row["seed"] is None and set(row["held_out"]) == {"border"}
        assert row["score"] > row["baseline"]["scores"]["red"]  # of the same noise, not tilted
        if algorithm == "tilt":
            seed = candidates[row["prompt_index"], row["candidate"]]["seed"]
            one = runner_of(
                Reward(lambda images: images[:, 0].square().mean(dim=(1, 2))),
                model=DiffusionModel.load(pipeline),
                tilt=Tilt(0.5),
                num_steps=4,
            )
            trial = Trial(0, 0, Seeded(seed), 4, "final", seed)
            [(_, again)] = one.run([(PROMPTS.index(row["prompt"]), trial)])
            assert again.image is not None
            assert_close(image_of(output, row), again.image, rtol=0, atol=0.6 / 255)


def test_neither_batches_nor_a_kill_change_a_tilted_search(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "algorithm": "tilt",
        "eta": 1.0,
        "verifiers": {"red": VerifierConfig("custom", module="tests.test_search_tilt:Reddish")},
        "tilt": TiltConfig(strength=0.3, gradient="x_t"),
        "budget_nfe": 30,
    }
    whole, _ = search_to_folder(config(pipeline, tmp_path / "whole", **settings))
    from blackpoint.sampling.search import journal

    original, written = journal.Journal.write, 0

    def killing(self: Any, index: int, *given: Any) -> None:
        nonlocal written
        written += index in (0, 1)
        if written == 6:
            raise KeyboardInterrupt
        original(self, index, *given)

    monkeypatch.setattr(journal.Journal, "write", killing)
    with pytest.raises(KeyboardInterrupt):
        search_to_folder(config(pipeline, tmp_path / "out", batch_size=1, **settings))
    monkeypatch.undo()
    again, _ = search_to_folder(config(pipeline, tmp_path / "out", batch_size=2, **settings))
    for one, two in zip(rows(whole, "winners.jsonl"), rows(again, "winners.jsonl"), strict=True):
        assert one["candidate"] == two["candidate"]
        assert one["score"] == pytest.approx(two["score"], abs=1e-4)
        assert_close(image_of(whole, one), image_of(again, two), rtol=0, atol=1.1 / 255)
    spent = [json.loads((path / "ledger.json").read_text()) for path in (whole, again)]
    for key in ("nfe", "backward_rows", "decoded_images", "verifier_gradients"):
        assert spent[0][key] == spent[1][key]


@pytest.mark.parametrize("module", ["search_problems:linear", "test_search_tilt:detached"])
def test_a_verifier_without_gradient_is_refused(
    module: str, pipeline: Path, tmp_path: Path
) -> None:
    """Also one that declares a gradient and gives none."""
    own = {"own": VerifierConfig(kind="custom", module=f"tests.{module}")}
    given = {"algorithm": "tilt", "eta": 1.0, "verifiers": own}
    with pytest.raises(UserError, match="verifiers.own: algorithm=tilt needs a gradient"):
        search_to_folder(config(pipeline, tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "algorithm=tilt with sampler=ddim: it tilts the fresh noise"),
        ({"sampler": "heun"}, "use sampler=euler_ancestral, or sampler=ddim with eta above 0"),
        (
            {"eta": 1.0, "compile": True, "tilt": TiltConfig(gradient="x_t")},
            "compile=true: tilt.gradient=x_t differentiates the network",
        ),
        (
            {"eta": 1.0, "verifiers": {"stable": VerifierConfig(kind="stability")}},
            "inverts deterministic DDIM",
        ),
        (
            {
                "algorithm": "fk_steering",
                "eta": 1.0,
                "compile": True,
                "fk_steering": FkSteeringConfig(tilt=0.1, tilt_gradient="x_t"),
            },
            "fk_steering.tilt_gradient=x_t differentiates the network",
        ),
    ],
    ids=str,
)
def test_searches_that_cannot_be_tilted_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(Path("model"), Path("out"), **({"algorithm": "tilt"} | changes))


def test_settings_out_of_range_are_refused() -> None:
    for strength in (-0.1, 1.5):
        with pytest.raises(UserError, match=f"tilt.strength={strength}"):
            TiltConfig(strength=strength)
        with pytest.raises(UserError, match=f"fk_steering.tilt={strength}"):
            FkSteeringConfig(tilt=strength)


@pytest.mark.slow
def test_on_the_embedded_model_one_tilted_image_beats_the_same_noise_untilted(
    tmp_path: Path,
) -> None:
    """Sixteen captions, one image each: the reader's interval is above 0, and the judge's is not
    below; the winners' plain images begin from the same seeds."""
    root, readers = Path(__file__).parents[1], "blackpoint.scripts.miniature.digit_readers"
    labels = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

    def classifier(name: str, folder: str) -> VerifierConfig:
        path = str(root / "assets" / folder)
        return VerifierConfig("classifier", path, f"{readers}:{name}", labels=labels)

    output, lines = search_to_folder(
        config(
            root / "assets" / "tiny_sd",
            tmp_path / "out",
            prompts=str(root / "configs" / "prompts" / "digits.jsonl"),
            limit=16,
            num_steps=12,
            budget_nfe=12,
            eta=1.0,
            algorithm="tilt",
            verifiers={"reader": classifier("DigitReader", "digit_reader")},
            held_out={"judge": classifier("DigitPerceptron", "digit_perceptron")},
        )
    )
    [alarm] = json.loads((output / "hacking.json").read_text())
    assert alarm["changes"]["reader"]["low"] > 0 and alarm["changes"]["judge"]["high"] > 0
    assert lines[0].startswith("tilt, per prompt: 12 NFE, 12 decodes and 11 gradients")
