"""What a full-size run does, command by command, and what each must hold in memory."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from blackpoint.scripts.verb_process import verb_command

PROMPT = "a photo of a cat on a black background"
ADAPTERS, RANK = "adapters", 8
CHECKS = "blackpoint.scripts.measurements.full_architecture_checks"


@dataclass(frozen=True)
class Verb:
    """One command: what it must hold in memory, and what it leaves for the next ones.

    `writes` are removed before a start and kept after it; `done_with` are removed after it.
    """

    name: str
    command: list[str]
    bytes_expected: float = 0.0
    holds: str = ""
    writes: list[Path] = field(default_factory=list)
    done_with: list[Path] = field(default_factory=list)
    stop_after_a_step: Path | None = None
    """metrics.csv; SIGTERM is sent when it names the first step."""


class Row(NamedTuple):
    """A command before its names in {} are filled in; `memory` is one of HELD.

    `of` names the architectures that it is for: all, sd (1.x and 2.x) or xl.
    """

    name: str
    words: str
    memory: str = ""
    writes: str = ""
    done_with: str = ""
    of: str = ""


TRAIN = (
    "train run_dir={run} checkpoint={base} data.shards={latents} data.resolution={resolution} "
    "data.num_workers=0 batch_size=1 trainer.max_steps=4 trainer.gradient_checkpointing=true "
    "trainer.log_every_steps=1 trainer.checkpoint_every_steps=4 trainer.keep_checkpoints=1 "
    "trainer.validate_every_steps=0 preview.every_steps=0 wandb.enabled=false {training}"
)
TRAIN_ADAPTERS = f"{TRAIN} lora.rank={RANK}"
ONE_BY_ONE = "num_steps=2 height={sample_px} width={sample_px} prompts={prompt} batch_size=1"
DARK = f"{ONE_BY_ONE} verifiers.dark.kind=luminance verifiers.dark.target=0"
FOLDERS = (
    *("base", "photos", "shards", "latents", "run", "export"),
    *("samples", "found", "scored", "evaluated", "swept", "single", "unpacked", "adapters"),
)
STOPPED_END = ", stopped after 2 steps"
DIFFERENCES = "differences.json"
ROWS = (
    Row("imports alone", "python {imports}", "imports"),
    Row("data pack", "data pack source={photos} output={shards}", writes="shards"),
    Row("data check", "data check shards={shards}"),
    Row(
        "data encode",
        "data encode source={shards} checkpoint={base} output={latents} resolution={resolution} "
        "batch_size=1 num_workers=0",
        "encoders",
        writes="latents",
    ),
    Row(f"train{STOPPED_END}", TRAIN, "training", writes="run", of="sd"),
    Row("train, resumed for 2 more, exported and verified", TRAIN, "training", of="sd"),
    Row(
        f"train adapters of rank {RANK}{STOPPED_END}",
        TRAIN_ADAPTERS,
        "adapters",
        writes="run",
        of="xl",
    ),
    Row(
        "train adapters, resumed for 2 more, merged, exported and verified",
        TRAIN_ADAPTERS,
        "pipeline",
        of="xl",
    ),
    Row(
        "sample 2 steps with guidance",
        f"sample checkpoint={{run}}/export output={{samples}} {ONE_BY_ONE}",
        "pipeline",
        writes="samples",
        done_with="run/export",
    ),
    Row(
        "search 2 candidates of 2 steps",
        f"search checkpoint={{base}} output={{found}} budget_nfe=8 {DARK}",
        "pipeline",
        writes="found",
    ),
    Row(
        "search by stability, 1 noise of 2 steps",
        f"search checkpoint={{base}} output={{scored}} budget_nfe=4 {ONE_BY_ONE} "
        "guidance_scale=1 verifiers.stable.kind=stability",
        "pipeline",
        writes="scored",
        of="sd",
    ),
    Row(
        "evaluate 2 images of 2 steps",
        f"evaluate checkpoint={{base}} output={{evaluated}} num_images=2 {DARK} "
        "brightness.invariance_prompts=1 brightness.invariance_noises=2",
        "pipeline",
        writes="evaluated",
    ),
    Row(
        "sweep 2 cells of 1 and 2 steps",
        "sweep run_dir={swept} evaluate.checkpoint={base} evaluate.height={sample_px} "
        "evaluate.width={sample_px} evaluate.brightness.invariance_prompts=0 "
        "grid.evaluate.num_steps=[1,2] evaluate.prompts={prompt}",
        "cells",
        writes="swept",
        of="sd",
    ),
    Row("sweep's report", "report run_dir={swept}", done_with="evaluated swept", of="sd"),
    Row(
        "export and verify",
        "export checkpoint={run} output={export}",
        "pipeline",
        writes="export",
        done_with="run/checkpoints",
        of="sd",
    ),
    Row(
        "adapters, written for diffusers and for kohya's readers, verified",
        "export checkpoint={run} output={adapters} format=lora",
        "adapted",
        writes="adapters",
        done_with="adapters",
        of="xl",
    ),
    Row(
        "export and verify",
        "export checkpoint={base} output={export}",
        "pipeline",
        writes="export",
        of="xl",
    ),
    Row(
        "reload by diffusers, 2 steps",
        "python {checks} reload {export} {resolution}",
        "pipeline",
        done_with="export",
    ),
    Row("report", "report run_dir={run}"),
    Row(
        "file, written from the base folder",
        "export checkpoint={base} output={single}/model.safetensors verify=false",
        "file",
        writes="single",
    ),
    Row(
        "file, sampled by 2 steps with guidance",
        f"sample checkpoint={{single}}/model.safetensors output={{samples}} {ONE_BY_ONE}",
        "pipeline",
        writes="samples",
        of="xl",
    ),
    Row(
        "file, read and written as a folder",
        "export checkpoint={single}/model.safetensors output={unpacked} dtype=float16 verify=false",
        "file",
        writes="unpacked",
    ),
    Row(
        "file, folder and diffusers' reading equal the base, bit by bit",
        "python {checks} compare {base} {single}/model.safetensors {unpacked}",
        done_with="single unpacked",
    ),
    Row(
        "file, written and verified",
        "export checkpoint={base} output={single}/model.safetensors",
        "pipeline",
        writes="single",
        done_with="single",
        of="sd",
    ),
    Row(
        "file, adapters merged, written and verified",
        "export checkpoint={run} output={single}/model.safetensors",
        "pipeline",
        writes="single",
        done_with="single run/checkpoints",
        of="xl",
    ),
    Row(
        "tensors of this model, for the comparison with diffusers",
        "python {checks} ours {base} {tensors} {sample_px}",
        "unet",
        of="xl",
    ),
    Row(
        "tensors of diffusers' pipeline, compared",
        "python {checks} stock {base} {tensors} {sample_px} {differences}",
        "unet",
        of="xl",
    ),
)
HELD = {
    "": "",
    "imports": "interpreter, libraries",
    "encoders": "VAE and text encoder, 4 B/parameter",
    "training": "UNet 4 B/parameter, gradients 4, AdamW 8, average 4",
    "adapters": "UNet 4 B/parameter, adapters 4, their gradients 4, AdamW 8, average 4",
    "adapted": "UNet and adapters, 4 B/parameter",
    "unet": "UNet, 4 B/parameter; the text encoders before it",
    "pipeline": "UNet, VAE and text encoder, 4 B/parameter",
    "file": "the file, 2 B/parameter; 4 of SDXL's VAE",
    "cells": "its own process; each cell has one, like evaluate",
}


def verbs(
    work: Path,
    parameters: dict[str, int],
    resolution: int,
    sample_px: int,
    training: Sequence[str] = (),
) -> list[Verb]:
    """Lists the commands in their order; they start from work/base and work/photos.

    `parameters` counts those of the base's parts and of adapters of RANK; training images have
    `resolution` px, the sampled picture `sample_px`. `training` are further settings of the run.
    """
    is_xl, adapters = "text_encoder_2" in parameters, 4.0 * parameters[ADAPTERS]
    unet, pipeline = 4.0 * parameters["unet"], 4.0 * sum(parameters.values()) - adapters
    expected = {
        "encoders": pipeline - unet,
        "training": 5 * unet,
        "adapters": unet + 5 * adapters,
        "adapted": unet + adapters,
        "unet": unet,
        "pipeline": pipeline,
        "file": pipeline / 2 + (2.0 * parameters["vae"] if is_xl else 0.0),
    }
    values = {name: str(work / name) for name in FOLDERS}
    values |= {"tensors": str(work / "tensors.safetensors"), "differences": str(work / DIFFERENCES)}
    values |= {"resolution": str(resolution), "sample_px": str(sample_px), "prompt": PROMPT}
    several = {
        "{training}": list(training),
        "{imports}": ["-c", "import blackpoint.train.run"],
        "{checks}": ["-m", CHECKS],
    }

    def filled(row: Row) -> Verb:
        first, *words = row.words.split()  # before blanks of the values come in
        command = [sys.executable] if first == "python" else verb_command(first)
        for word in words:
            command += several[word] if word in several else [word.format(**values)]
        writes, done_with = ([work / n for n in names.split()] for names in row[3:5])
        held = expected.get(row.memory, 0.0), HELD[row.memory]
        stop = work / "run" / "metrics.csv" if row.name.endswith(STOPPED_END) else None
        return Verb(row.name, command, *held, writes, done_with, stop)

    return [filled(row) for row in ROWS if row.of in ("", "xl" if is_xl else "sd")]
