"""The names of adapters in files: as diffusers, peft, kohya and LyCORIS spell them.

| writer | module | down, up | alpha |
|---|---|---|---|
| diffusers | unet.down_blocks.0... | .lora.down, .lora.up; .lora_A, .lora_B | header |
| diffusers to 0.16 | ....attn1.processor.to_q_lora | .down, .up | .alpha, or none |
| peft | base_model.model.down_blocks.0... | .lora_A, .lora_B | adapter_config.json |
| kohya | lora_unet_down_blocks_0_... | .lora_down, .lora_up | .alpha |
| kohya, SDXL | lora_unet_input_blocks_1_1_... | .lora_down, .lora_up | .alpha |

kohya writes `_` for the dots between modules, which have that in their names too, so a name is
looked up among those of the model; every spelling goes through that table. An alpha that is nowhere
is the rank.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from blackpoint.data.files.dotted import renamed
from blackpoint.data.files.errors import UserError
from blackpoint.sampling.lora.adapters import Lora, LoraModule, Shapes, is_finite

ADAPTER_METADATA = "lora_adapter_metadata"
"""Key of diffusers' header: peft's config as JSON, its keys with the part in front."""
DOWN, UP, ALPHA, MAGNITUDE = "down", "up", "alpha", "magnitude"
ROLES = {
    DOWN: r"\.(?:lora_A(?:\.\w+)?|lora_down|lora\.down|lora_linear_layer\.down)\.weight",
    UP: r"\.(?:lora_B(?:\.\w+)?|lora_up|lora\.up|lora_linear_layer\.up)\.weight",
    ALPHA: r"\.alpha",
    MAGNITUDE: r"\.(?:dora_scale|lora_magnitude_vector(?:\.\w+){0,2})",
}
SUFFIXES = {role: re.compile(rf"(.+?){pattern}") for role, pattern in ROLES.items()}
OF_PROCESSORS = re.compile(r"(.+?)\.to_(q|k|v|out)_lora\.(down|up)\.weight")
TEXT_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
PREFIXES = {
    "base_model.model.": "",
    "lora_unet_": "unet.",
    "lora_te1_": "text_encoder.",
    "lora_te2_": "text_encoder_2.",
    "lora_te_": "text_encoder.",
    "lycoris_": "unet.",
    "diffusion_model.": "unet.",
    "model.diffusion_model.": "unet.",
}
OTHER_KINDS = {
    "LoHa": ("hada_w1", "hada_w2", "hada_t"),
    "LoKr": ("lokr_w", "lokr_t"),
    "OFT or BOFT": ("oft_blocks", "oft_diag", "oft_r", "boft_", ".rescale"),
    "GLoRA": (".a1.weight", ".b1.weight", ".a2.weight", ".b2.weight"),
    "IA3": (".on_input", "ia3_l"),
    "VeRA": ("vera_lambda",),
    "LoRA with a Tucker decomposition": ("lora_mid", "lora_cp"),
    "LoRA of embeddings": ("lora_embedding",),
    "LoRA with a bias": ("lora_B.bias", "lora_up.bias", "lora.up.bias"),
    "full difference": (".diff_b", ".diff", ".set_weight", ".w_norm", ".b_norm"),
    "textual inversion": ("bundle_emb", "emb_params", "string_to_param"),
}
"""Kinds of adapters that are none of W + B A, by pieces of their keys."""
OTHER_MODELS = {
    "SDXL": ("text_encoder_2.",),
    "Flux, SD3 or another transformer": (
        "transformer.",
        "lora_transformer_",
        "unet.double_blocks",
        "unet.single_blocks",
        "unet.joint_blocks",
        "lora_te3_",
        "text_encoder_3.",
    ),
    "a video model": ("unet.blocks", "motion_modules", "temporal_"),
}
WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
"""Architectures by the width of their context, which attn2.to_k takes in."""
MOST_NAMED = 4


def read_modules(state: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> Lora:
    """Returns the adapters of a file under names as `PREFIXES` makes them, of no model yet.

    `metadata` is its header; peft's adapter_config.json is in there under `lora_adapter_metadata`.
    Raises UserError, which calls the file `source` (lora=FILE), for other kinds and for halves.
    """
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in state.items():
        role, module = _role_of(key)
        if role is None:
            unknown.append(key)
        else:
            found.setdefault(module, {})[role] = tensor
    if unknown:
        raise UserError(_not_lora(unknown, len(state), source))
    settings = _adapter_settings(metadata)
    modules = dict[str, LoraModule]()
    for name, tensors in found.items():
        if DOWN not in tensors or UP not in tensors:
            raise UserError(
                f"{source}: {name} has {' and '.join(sorted(tensors))} alone; a LoRA has down "
                "and up of each module: the file is damaged"
            )
        modules[name] = _module(name, tensors, settings, source)
        if not is_finite(modules[name]):
            raise UserError(f"{source}: {name} has values that are not finite; it is damaged")
    if not modules:
        raise UserError(f"{source} holds no adapters; give the file of a LoRA")
    return Lora(modules, source, dict(metadata))


def matched(lora: Lora, shapes: Mapping[str, Shapes], ldm_blocks: Mapping[str, str]) -> Lora:
    """Returns the adapters under the names of a model's modules.

    `shapes` has the shapes of its weights by part and published name, `ldm_blocks` what single
    files call the blocks of its UNet. Raises UserError with the first modules that the model has
    not, or that have another shape there.
    """
    table = spellings(shapes, ldm_blocks)
    modules, faults = dict[str, LoraModule](), list[str]()
    for name, module in lora.modules.items():
        known = table.get(_flat(name))
        if known is None:
            is_one_of_two = "text_encoder_2" in shapes and _flat(f"text_encoder.{name}") in table
            why = "of which text encoder? text_encoder. or text_encoder_2. belongs in front"
            faults.append(f"{name} ({why if is_one_of_two else 'no such module'})")
            continue
        part, _, inner = known.partition(".")
        if fault := module.fault(shapes[part][f"{inner}.weight"]):
            faults.append(f"{name} ({fault})")
        elif known in modules:
            faults.append(f"{name} (there under another name, too)")
        else:
            modules[known] = module
    if faults:
        raise UserError(_misfit(lora, faults, "text_encoder_2" in shapes))
    return Lora(modules, lora.source, lora.metadata)


def spellings(shapes: Mapping[str, Shapes], ldm_blocks: Mapping[str, str]) -> dict[str, str]:
    """Maps the names that files may call a module by, with `_` for dots, to its name here."""
    table = {}
    for part, weights in shapes.items():
        names = [key.removesuffix(".weight") for key, shape in weights.items() if len(shape) > 1]
        for name in names:
            # transformers 5 has no text_model in the modules of CLIPTextModel
            for spelled in (name, name.removeprefix("text_model.")):
                table[_flat(f"{part}.{spelled}")] = f"{part}.{name}"
                # of a part alone, without its name in front, as peft saves them; two text encoders
                # have the same names
                if "text_encoder_2" not in shapes or part == "unet":
                    table[_flat(spelled)] = f"{part}.{name}"
        if part == "unet":
            ldm = renamed(names, ldm_blocks)
            table |= {_flat(f"unet.{ldm[name]}"): f"unet.{name}" for name in names if name in ldm}
    return table


def kohya_name(module: str) -> str:
    """Returns kohya's name of a module of SD 1.x or 2.x, which has a part in front."""
    part, _, name = module.partition(".")
    return f"lora_{'te' if part == 'text_encoder' else part}_{name.replace('.', '_')}"


