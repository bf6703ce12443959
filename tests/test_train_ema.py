"""Laws of the averaged weights."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from torch.testing import assert_close

from blackpoint.train.ema import Ema, ema_decay


@given(st.integers(0, 10**7), st.floats(0, 0.99999))
def test_decay_warms_up_to_its_final_value(n: int, decay: float) -> None:
    warm = ema_decay(n, decay)
    assert 0 <= warm <= decay
    assert warm <= ema_decay(n + 1, decay)
    assert warm == decay or warm == (1 + n) / (10 + n)


def test_little_of_the_start_is_left_after_a_short_run() -> None:
    left = 1.0
    for n in range(1, 637):
        left *= ema_decay(n, 0.999)
    assert left < 1e-6  # at a constant .999 it would be .53


class Owner(LightningModule):
    """Owns one layer, and holds something beside it that must not be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = torch.nn.Linear(2, 1)
        self.outside = NotCopied()


class NotCopied:
    def __deepcopy__(self, memo: dict) -> None:
        raise AssertionError("the average must not copy what the module does not own")


def test_average_follows_the_recursion_and_swaps_in_and_back() -> None:
    module, ema, trainer = Owner(), Ema(0.5), Trainer(accelerator="cpu", logger=False)
    ema.setup(trainer, module, "fit")
    assert ema._average_model is not None
    expected = torch.zeros(())
    for n, value in enumerate([3.0, -1.0, 4.0, 1.0, 5.0]):
        torch.nn.init.constant_(module.unet.weight, value)
        ema._average_model.update_parameters(module)
        decay = ema_decay(n, 0.5) if n else 0  # the first update copies
        expected = decay * expected + (1 - decay) * value
    average = ema._average_model.module.unet.weight
    assert_close(average, expected.expand(1, 2))
    with ema.swapped_in(module):
        assert_close(module.unet.weight, expected.expand(1, 2))
    assert_close(module.unet.weight, torch.full((1, 2), 5.0))


class Layer(LightningModule):
    """Owns one layer of bfloat16 weights."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.unet = torch.nn.Linear(64, 64).to(dtype)


def averaged(module: Layer, every_steps: int, decay: float = 0.99) -> Ema:
    ema = Ema(decay, every_steps, on_cpu=True)
    ema.setup(Trainer(accelerator="cpu", logger=False), module, "fit")
    return ema


def test_an_average_of_every_few_steps_decays_by_all_of_them() -> None:
    """Of weights that move every third step alone, it is the average of every step, at those."""
    module = Layer(torch.float32)
    often, seldom = averaged(module, 1), averaged(module, 3)
    for step in range(30):
        if step % 3 == 0:
            torch.nn.init.normal_(module.unet.weight, generator=torch.Generator().manual_seed(step))
        for ema in (often, seldom):
            if ema.should_update(step_idx=step):
                assert ema._average_model is not None
                ema._average_model.update_parameters(module)
    one, two = (
        e._average_model.module.unet.weight  # type: ignore[union-attr]
        for e in (often, seldom)
    )
    assert seldom._average_model.n_averaged == 10  # type: ignore[union-attr]
    assert_close(two, one, rtol=1e-5, atol=1e-6)
    assert not seldom.should_update(epoch_idx=2)


def test_an_average_of_bfloat16_weights_moves_and_is_swapped_in_and_back() -> None:
    module = Layer()
    torch.nn.init.ones_(module.unet.weight)
    ema = averaged(module, 1, decay=0.9999)
    average = ema._average_model
    assert average is not None
    for _ in range(9000):
        average.n_averaged += 1  # as if it had warmed up: the decay is the final one
    weight = average.module.unet.weight
    module.unet.weight.data.fill_(1.5)
    for _ in range(20):
        average.update_parameters(module)
    expected = 1.5 - 0.5 * math.prod(1 - (9 / (10 + n)) for n in range(9000, 9020))
    assert_close(weight, torch.full((64, 64), expected), rtol=1e-6, atol=0)
    before = weight.clone()
    with ema.swapped_in(module):
        assert_close(module.unet.weight, before.bfloat16(), rtol=0, atol=0)
        module.unet.weight.data.zero_()  # whatever happens to them meanwhile
    assert_close(module.unet.weight, torch.full((64, 64), 1.5).bfloat16(), rtol=0, atol=0)
    assert_close(weight, before, rtol=0, atol=0)
    assert_close(ema.distance(module).item(), _distance(average, module), rtol=2**-7, atol=0)


def _distance(average: torch.nn.Module, module: Layer) -> float:
    pairs = zip(average.parameters(), module.parameters(), strict=True)
    squares = [(a.double() - w.double()).square().sum() for a, w in pairs]
    norm = torch.stack([w.double().square().sum() for w in module.parameters()]).sum()
    return (torch.stack(squares).sum() / norm).sqrt().item()
