"""Laws of the averaged weights."""

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
