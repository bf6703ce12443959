"""Low-rank adapters of the UNet's layers, the one place in training that knows of them.

    W' = W + (alpha / r) B A             Hu et al. 2021: W (m x n) frozen, B (m x r), A (r x n)
    W' = m (W + (alpha / r) B A) / ||.||  Liu et al. 2024 (DoRA): the norm is of each row

B starts at 0, so that training starts at the base. peft's layers compute it, within the UNet. What
is trained is their parameters alone, so they are all that the LightningModule owns: as a tree of
the layers' names, which is saved, averaged, optimised and shared among processes like a UNet. In
checkpoints the keys are peft's without the adapter's name:

    unet.<layer>.lora_A.weight, unet.<layer>.lora_B.weight, unet.<layer>.lora_magnitude_vector

The frozen weights are held in the number format that the UNet computes in. Autocast would turn
those of linear layers and convolutions into it at every use: the result is the same, to the bit.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn import Parameter

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.noise import derive_seed
from blackpoint.train.config.lora_config import LoraConfig
from blackpoint.train.dropout import SampleDropout, SampleSeeds

ADAPTER = "default"
"""peft's name of the adapter that it adds."""
Layer = nn.Linear | nn.Conv2d


def trained_part(
    unet: UNet2DConditionModel,
    lora: LoraConfig,
    seed: int,
    dtype: torch.dtype,
    dropout_seeds: SampleSeeds,
) -> nn.Module:
    """Returns the module whose parameters are trained: the UNet, or the adapters that it is given.

    `seed` decides the adapters' start; `dtype` is the format that the UNet computes in.
    """
    if lora.rank is None:
        return unet.requires_grad_(True)
    layers = target_layers(unet, lora)
    unet.requires_grad_(False)
    _add_adapters(unet, lora, list(layers))
    adapters = {
        _saved_name(name): parameter
        for name, parameter in unet.named_parameters()
        if parameter.requires_grad
    }
    _initialise(adapters, seed)
    if lora.dropout:
        for name in layers:
            drop = SampleDropout(lora.dropout, f"lora {name}", dropout_seeds)
            unet.get_submodule(name).lora_dropout[ADAPTER] = drop
    _hold(unet, dtype)
    return tree_of(adapters)


def target_layers(unet: UNet2DConditionModel, lora: LoraConfig) -> dict[str, Layer]:
    """Returns the layers that get an adapter, by name.

    Raises UserError for a target without a layer, and a rank above the width of one.
    """
    assert lora.rank is not None
    modules = dict(unet.named_modules())
    layers: dict[str, Layer] = {}
    for target in lora.all_targets:
        names = [name for name in modules if f".{name}".endswith(f".{target}") and target]
        fitting = {name: layer for name in names if isinstance(layer := modules[name], Layer)}
        if len(names) > len(fitting) or (not names and target in lora.targets):
            others = next((type(modules[name]).__name__ for name in names), "nothing")
            raise UserError(
                f"lora.targets holds {target!r}, which is {others} in this UNet; name linear "
                "layers or convolutions of it, such as to_q, to_k, to_v, to_out.0"
            )
        layers |= fitting
    if not layers:
        raise UserError(
            "lora.convolutions=true, but this UNet has none of those layers; set lora.targets"
        )
    for name, layer in layers.items():
        if lora.rank > (width := _width(layer)):
            raise UserError(
                f"lora.rank={lora.rank}: must be at most the width of every layer, and {name} has "
                f"{width}; lower lora.rank, or leave that layer out of lora.targets"
            )
    return layers


def check_layers(unet: UNet2DConditionModel, lora: LoraConfig) -> None:
    """Raises UserError for adapters that this UNet can't be given."""
    if lora.rank is not None:
        target_layers(unet, lora)


def _width(layer: Layer) -> int:
    if isinstance(layer, nn.Linear):
        return min(layer.in_features, layer.out_features)
    return min(layer.in_channels, layer.out_channels)


def _add_adapters(unet: UNet2DConditionModel, lora: LoraConfig, layers: list[str]) -> None:
    """Puts peft's layers into the UNet; draws nothing from torch's own generator."""
    import peft  # takes a second, which a run without adapters need not wait

    assert lora.rank is not None
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale * lora.rank,  # type: ignore[arg-type]  # a whole number in name only
        use_dora=lora.dora,
        target_modules=layers,
    )
    with torch.random.fork_rng(devices=[]):
        unet.add_adapter(config, ADAPTER)


def _saved_name(name: str) -> str:
    """Returns a parameter's name without that of the adapter."""
    magnitude = ".lora_magnitude_vector"
    return name.replace(f"{magnitude}.{ADAPTER}.weight", magnitude).replace(f".{ADAPTER}.", ".")


@torch.no_grad()
def _initialise(adapters: Mapping[str, Parameter], seed: int) -> None:
    """Draws every A as torch draws a layer's weight, from a generator of its own; every B is 0."""
    for name, parameter in adapters.items():
        if name.endswith(".lora_A.weight"):
            generator = torch.Generator("cpu").manual_seed(derive_seed(seed, "lora", name))
            drawn = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            parameter.copy_(drawn)


def _hold(unet: nn.Module, dtype: torch.dtype) -> None:
    """Holds the frozen weights of linear layers and convolutions in `dtype`."""
    for module in unet.modules():
        if isinstance(module, Layer):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def tree_of(parameters: Mapping[str, Parameter]) -> nn.Module:
    """Returns a module that holds those very parameters, by their dotted names."""
    root = nn.Module()
    for name, parameter in parameters.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, parameter)
    return root


def checkpoint_record(lora: LoraConfig, base_digest: str) -> dict[str, Any]:
    """Returns what a checkpoint says of its adapters, beside base and process; {} without any.

    `base_digest` is that of the base's UNet (sampling/checkpoints/fingerprint.py).
    """
    if lora.rank is None:
        return {}
    settings = {
        "rank": lora.rank,
        "alpha": lora.scale * lora.rank,
        "dora": lora.dora,
        "targets": list(lora.all_targets),
    }
    return {"lora": settings, "base_digest": base_digest}


def check_base(checkpoint: Path, name: str, digest: str) -> None:
    """Raises UserError where a checkpoint's adapters are of another UNet than that of `name`."""
    if checkpoint.is_dir():  # sharded: of a whole UNet
        return
    record = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["blackpoint"]
    if record.get("base_digest", digest) != digest:
        raise UserError(
            f"{checkpoint} holds adapters of another base: its UNet has the digest "
            f"{record['base_digest']:.12}, and that of checkpoint={name} has {digest:.12}; put "
            "back the base that the run began with, or choose another run_dir"
        )
