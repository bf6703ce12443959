"""The optimizer, a library's: AdamW with its state in 32 or in 8 bits, or Adafactor.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    w <- w - lr weight_decay w - lr m' / (sqrt(v') + epsilon),   m', v' without their bias to 0

is AdamW (Loshchilov and Hutter 2019), whose m and v are twice the size of the weights. In 8 bits
(Dettmers et al. 2022) each block of 256 values shares one float32 scale, which leaves about half a
weight's size for both. Adafactor (Shazeer and Stern 2018) has no m, and of v the means over the
last two dimensions: next to nothing of a matrix, two thirds of a 3 x 3 convolution. Its updates
have a root mean square of at most lr.

`OneByOne` lets any of them step a single parameter: within the backward pass, where each gradient
is dropped as soon as it is used, and in float32, rounded at random to the bfloat16 of weights and
states, without a float32 copy of all of them:

    round(x) = the neighbour above x with probability (x - below) / (above - below), else below

whose mean is x. To the nearest, what moves a weight by less than half the gap to the next bfloat16
(2^-9 of it) is lost at every step.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from blackpoint.sampling.noise import derive_seed
from blackpoint.train.config.config import OptimizerConfig
from blackpoint.train.config.learning_rate import settled_rate

EIGHT_BIT_MIN_VALUES = 4096  # bitsandbytes keeps 32 bits for smaller tensors
EIGHT_BIT_BLOCK = 256
SCALAR_BYTES = 4


def build_optimizer(parameters: Iterable[Parameter], settings: OptimizerConfig) -> Optimizer:
    """Builds the library's optimizer."""
    options: dict[str, Any] = {
        "lr": settled_rate(settings),
        "weight_decay": settings.weight_decay,
    }
    return OPTIMIZERS[settings.name](parameters, settings, options)


def _moments(settings: OptimizerConfig) -> dict[str, Any]:
    return {"betas": (settings.beta1, settings.beta2), "eps": settings.epsilon}


def _adamw(parameters: Any, settings: OptimizerConfig, options: dict[str, Any]) -> Optimizer:
    """Fused, which needs no temporaries the size of the model."""
    return AdamW(parameters, fused=True, **_moments(settings), **options)


def _adamw_8bit(parameters: Any, settings: OptimizerConfig, options: dict[str, Any]) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit  # optional: the extra eight-bit

    return AdamW8bit(parameters, **_moments(settings), **options)


def _adafactor(parameters: Any, settings: OptimizerConfig, options: dict[str, Any]) -> Optimizer:
    """At the learning rate that is set. Torch's own multiplies it by the size of each tensor, which
    it reads from the device: a GPU would wait for it twice a tensor."""
    from transformers.optimization import Adafactor

    return Adafactor(parameters, scale_parameter=False, relative_step=False, **options)


OPTIMIZERS = {"adamw": _adamw, "adamw_8bit": _adamw_8bit, "adafactor": _adafactor}


