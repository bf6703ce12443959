"""The README.md of an exported model: its process, how to load it, the right way to sample it.

A function of the process and the architecture: each statement appears exactly where it is true.
"""

import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blackpoint.data.files.dotted import value_at
from blackpoint.data.files.yaml_text import read_yaml_file
from blackpoint.sampling.export.client_schedulers import scheduler_facts
from blackpoint.sampling.export.clients import UNKNOWN, Architecture, client_facts
from blackpoint.sampling.pixels.folder import PixelForm
from blackpoint.sampling.process import Process

RUN_KEYS = (
    "seed",
    "batch_size",
    "trainer.accumulate_grad_batches",
    "data.shards",
    "data.mixture",
    "loss.prediction_type",
    "lora.rank",
    "lora.alpha",
    "optimizer.learning_rate",
    "ema.decay",
    "trainer.max_steps",
    "trainer.precision",
)


def model_card(
    process: Process,
    weights: str,
    checkpoint: str,
    run_dir: Path | None = None,
    pixels: PixelForm | None = None,
    architecture: Architecture = UNKNOWN,
    merged: Sequence[str] = (),
) -> str:
    """Returns the card as Markdown, with YAML front matter that hubs read.

    The base that it names is what the run directory's config started from, else `checkpoint`;
    `merged` are LoRA files in it, with their scales.
    """
    base = checkpoint
    if run_dir is not None:
        base = read_yaml_file(run_dir / "config.yaml").get("checkpoint") or base
    title = f"Stable Diffusion{' XL' * architecture.is_xl}"
    title = "A pixel-space model" if pixels else title
    parts = [_front_matter(base, pixels), _summary(title, process, weights, base, merged)]
    parts.append(_pixel_usage(pixels) if pixels else _usage(process, architecture.is_xl))
    parts.append(_settings(process))
    parts.append(_section("Schedulers of diffusers", scheduler_facts(process)))
    parts.append(_section("ComfyUI, A1111, Forge", client_facts(process, architecture)))
    if run_dir is not None:
        parts.append(_training(run_dir))
    return "\n".join(part for part in parts if part)


def _front_matter(base: str, pixels: PixelForm | None) -> str:
    knows_text = pixels is None or pixels.has_text
    task = "text-to-image" if knows_text else "unconditional-image-generation"
    lines = ["library_name: diffusers", f"pipeline_tag: {task}"]
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", base) and not Path(base).exists():
        lines.append(f"base_model: {base}")
    lines += [] if pixels else ["tags: [stable-diffusion]"]
    return "\n".join(["---", *lines, "---", ""])


def _summary(
    title: str, process: Process, weights: str, base: str, merged: Sequence[str] = ()
) -> str:
    schedule = process.schedule
    ending = (
        "zero terminal SNR (Lin et al. 2023): it can generate true black and true white"
        if schedule.is_zero_terminal_snr
        else f"terminal SNR {schedule.snr[-1].item():.3g}, not zero"
    )
    rows = {
        "prediction type": process.prediction_type,
        "noise schedule": f"{schedule.num_steps} steps, {ending}",
        "timestep spacing": process.timestep_spacing,
        "weights": "exponential moving average" if weights == "ema" else "raw (no averaging)",
        "base": base,
    }
    if merged:
        rows["LoRA merged in"] = ", ".join(merged)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"# {title}, exported by blackpoint\n\n| | |\n|---|---|\n{table}\n"


def _usage(process: Process, is_xl: bool) -> str:
    rescale = ", guidance_rescale=0.7" if process.schedule.is_zero_terminal_snr else ""
    kind, settings = ("XL", "") if is_xl else ("", ", safety_checker=None")
    empty = """
An empty negative prompt is the encoded text "", as in training (`force_zeros_for_empty_prompt` is
false in `model_index.json`) and in ComfyUI. A1111 takes zeros where the negative prompt is empty.
"""
    return f"""## Use

```python
import torch
from diffusers import StableDiffusion{kind}Pipeline

pipe = StableDiffusion{kind}Pipeline.from_pretrained("path/to/this/folder"{settings})
generator = torch.Generator("cpu").manual_seed(0)
image = pipe("a prompt", generator=generator, num_inference_steps=25{rescale}).images[0]
```
{empty if is_xl else ""}"""


def _pixel_usage(pixels: PixelForm) -> str:
    prompt = "a prompt" if pixels.has_text else next(iter(pixels.classes), "")
    known = "the name of a class" if pixels.classes else "a text" if pixels.has_text else "empty"
    return f"""## Use

`pixel_pipeline.py` and `pixel_codec.py`, which lie here, are the pipeline's code; they need torch
and diffusers alone. Read them, then allow them:

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder", trust_remote_code=True)
generator = torch.Generator("cpu").manual_seed(0)
image = pipe("{prompt}", generator=generator, num_inference_steps=25).images[0]
```

The prompt is {known}; the empty one asks for anything. There is no autoencoder:
noise and images are in pixels, which the UNet sees as {pixels.codec.channels} channels of
{pixels.codec.patch} x {pixels.codec.patch} px ({pixels.codec.kind}).
"""


def _settings(process: Process) -> str:
    text = """The whole process (prediction type, betas and timestep spacing) is in
`scheduler/scheduler_config.json`. To change scheduler, build it from that config, so that nothing
is lost:
`pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)`.
"""
    if not process.schedule.is_zero_terminal_snr:
        return text
    facts = [
        "**guidance_rescale**: 0.7 at guidance_scale 7.5 (useful range 0.5 to 0.75). Without it "
        "high guidance overexposes a zero-terminal-SNR model."
    ]
    if not process.incompatibility():
        facts.append(
            f"**timestep_spacing** is `{process.timestep_spacing}`: sampling starts at the last "
            "timestep, where the SNR is zero. Spacing `leading` never visits it. The key is "
            "`timestep_spacing`; diffusers ignores `timestep_scaling` silently."
        )
    return f"{text}\n{_bullets(facts)}\n"


def _section(title: str, facts: Sequence[str]) -> str:
    bullets = _bullets(facts)
    return f"## {title}\n\n{bullets}\n" if bullets else ""


def _bullets(facts: Sequence[str]) -> str:
    wrap = textwrap.TextWrapper(100, "- ", "  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrap.fill(fact) for fact in facts if fact)


def _training(run_dir: Path) -> str:
    rows: dict[str, Any] = {}
    config = read_yaml_file(run_dir / "config.yaml")
    for key in RUN_KEYS:
        value = value_at(config, key)
        if value is not None and value != {}:
            rows[key] = value
    if (run_dir / "environment.json").is_file():
        environment = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
        rows |= {key: environment[key] for key in ("command", "git_commit") if key in environment}
    if not rows:
        return ""
    table = "\n".join(f"| {key} | `{value}` |" for key, value in rows.items())
    return f"## Training\n\n| | |\n|---|---|\n{table}\n"
