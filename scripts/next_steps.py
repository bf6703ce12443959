"""What to run after a verb: one table of commands, filled with the settings of the one that ended.

A word in braces is a field of the verb's config, quoted for the shell; {name} is the last part of
its output, {stem} all of it but a suffix, {arguments} the command's own words but for a plan's.
"""

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blackpoint.data.files.plain import read_json
from blackpoint.sampling.runtime.tasks import this_task

SAMPLE = 'blackpoint sample checkpoint={%s} prompts="a black cat at night" output={%s}_samples'
REPORT = "blackpoint report run_dir={%s}"
NEXT: dict[str, tuple[str, ...]] = {
    "init": (
        "blackpoint data pack source={source} output={shards}",
        "blackpoint data check shards={shards}",
        "blackpoint train {output} plan=true",
        "blackpoint train {output}",
        "sbatch slurm/train.sbatch {output}",
    ),
    "data pack": (
        "blackpoint data check shards={output}",
        "blackpoint train configs/sd15_zero_snr_24gb.yaml data.shards={output} plan=true",
    ),
    "data check": (
        "blackpoint train configs/sd15_zero_snr_24gb.yaml data.shards={shards} plan=true",
    ),
    "data encode": (
        "blackpoint train data.shards={output} checkpoint={checkpoint} run_dir=runs/{name} "
        "plan=true",
    ),
    "train plan": ("blackpoint train {arguments}", "sbatch slurm/train.sbatch {arguments}"),
    "train new": (REPORT % "run_dir",),
    "train": (
        SAMPLE % ("run_dir", "run_dir"),
        REPORT % "run_dir",
        "blackpoint export checkpoint={run_dir} output={run_dir}.safetensors",
    ),
    "sample": (
        "blackpoint evaluate checkpoint={checkpoint} prompts=configs/prompts/brightness.jsonl "
        "output={output}_evaluated",
    ),
    "search": (REPORT % "output",),
    "evaluate": (REPORT % "output",),
    "sweep": (REPORT % "run_dir",),
    "export": (
        SAMPLE % ("output", "output"),
        "less {output}/README.md  # how diffusers opens it",
    ),
    "export file": (SAMPLE % ("output", "stem"),),
    "export lora": ("less {output}/README.md  # which file is for which client",),
}
PLANNING = ("plan=", "card_gib=")


def next_steps(verb: str, config: Any, arguments: Sequence[str]) -> Iterator[str]:
    """Yields the lines to show after a verb that ended well; none in other processes of it."""
    others = ("LOCAL_RANK", "NODE_RANK")  # of those that Lightning starts
    if this_task().rank or any(os.environ.get(name, "0") != "0" for name in others):
        return
    words = [word for word in arguments if not word.startswith(PLANNING)]
    values = {name: shlex.quote(str(getattr(config, name))) for name in _names(config)}
    values["arguments"] = shlex.join(words)
    output = str(getattr(config, "output", None) or "")
    values["name"] = shlex.quote(Path(output).name)
    values["stem"] = shlex.quote(output.removesuffix(".safetensors"))
    steps = [step.format(**values) for step in NEXT.get(_row(verb, config), ())]
    steps = [step for step in steps if not step.startswith("sbatch") or _has_slurm()]
    if verb == "train" and not _is_published(Path(config.run_dir)):
        steps = [step for step in steps if not step.endswith(".safetensors")]
    if steps:
        yield from ("next:", *(f"  {step}" for step in steps))


def _names(config: Any) -> set[str]:
    wanted = ("run_dir", "source", "shards", "checkpoint", "output")
    return {name for name in wanted if hasattr(config, name)}


def _row(verb: str, config: Any) -> str:
    """Returns the row of the table: some verbs have several."""
    if verb == "train" and (config.plan or config.checkpoint is None):
        return "train plan" if config.plan else "train new"
    if verb == "sweep" and config.plan:
        return ""  # it says itself how many cells an array has
    if verb == "export" and config.format == "lora":
        return "export lora"
    return "export file" if verb == "export" and config.output.endswith(".safetensors") else verb


def _is_published(run_dir: Path) -> bool:
    """Whether an export has SD's own norms, which readers of single files assume."""
    settings = read_json(run_dir / "export" / "unet" / "config.json")
    return bool(settings.get("norm_num_groups") == 32)


def _has_slurm() -> bool:
    return Path("slurm/train.sbatch").is_file()
