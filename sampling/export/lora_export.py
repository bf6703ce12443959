"""Writes the adapters of a LoRA run as files: one for diffusers, one for all other clients.

    pytorch_lora_weights.safetensors   diffusers' names, alpha / rank folded into up
    NAME.safetensors                   kohya's names and alpha, metadata (lora_card.py)
    scheduler_config.json              the process that the run was trained for
    README.md

Both are read back before the folder takes its name: peft's layers as in training, diffusers' loader
on the first and our merging of either give the same output of the UNet.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save
from torch import Tensor

from blackpoint.data.files.dotted import renamed, value_at
from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.data.files.yaml_text import read_yaml_file
from blackpoint.data.images.picture_size import PictureSize
from blackpoint.sampling.checkpoints.architecture import sample_size_of
from blackpoint.sampling.checkpoints.ldm_keys import unet_modules
from blackpoint.sampling.checkpoints.loading import convert_weights
from blackpoint.sampling.checkpoints.merged import check_bases
from blackpoint.sampling.checkpoints.resolve import last_checkpoint, read_lightning, resolve
from blackpoint.sampling.choices import Dtype, Weights
from blackpoint.sampling.export.clients import of_xl
from blackpoint.sampling.export.lora_card import LoraRun, kohya_metadata, lora_card, with_hashes
from blackpoint.sampling.export.model_card import RUN_KEYS
from blackpoint.sampling.export.placement import moved_into_place, require_empty
from blackpoint.sampling.export.single_file import modelspec
from blackpoint.sampling.lora.adapters import Lora, MergedWeights
from blackpoint.sampling.lora.files import DIFFUSERS, read_lora
from blackpoint.sampling.lora.keys import ADAPTER_METADATA, kohya_name, matched
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.process import Process

TOLERANCE = 1e-5
"""Largest difference of the UNet's outputs, relative to the largest value above 1."""
MOST_LATENT_SIZE, NUM_TOKENS, SEED = 16, 16, 0
UNET = "unet."


def export_lora(
    checkpoint: str | Path,
    output: str | Path,
    weights: Weights = "ema",
    verify: bool = True,
    dtype: Dtype = "float32",
) -> LoraRun:
    """Writes the adapters of a run directory or .ckpt to the folder `output`; returns their run.

    Raises UserError where `output` is taken, or `checkpoint` is of no LoRA run or of DoRA, and
    RunFailed where the files are not read as what was trained; `output` then does not exist.
    """
    output = Path(output)
    require_empty(output)
    run, model = _load(checkpoint, weights, output.name)
    run = replace(run, lora=_in_format(run.lora, getattr(torch, dtype)))
    with moved_into_place(output) as folder:
        content = save(diffusers_tensors(run.lora), diffusers_metadata(run.lora))
        (folder / DIFFUSERS).write_bytes(content)
        tensors = kohya_tensors(run.lora, model.unet)
        (folder / f"{output.name}.safetensors").write_bytes(
            with_hashes(tensors, kohya_metadata(run, output.name))
        )
        scheduler = json.dumps(run.process.to_diffusers(), indent=2) + "\n"
        (folder / "scheduler_config.json").write_text(scheduler, encoding="utf-8")
        (folder / "README.md").write_text(lora_card(run, output.name), encoding="utf-8")
        if verify:
            check_files(run.lora, model.unet, folder, output.name)
    return run


