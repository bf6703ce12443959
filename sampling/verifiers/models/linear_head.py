"""The heads of reward models: linear layers one after the other, from features to one score.

Dropout is off and nothing else stands between the layers of LAION's and ImageReward's heads, so
their files hold all that there is to know: weights and biases, in the order of their numbers.
"""

import re

from torch import Tensor, nn


def linear_chain(state: dict[str, Tensor]) -> nn.Sequential:
    """Returns the layers of a state dict such as layers.0.weight, layers.0.bias, layers.2.weight...

    In float32. Raises ValueError unless each layer takes what the one before gives, the last gives
    one number, and nothing is left over.
    """
    names = [name.removesuffix("weight") for name in state if name.endswith("weight")]
    names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    layers: list[nn.Linear] = []
    for name in names:
        weight, bias = state[f"{name}weight"], state.get(f"{name}bias")
        if weight.ndim != 2 or bias is None or bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}weight {tuple(weight.shape)} is not of a linear layer")
        if layers and weight.shape[1] != layers[-1].out_features:
            raise ValueError(f"{name}weight does not take {layers[-1].out_features} numbers")
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    if not layers or layers[-1].out_features != 1 or len(state) != 2 * len(layers):
        raise ValueError("it is not a chain of linear layers to one number")
    return nn.Sequential(*layers)