def _role_of(key: str) -> tuple[str | None, str]:
    """Returns the tensor's part in an adapter, and the name of its module."""
    for prefix, new in PREFIXES.items():
        key = new + key[len(prefix) :] if key.startswith(prefix) else key
    key = key.replace(".processor.", ".")
    if match := OF_PROCESSORS.fullmatch(key):
        block, kind, role = match.groups()
        inner = f"to_{kind}" if kind != "out" else "to_out.0"
        if block.endswith("self_attn"):
            inner = TEXT_PROJECTIONS[kind]
        return role, f"{block}.{inner}"
    for role, pattern in SUFFIXES.items():
        if match := pattern.fullmatch(key):
            return role, match[1]
    return None, key


def _adapter_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns peft's settings in a header; {} where there are none that can be read."""
    try:
        settings = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _module(
    name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], source: str
) -> LoraModule:
    down, up = tensors[DOWN], tensors[UP]
    for tensor in (down, up):
        if tensor.ndim < 2 or not tensor.is_floating_point() or not tensor.numel():
            raise UserError(
                f"{source}: {name} has a tensor of {list(tensor.shape)} in {tensor.dtype}; "
                "down and up are matrices of numbers with a fraction"
            )
    magnitude = tensors.get(MAGNITUDE)
    if magnitude is not None and magnitude.numel() != up.shape[0]:
        raise UserError(
            f"{source}: {name} is a DoRA normalised over its {magnitude.numel()} inputs, as "
            f"LyCORIS can write it; DoRA of peft, over its {up.shape[0]} outputs, can be merged"
        )
    rank = down.shape[0]
    alpha = tensors[ALPHA].float().reshape(-1) if ALPHA in tensors else None
    if alpha is not None:
        if alpha.numel() != 1:
            raise UserError(f"{source}: alpha of {name} is {alpha.numel()} numbers, not one")
        return LoraModule(down, up, float(alpha), magnitude)
    return LoraModule(down, up, _alpha_of(name, rank, settings), magnitude)