class OneByOne(Optimizer):
    """Steps the parameters of a library's optimizer one by one, and has its groups and state.

    `rounding_seed` gives the integer that decides, with a parameter's number, how its bfloat16
    weights and states are rounded in this step; None leaves rounding to the library.
    """

    def __init__(self, library: Optimizer, rounding_seed: Callable[[], int] | None = None) -> None:
        # Not Optimizer.__init__, which would make groups and state of its own.
        self.library, self.rounding_seed = library, rounding_seed
        self.is_in_backward = False
        self._norms: dict[int, Tensor] = {}  # of the gradients of this step

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.library.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.library.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.library.defaults

    def state_dict(self) -> dict[str, Any]:
        return self.library.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.library.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.library.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        for number, (group, parameter) in enumerate(self._parameters()):
            if parameter.grad is not None:
                self._step_one(number, group, parameter)
        return loss

    def step_in_backward(self) -> None:
        """Steps each parameter in the backward pass from here on, and drops its gradient."""
        self.is_in_backward = True
        for number, (group, parameter) in enumerate(self._parameters()):
            group_number = next(n for n, g in enumerate(self.param_groups) if g is group)

            def hook(parameter: Tensor, number: int = number, group: int = group_number) -> None:
                assert parameter.grad is not None
                if group == 0:
                    self._norms[number] = parameter.grad.norm(dtype=torch.float32)
                # By its number: loading a checkpoint makes new groups.
                self._step_one(number, self.param_groups[group], parameter)
                parameter.grad = None

            parameter.register_post_accumulate_grad_hook(hook)

    def take_gradient_norm(self) -> Tensor:
        """Returns the norm of all gradients of the first group in the last backward pass."""
        norms, self._norms = self._norms, {}
        return torch.stack([norms[number] for number in sorted(norms)]).norm()

    def _parameters(self) -> list[tuple[dict[str, Any], Parameter]]:
        return [(group, parameter) for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def _step_one(self, number: int, group: dict[str, Any], parameter: Tensor) -> None:
        if self.rounding_seed is None or parameter.dtype != torch.bfloat16:
            return self._library_step(group, parameter)
        # A stand-in, for a parameter that changes its format loses the hooks of its gradient.
        weights = Parameter(parameter.float())
        weights.grad = None if parameter.grad is None else parameter.grad.float()
        state = self.state.pop(parameter, {})
        if state:
            self.state[weights] = {
                name: value.float() if _is(value, torch.bfloat16) else value
                for name, value in state.items()
            }
        self._library_step(group, weights)
        generator = torch.Generator(parameter.device)
        generator.manual_seed(derive_seed(self.rounding_seed(), number))
        parameter.copy_(rounded_at_random(weights, generator))
        # bitsandbytes names what it keeps as it is; torch would turn all else, but for scalars,
        # into the format of the weights when a checkpoint is loaded.
        kept = getattr(self.library, "non_castable_tensor_keys", ())
        self.state[parameter] = {
            name: rounded_at_random(value, generator)
            if name not in kept and _is(value, torch.float32) and value.ndim
            else value
            for name, value in self.state.pop(weights).items()
        }

    def _library_step(self, group: dict[str, Any], parameter: Tensor) -> None:
        groups = self.library.param_groups
        self.library.param_groups = [group | {"params": [parameter]}]
        try:
            self.library.step()
        finally:
            self.library.param_groups = groups


def _is(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype


def rounded_at_random(values: Tensor, generator: torch.Generator) -> Tensor:
    """Returns float32 `values` in bfloat16, rounded up or down so that each one's mean is itself.

    A bfloat16 is the upper half of a float32: what is added to the lower half, uniform in
    [0, 2^16), carries into the upper one with the right probability.
    """
    values = values.detach()
    noise = torch.randint(
        2**16, values.shape, generator=generator, dtype=torch.int32, device=values.device
    )
    bits = (values.view(torch.int32) + noise) & -(2**16)
    # Of what is not a number a carry could make one.
    return torch.where(values.isfinite(), bits.view(torch.float32), values).bfloat16()


def skip_unless_finite(optimizer: Optimizer, norm: Tensor) -> None:
    """Leaves the next step of `optimizer` out if `norm`, of its gradient, is not finite.

    It is decided on the device, for which the host does not wait. Fused AdamW knows such steps from
    loss scaling: weights, moments and number of steps stay as they are. Others see a gradient of 0.
    """
    is_bad = ~torch.isfinite(norm)
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(is_bad, 0)


def eight_bit_problem(device: torch.device) -> str | None:
    """Takes one 8-bit step on `device`; returns why it fails, or None."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ModuleNotFoundError:
        return "bitsandbytes is not installed"
    except Exception as error:  # it looks for the GPU's libraries while it is imported
        return f"bitsandbytes cannot be imported ({type(error).__name__}: {error})"
    weight = Parameter(torch.zeros(EIGHT_BIT_MIN_VALUES, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        AdamW8bit([weight], lr=1.0, weight_decay=0.0).step()
    except Exception as error:  # its kernels report a missing device in their own ways
        return f"its 8-bit step fails on {device.type} ({type(error).__name__}: {error})"
    moved = -weight.detach()
    if not torch.allclose(moved, torch.ones_like(moved), atol=0.05):  # the first step is lr * sign
        return f"its 8-bit step on {device.type} is wrong"
    return None


def state_bytes(settings: OptimizerConfig, parameter: Tensor) -> int:
    """Returns the bytes of the tensors that the optimizer keeps of a parameter, beside it."""
    if settings.name == "adafactor":
        if parameter.ndim < 2:
            return parameter.nbytes + SCALAR_BYTES
        rows, columns = parameter[..., 0].numel(), parameter[..., 0, :].numel()
        return parameter.itemsize * (rows + columns) + SCALAR_BYTES
    if settings.name == "adamw_8bit" and parameter.numel() >= EIGHT_BIT_MIN_VALUES:
        scales = math.ceil(parameter.numel() / EIGHT_BIT_BLOCK)
        return 2 * (parameter.numel() + 4 * scales)
    return 2 * parameter.nbytes + SCALAR_BYTES


def update_bytes(settings: OptimizerConfig, parameters: Sequence[Tensor]) -> int:
    """Returns the bytes that an update takes for its length, of one parameter after the other.

    Float32 copies of the largest bfloat16 parameter, its gradient and states, and of the bits that
    round them; transformers' Adafactor has an update beside each.
    """
    largest = max(p.numel() for p in parameters)
    copies = 2 if settings.name == "adafactor" else 0
    if settings.rounding == "stochastic" and parameters[0].dtype == torch.bfloat16:
        copies += 7 if settings.name == "adamw" else 5
    return 4 * copies * largest
