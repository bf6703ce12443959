"""What LoRA files say of themselves: kohya's metadata, by which clients show and sort them, and a
README.md for people.

Clients read the architecture from the metadata and nothing else: none learns a prediction type or
zero terminal SNR from a LoRA file, so a LoRA that changes them is better merged into a whole model.
"""

import hashlib
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import save
from torch import Tensor

from blackpoint.sampling.lora.adapters import Lora
from blackpoint.sampling.process import Process

SIZE_BYTES = 8
"""Of the length of the header, at the start of a file."""
BASE_VERSIONS = {
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2-512": "sd_v2",
    "stable-diffusion-v2-768-v": "sd_v2_v",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
}
"""kohya's names of ModelSpec's architectures."""


@dataclass(frozen=True)
class LoraRun:
    """The run that adapters are of."""

    lora: Lora
    base: str
    """The checkpoint that it started from, as it is recorded."""
    base_process: Process
    process: Process
    spec: Mapping[str, str]
    """ModelSpec entries of the whole model, keys with `modelspec.` in front."""
    step: int | None
    settings: Mapping[str, Any]
    """Keys of the run's config and their values, those that are known."""

    @property
    def changes(self) -> list[str]:
        """Names what the LoRA changes that no file of one can say."""
        then, now = self.base_process, self.process
        changes = []
        if then.prediction_type != now.prediction_type:
            changes.append(f"prediction type {then.prediction_type} -> {now.prediction_type}")
        if then.schedule.is_zero_terminal_snr != now.schedule.is_zero_terminal_snr:
            kinds = {True: "zero", False: "non-zero"}
            before, after = (kinds[p.schedule.is_zero_terminal_snr] for p in (then, now))
            changes.append(f"{before} -> {after} terminal SNR")
        elif not then.schedule.is_close(now.schedule):
            changes.append("betas")
        return changes


def client_note(run: LoraRun) -> str:
    """Returns what users must know of a LoRA that changes the process; "" where it does not."""
    if not run.changes:
        return ""
    return (
        f"This LoRA changes {' and '.join(run.changes)} of its base. No client learns that from a "
        "LoRA file: whoever loads it on the base must set it by hand, and gets noise or gray "
        "images otherwise. Pass on the merged model instead: `blackpoint export checkpoint=... "
        "output=FOLDER` (format=merged)."
    )


def kohya_metadata(run: LoraRun, name: str) -> dict[str, str]:
    """Returns the metadata of the kohya file called `name`, but for hashes."""
    modules = run.lora.modules.values()
    convolved = [m for m in modules if m.down.ndim == 4 and m.down.shape[-1] > 1]
    arguments = {}
    if convolved:
        arguments = {"conv_dim": f"{convolved[0].rank}", "conv_alpha": f"{convolved[0].alpha:g}"}
    architecture = run.spec.get("modelspec.architecture", "")
    width, _, height = run.spec.get("modelspec.resolution", "").partition("x")
    batch_size, portions = map(run.settings.get, ("batch_size", "trainer.accumulate_grad_batches"))
    entries = {
        "ss_base_model_version": BASE_VERSIONS.get(architecture),
        "ss_v2": str("-v2-" in architecture),
        "ss_network_module": "networks.lora",
        "ss_network_dim": _one_of({module.rank for module in modules}),
        "ss_network_alpha": _one_of({module.alpha for module in modules}),
        "ss_network_args": json.dumps(arguments),
        "ss_output_name": name,
        "ss_sd_model_name": run.base.rstrip("/").rpartition("/")[2],
        "ss_resolution": f"({width}, {height})",
        "ss_zero_terminal_snr": str(run.process.schedule.is_zero_terminal_snr),
        "ss_steps": run.step,
        "ss_learning_rate": run.settings.get("optimizer.learning_rate"),
        "ss_total_batch_size": batch_size and batch_size * (portions or 1),
        "ss_seed": run.settings.get("seed"),
    }
    kohya = {key: str(value) for key, value in entries.items() if value is not None}
    hint = client_note(run)
    modelspec = {
        **run.spec,
        "modelspec.architecture": f"{architecture}/lora",
        **({"modelspec.usage_hint": hint} if hint else {}),
    }
    return kohya | modelspec


def with_hashes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Returns a safetensors file whose header has the SHA-256 of the bytes behind the header."""
    content = save(tensors, metadata)
    start = SIZE_BYTES + int.from_bytes(content[:SIZE_BYTES], "little")
    digest = hashlib.sha256(content[start:]).hexdigest()
    hashes = {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    return save(tensors, metadata | hashes)


def lora_card(run: LoraRun, name: str) -> str:
    """Returns README.md of a folder of LoRA files."""
    lora, process = run.lora, run.process
    ranks = _one_of({module.rank for module in lora.modules.values()})
    alphas = _one_of({module.alpha for module in lora.modules.values()})
    snr = "zero" if process.schedule.is_zero_terminal_snr else "not zero"
    rows = {
        "base": run.base,
        "adapters": f"{len(lora.modules)} modules, rank {ranks}, alpha {alphas}",
        "prediction type": process.prediction_type,
        "terminal SNR": snr,
        "timestep spacing": process.timestep_spacing,
    }
    rows |= {key: f"`{value}`" for key, value in run.settings.items()}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    note = client_note(run)
    scheduler = process.to_diffusers()["_class_name"]
    rescale = ", guidance_rescale=0.7" if process.schedule.is_zero_terminal_snr else ""
    is_xl = "-xl-" in run.spec.get("modelspec.architecture", "")
    pipeline = f"StableDiffusion{'XL' * is_xl}Pipeline"
    checker = "" if is_xl else ", safety_checker=None"
    warning = f"**{textwrap.fill(note, 96, break_on_hyphens=False)}**\n\n" if note else ""
    return f"""# A LoRA for Stable Diffusion, exported by blackpoint

{warning}| | |
|---|---|
{table}

| file | for |
|---|---|
| `pytorch_lora_weights.safetensors` | diffusers (`load_lora_weights`), and what reads its names |
| `{name}.safetensors` | ComfyUI, Forge, reForge, A1111, kohya |

Both hold the same adapters. The first has the factor alpha / rank in its up matrices and says alpha
= rank, so that readers that know no alpha are right; the second has the alpha of the training.
ComfyUI drops the attention of a file in diffusers' names, with no more than lines in its log.

```python
import torch
from diffusers import {scheduler}, {pipeline}

pipe = {pipeline}.from_pretrained("{run.base}"{checker})
pipe.load_lora_weights("path/to/this/folder")
pipe.scheduler = {scheduler}.from_pretrained("path/to/this/folder")
generator = torch.Generator("cpu").manual_seed(0)
image = pipe("a prompt", generator=generator, num_inference_steps=25{rescale}).images[0]
```

`scheduler_config.json`, which the scheduler is read from, has the whole process that the LoRA was
trained for: prediction type, betas and timestep spacing.
"""


def _one_of(values: set[Any]) -> str:
    return f"{values.pop():g}" if len(values) == 1 else "Dynamic"