def _load(checkpoint: str | Path, weights: Weights, name: str) -> tuple[LoraRun, DiffusionModel]:
    """Returns the run of a checkpoint, and its base with the UNet's weights."""
    path = Path(checkpoint)
    run_dir = path if path.is_dir() else path.parent.parent
    newest = last_checkpoint(path) if path.is_dir() else path
    resolved = resolve(newest, weights) if newest and newest.suffix == ".ckpt" else None
    if resolved is None or resolved.lora is None or newest is None:
        raise UserError(
            f"checkpoint={checkpoint} is no run that trained low-rank adapters, nor a .ckpt of "
            "one, and format=lora writes what was trained as such; leave format out for the whole "
            "model"
        )
    if resolved.lora.is_dora:
        raise UserError(
            f"checkpoint={checkpoint} has DoRA adapters, and clients normalise their files in "
            "different ways (ComfyUI by the base's weights, A1111 over the other axis); leave "
            "format out for the merged model, which is right everywhere"
        )
    stored = read_lightning(newest)
    base = stored["blackpoint"]["base"]
    model = DiffusionModel.load(newest, weights=weights, with_unet=False)  # it would be merged
    check_bases(resolved, model.process)
    config = run_dir / "config.yaml"
    settings = read_yaml_file(config) if config.is_file() else {}
    values = {key: value_at(settings, key) for key in (*RUN_KEYS, "checkpoint")}
    assert resolved.base is not None
    pipeline = resolved.base.pipeline
    scheduler = resolved.base.scheduler_config or pipeline.scheduler(model.process.prediction_type)
    run = LoraRun(
        lora=resolved.lora,
        base=str(values.pop("checkpoint") or base),
        base_process=Process.of_checkpoint(base, scheduler, model.is_xl),
        process=model.process,
        spec=modelspec(model, name),
        step=stored.get("global_step"),
        settings={k: v for k, v in values.items() if v is not None and v != {}},
    )
    model.unet.load_state_dict(dict(resolved.base.weights("unet")), assign=True)
    convert_weights(model.unet, torch.float32)
    return run, model


def _in_format(lora: Lora, dtype: torch.dtype) -> Lora:
    """Returns the adapters as they are written."""
    modules = {
        name: replace(module, down=module.down.to(dtype), up=module.up.to(dtype))
        for name, module in lora.modules.items()
    }
    return replace(lora, modules=modules)


def diffusers_tensors(lora: Lora) -> dict[str, Tensor]:
    """Returns the tensors of diffusers' file; alpha / rank is in up."""
    tensors = {}
    for name, module in lora.modules.items():
        up = module.up.float() * (module.alpha / module.rank)
        tensors[f"{name}.lora_A.weight"] = module.down.contiguous()
        tensors[f"{name}.lora_B.weight"] = up.to(module.up.dtype).contiguous()
    return tensors


def diffusers_metadata(lora: Lora) -> dict[str, str]:
    """Returns the header of diffusers' file, by which peft makes the layers: alpha = rank."""
    import peft

    modules = lora.of("unet")
    ranks = {name: module.rank for name, module in modules.items()}
    rank = max(ranks.values())
    others = {f"^{name}": r for name, r in ranks.items() if r != rank}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(modules),
        rank_pattern=others,
        alpha_pattern=others,
    ).to_dict()
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    settings = {f"{UNET}{key}": value for key, value in plain.items() if _is_plain(value)}
    return {"format": "pt", ADAPTER_METADATA: json.dumps(settings, indent=2, sort_keys=True)}


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold it; what peft cannot write is its default."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def kohya_tensors(lora: Lora, unet: Any) -> dict[str, Tensor]:
    """Returns the tensors of kohya's file; SDXL's modules have LDM's names, as kohya trains it."""
    ldm: dict[str, str] = {}
    if of_xl(unet.config):
        ldm = renamed(lora.of("unet"), unet_modules(unet.config))
    tensors = {}
    for name, module in lora.modules.items():
        inner = name.removeprefix(UNET)
        key = kohya_name(f"{UNET}{ldm.get(inner, inner)}")
        tensors[f"{key}.lora_down.weight"] = module.down.contiguous()
        tensors[f"{key}.lora_up.weight"] = module.up.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(module.alpha, dtype=torch.float32)
    return tensors


def check_files(lora: Lora, unet: UNet2DConditionModel, folder: Path, name: str) -> None:
    """Raises RunFailed unless what is written acts on the UNet as peft's layers did in training.

    Uses `unet`, whose weights are the base's, up.
    """
    inputs = _inputs(unet)
    shapes = {"unet": {key: list(tensor.shape) for key, tensor in unet.state_dict().items()}}
    blocks = unet_modules(unet.config)
    kohya_file = folder / f"{name}.safetensors"
    files = (folder / DIFFUSERS, kohya_file)
    read = [matched(read_lora(file, file.name), shapes, blocks) for file in files]
    with torch.no_grad():
        expected = _with_peft(lora, unet, inputs)
        outputs = {"diffusers' load_lora_weights": _with_diffusers(unet, folder, inputs)}
        outputs[f"{kohya_file.name}, merged"] = _merged(read[1], unet, inputs)
    largest = expected.abs().max().item()
    # In another format alpha / rank times up is rounded: that share of the adapters' part.
    rounding = 0.0 if _dtype_of(lora) == torch.float32 else torch.finfo(_dtype_of(lora)).eps
    tolerance = TOLERANCE * max(1.0, largest) + rounding * largest
    failures = []
    for what, output in outputs.items():
        difference = (output - expected).abs().max().item()
        if not difference <= tolerance:
            failures.append(f"{what}: differs by {difference:.2g}, more than {tolerance:.2g}")
    for one in read:
        if wrong := _others(lora, one, max(rounding, TOLERANCE)):
            failures.append(f"{one.source}: {len(wrong)} adapters are others, such as {wrong[0]}")
    if failures:
        raise RunFailed(
            "the LoRA was not written: its files do not act on the UNet as in training.\n  "
            + "\n  ".join(failures)
        )


