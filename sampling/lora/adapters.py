"""Low-rank adapters (LoRA, Hu et al. 2021) and their merging into the weights that they adapt.

    W' = W + s B A,                          s = scale alpha / r
    W' = m / ||W + s B A|| (W + s B A)       DoRA (Liu et al. 2024); the norm is of a row of outputs

A is `down`, (r, in) or (r, in, h, w) of a convolution, B is `up`, (out, r) or (out, r, 1, 1). The
sum is in float32 and is cast once. Modules have diffusers' and transformers' published names with
their part in front: `unet.down_blocks.0.attentions.0.proj_in`,
`text_encoder.text_model.encoder.layers.0.self_attn.q_proj`. Names in files are in keys.py.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blackpoint.data.files.errors import UserError

PARTS = ("unet", "text_encoder", "text_encoder_2")
"""Parts of a pipeline that adapters can be of."""
WEIGHT = ".weight"
DIGEST_BYTES = 16


@dataclass(frozen=True)
class LoraModule:
    """The adapter of one linear layer or convolution; tensors in whatever format they are kept."""

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    """DoRA: the norm that each row of the merged weight has, (out,) and any sides of 1."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a weight that it adapts, without sides of 1 that down does not have."""
        return (self.up.shape[0], *self.down.shape[1:])

    def fault(self, shape: Sequence[int]) -> str | None:
        """Returns the reason why it can't adapt a weight of that shape; None where it can."""
        out, rank = shape[0], self.rank
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        if _bare(down[1:]) != _bare(shape[1:]) or _bare(up) != _bare((out, up[1] if up[1:] else 1)):
            return f"down {list(down)}, up {list(up)}, for a weight of {list(shape)}"
        if up[1:2] != (rank,):
            return f"down {list(down)} has rank {rank}, up {list(up)} another"
        size = None if self.magnitude is None else self.magnitude.numel()
        if size not in (None, out):
            return f"a magnitude of {size} values for {out} outputs"
        return None

    def delta(self, shape: Sequence[int]) -> Tensor:
        """Returns alpha / r B A in float32, of a weight's shape."""
        rank = self.rank
        up, down = self.up.float().reshape(-1, rank), self.down.float().reshape(rank, -1)
        return (up @ down).reshape(tuple(shape)) * (self.alpha / rank)

    def merged(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        """Returns the adapted weight in float32; `scale` multiplies alpha / r, as in diffusers."""
        result = self.delta(weight.shape).to(weight.device).mul_(scale).add_(weight.float())
        if self.magnitude is None:
            return result
        norm = torch.linalg.vector_norm(result.flatten(1), dim=1)
        factor = self.magnitude.float().flatten().to(norm) / norm
        return result * factor.reshape(-1, *[1] * (weight.ndim - 1))


@dataclass(frozen=True)
class Lora:
    """Adapters of the modules of a model, by name with the part in front."""

    modules: dict[str, LoraModule]
    source: str = ""
    """The key and value that the user named them by: lora=FILE."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Of the file's header."""

    def of(self, part: str) -> dict[str, LoraModule]:
        """Returns the adapters of one part, by their names in it."""
        prefix = f"{part}."
        named = {name: module for name, module in self.modules.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): module for name, module in named.items()}

    @property
    def parts(self) -> list[str]:
        """The parts that it adapts."""
        return [part for part in PARTS if any(name.startswith(f"{part}.") for name in self.modules)]

    @property
    def is_dora(self) -> bool:
        return any(module.magnitude is not None for module in self.modules.values())

    def digest(self) -> str:
        """Returns a digest of what it does: names, factors and alphas, whatever the spelling."""
        whole = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for name, module in sorted(self.modules.items()):
            whole.update(f"{name} {module.alpha / module.rank:.8g}".encode())
            for tensor in (module.down, module.up, module.magnitude):
                if tensor is not None:
                    whole.update(tensor.float().contiguous().numpy().tobytes())
        return whole.hexdigest()


Shapes = dict[str, list[int]]
Applied = tuple[Lora, float]
"""Adapters and the scale that they are merged with."""


class MergedWeights(Mapping[str, Tensor]):
    """The weights of a part with adapters merged in, each computed when it is asked for.

    Names are those of `weights`, of a text encoder the published ones; what no adapter changes is
    passed on as it is, the rest is float32. Several adapters of a module are merged one after
    another. Raises UserError for adapters of a module that is not there, or has another shape.
    """

    def __init__(self, part: str, weights: Mapping[str, Tensor], loras: Sequence[Applied]) -> None:
        self._weights = weights
        shapes = shapes_of(weights)
        self._adapters: dict[str, list[tuple[LoraModule, float]]] = {}
        for lora, scale in loras:
            faults = []
            for name, module in lora.of(part).items():
                key = name + WEIGHT
                fault = module.fault(shapes[key]) if key in shapes else "no such module"
                if fault:
                    faults.append(f"{part}.{name} ({fault})")
                else:
                    self._adapters.setdefault(key, []).append((module, scale))
            if faults:
                raise UserError(
                    f"{lora.source}: {len(faults)} adapters do not fit the model, such as "
                    f"{faults[0]}; give those of a model of its architecture"
                )

    @property
    def changed(self) -> list[str]:
        """Names of the weights that differ from the model's own."""
        return list(self._adapters)

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        for module, scale in self._adapters.get(name, ()):
            weight = module.merged(weight, scale)
        return weight

    def shapes(self) -> Shapes:
        """Returns the shapes by name; merges nothing."""
        return shapes_of(self._weights)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def shapes_of(weights: Mapping[str, Tensor]) -> Shapes:
    """Returns the shapes of weights by name, without reading or merging those that know them."""
    shapes: Shapes | None = weights.shapes() if hasattr(weights, "shapes") else None
    return shapes or {name: list(tensor.shape) for name, tensor in weights.items()}


def lora_of_checkpoint(state: Mapping[str, Tensor], record: Mapping[str, Any], source: str) -> Lora:
    """Returns the adapters in the state dict of a .ckpt of a LoRA run; `record` is its `lora`.

    Keys are `unet.MODULE.lora_A.weight`, `.lora_B.weight` and, of DoRA, `.lora_magnitude_vector`.
    """
    alpha, modules = float(record["alpha"]), dict[str, LoraModule]()
    down_end, up_end = ".lora_A.weight", ".lora_B.weight"
    for key, down in state.items():
        if key.endswith(down_end):
            name = key.removesuffix(down_end)
            if name + up_end not in state:
                raise UserError(f"{source}: {name}{up_end} is missing; it is damaged")
            ends = (".lora_magnitude_vector.weight", ".lora_magnitude_vector")
            magnitude = next((state[name + end] for end in ends if name + end in state), None)
            modules[name] = LoraModule(down, state[name + up_end], alpha, magnitude)
    if not modules:
        raise UserError(f"{source} is of a LoRA run and holds no adapters; it is damaged")
    return Lora(modules, source)


def is_finite(module: LoraModule) -> bool:
    """Whether all that is merged is finite."""
    tensors = [t for t in (module.down, module.up, module.magnitude) if t is not None]
    return math.isfinite(module.alpha) and all(
        bool(torch.isfinite(tensor.float()).all()) for tensor in tensors
    )


def _bare(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns a shape without the sides of 1 at its end: a 1x1 convolution is a linear layer."""
    shape = tuple(shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