def _alpha_of(name: str, rank: int, settings: Mapping[str, Any]) -> float:
    """Returns alpha by peft's settings: alpha_pattern first, then lora_alpha; else the rank."""
    part, _, inner = name.partition(".")
    prefix = f"{part}." if any(key.startswith(f"{part}.") for key in settings) else ""
    inner = inner if prefix else name
    alpha = settings.get(f"{prefix}lora_alpha", rank)
    patterns = settings.get(f"{prefix}alpha_pattern") or {}
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", inner):
            alpha = value
            break
    if not isinstance(alpha, int | float):
        return float(rank)
    rank_stabilized = settings.get(f"{prefix}use_rslora")
    return float(alpha) * (math.sqrt(rank) if rank_stabilized else 1.0)


def _not_lora(unknown: list[str], total: int, source: str) -> str:
    for kind, pieces in OTHER_KINDS.items():
        if any(piece in key for key in unknown for piece in pieces):
            return (
                f"{source} is of the kind {kind}, as {unknown[0]} tells; only LoRA and DoRA "
                "(down and up matrices) can be merged: merge it with the tool that made it"
            )
    if len(unknown) == total:
        return (
            f"{source} is no LoRA: its keys, such as {unknown[0]}, have no down and up; give "
            "the file of a LoRA, and whole models as checkpoint"
        )
    return (
        f"{source}: {len(unknown)} of {total} keys are none of a LoRA's: {_listed(unknown)}; "
        "nothing of it was used"
    )


def _misfit(lora: Lora, faults: list[str], into_xl: bool) -> str:
    count, total = len(faults), len(lora.modules)
    what = f"{lora.source} does not fit the checkpoint: {count} of {total} modules"
    made_for = _made_for(lora)
    is_here = into_xl and made_for == WIDTHS[2048]
    made = f"; it looks made for {made_for}" if made_for and not is_here else ""
    return (
        f"{what}, such as {_listed(faults)}{made}; give a LoRA of the checkpoint's architecture, "
        "or the checkpoint that it belongs to"
    )


def _made_for(lora: Lora) -> str:
    for model, prefixes in OTHER_MODELS.items():
        if any(name.startswith(prefixes) for name in lora.modules):
            return model
    for name, module in lora.modules.items():
        if _flat(name).endswith("attn2_to_k"):
            return WIDTHS.get(module.down.shape[1], "")
    return ""


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _flat(name: str) -> str:
    return name.replace(".", "_")