def _others(lora: Lora, read: Lora, tolerance: float) -> list[str]:
    """Lists the modules whose update is not the same in both, relative to its largest value."""
    wrong = sorted(lora.modules.keys() ^ read.modules.keys())
    for name in lora.modules.keys() & read.modules.keys():
        ours = lora.modules[name].delta(lora.modules[name].shape)
        theirs = read.modules[name].delta(lora.modules[name].shape)
        if not (ours - theirs).abs().max() <= tolerance * ours.abs().max():
            wrong.append(name)
    return wrong


def _dtype_of(lora: Lora) -> torch.dtype:
    return next(iter(lora.modules.values())).up.dtype


def _inputs(unet: UNet2DConditionModel) -> dict[str, Any]:
    """Draws what the UNet takes, for SDXL the pooled text and the sizes of a picture too."""
    generator = torch.Generator().manual_seed(SEED)
    size = sample_size_of(unet.config)
    side = min(MOST_LATENT_SIZE, *(size if isinstance(size, list | tuple) else [size]))
    x = torch.randn(1, int(unet.config.in_channels), side, side, generator=generator)
    text = torch.randn(1, NUM_TOKENS, int(unet.config.cross_attention_dim), generator=generator)
    inputs = {"sample": x, "timestep": torch.tensor([999]), "encoder_hidden_states": text}
    if not of_xl(unet.config):
        return inputs
    sizes = torch.tensor([PictureSize.whole(8 * side, 8 * side)])
    width = unet.config.projection_class_embeddings_input_dim
    width -= sizes.shape[1] * unet.config.addition_time_embed_dim
    pooled = torch.randn(1, width, generator=generator)
    return inputs | {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}


def _with_peft(lora: Lora, unet: UNet2DConditionModel, inputs: Any) -> Tensor:
    import peft

    modules = lora.of("unet")
    first = next(iter(modules.values()))
    config = peft.LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,  # type: ignore[arg-type]  # a whole number in name only
        target_modules=list(modules),
        rank_pattern={f"^{name}": m.rank for name, m in modules.items()},
        alpha_pattern={f"^{name}": m.alpha for name, m in modules.items()},
    )
    unet.add_adapter(config, "trained")
    state = {}
    for name, module in modules.items():
        state[f"{name}.lora_A.weight"] = module.down.float()
        state[f"{name}.lora_B.weight"] = module.up.float()
    peft.set_peft_model_state_dict(unet, state, "trained")
    output: Tensor = unet(**inputs).sample
    unet.unload_lora()
    return output


def _with_diffusers(unet: UNet2DConditionModel, folder: Path, inputs: Any) -> Tensor:
    """As load_lora_weights of the pipeline, without its other parts."""
    kind = StableDiffusionXLPipeline if of_xl(unet.config) else StableDiffusionPipeline
    state, alphas, metadata = kind.lora_state_dict(
        folder, weight_name=DIFFUSERS, local_files_only=True, return_lora_metadata=True
    )
    kind.load_lora_into_unet(state, alphas, unet, "file", metadata=metadata)
    output: Tensor = unet(**inputs).sample
    unet.unload_lora()
    return output


def _merged(lora: Lora, unet: UNet2DConditionModel, inputs: Any) -> Tensor:
    merged = MergedWeights("unet", unet.state_dict(), [(lora, 1.0)])
    for name in merged.changed:
        unet.load_state_dict({name: merged[name]}, strict=False)
    output: Tensor = unet(**inputs).sample
    return output
