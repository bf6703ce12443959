"""Laws of guidance: which branches are evaluated, and the rescale of each sample on its own."""

import numpy
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.guidance import Guidance, guided_output, rescale_guidance

# Of values up to 20, each rounded by 1e-6 at most, a few times over.
ROUNDING = 5e-5
X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
CONDITIONAL = torch.full((3, 5, 2), 2.0)
UNCONDITIONAL = torch.full((3, 5, 2), -1.0)


class Predict:
    """A network that counts the rows it evaluates."""

    def __init__(self):
        self.rows = []

    def __call__(self, x, embeddings):
        self.rows.append(len(x))
        return torch.tanh(x * embeddings.mean((1, 2)).view(-1, 1, 1, 1) + x.roll(1, -1))


def output(guidance, t=500, unconditional=UNCONDITIONAL):
    predict = Predict()
    both = None if unconditional is None else torch.cat([unconditional, CONDITIONAL])
    return guided_output(predict, X, t, CONDITIONAL, both, guidance), predict.rows


def test_guided_step_is_one_call_of_both_branches():
    guided, rows = output(Guidance(3.0))
    assert rows == [6]
    c, u = Predict()(X, CONDITIONAL), Predict()(X, UNCONDITIONAL)
    assert_close(guided, u + 3.0 * (c - u), rtol=0, atol=ROUNDING)


def test_scale_1_evaluates_the_conditional_branch_alone():
    guided, rows = output(Guidance(1.0, rescale=0.7), unconditional=None)
    assert rows == [3]
    assert_close(guided, Predict()(X, CONDITIONAL), rtol=0, atol=0)


def test_scale_0_is_the_unconditional_output():
    guided, _ = output(Guidance(0.0))
    assert_close(guided, Predict()(X, UNCONDITIONAL), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("t", "num_rows"), [(99, 3), (100, 6), (500, 6), (501, 3)])
def test_interval_switches_guidance_off_outside_it(t, num_rows):
    guided, rows = output(Guidance(3.0, interval=(100, 500)), t)
    assert rows == [num_rows]
    if num_rows == 3:
        assert_close(guided, Predict()(X, CONDITIONAL), rtol=0, atol=0)


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7, 1.0])
def test_rescale_is_that_of_the_paper_and_of_diffusers(phi):
    """Lin et al. 2023, section 3.4: std over channel, height and width of each sample."""
    guided, conditional = 5 * X + torch.arange(3).view(3, 1, 1, 1), X.roll(1, 0)
    ours = rescale_guidance(guided, conditional, phi)
    assert_close(ours, rescale_noise_cfg(guided, conditional, phi), rtol=1e-5, atol=ROUNDING)
    for row, (g, c) in enumerate(zip(guided.numpy(), conditional.numpy(), strict=True)):
        expected = phi * g * (numpy.std(c, ddof=1) / numpy.std(g, ddof=1)) + (1 - phi) * g
        numpy.testing.assert_allclose(ours[row].numpy(), expected, rtol=1e-5, atol=ROUNDING)


def test_full_rescale_has_the_deviation_of_the_conditional_output():
    ours = rescale_guidance(7 * X, X.tanh(), 1.0)
    assert_close(ours.std((1, 2, 3)), X.tanh().std((1, 2, 3)), rtol=1e-5, atol=0)


def test_guidance_of_a_sample_does_not_depend_on_its_batch():
    predict, guidance = Predict(), Guidance(7.5, rescale=0.7)
    whole, _ = output(guidance)
    for row in range(3):
        rows = slice(row, row + 1)
        alone = guided_output(
            predict,
            X[rows],
            500,
            CONDITIONAL[rows],
            torch.cat([UNCONDITIONAL[rows], CONDITIONAL[rows]]),
            guidance,
        )
        assert_close(alone, whole[rows], rtol=0, atol=ROUNDING)


def test_output_is_float32_even_from_a_half_precision_network():
    guided = guided_output(
        lambda x, embeddings: x.half(),
        X,
        0,
        CONDITIONAL,
        torch.cat([UNCONDITIONAL, CONDITIONAL]),
        Guidance(2.0),
    )
    assert guided.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": -1.0}, "guidance_scale=-1.0"),
        ({"scale": float("nan")}, "guidance_scale=nan"),
        ({"rescale": 1.5}, "guidance_rescale=1.5"),
        ({"rescale": -0.1}, "guidance_rescale=-0.1"),
        ({"interval": (500, 100)}, "guidance_interval"),
        ({"interval": (-1, 100)}, "guidance_interval"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Guidance(**arguments)
