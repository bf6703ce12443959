"""What a full-size run does, command by command, and what each must hold in memory."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blackpoint.scripts.verb_process import verb_command

PROMPT = "a photo of a cat on a black background"
RELOAD = """
import sys
import numpy, torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
images = pipeline("{prompt}", num_inference_steps=2, height={side}, width={side},
                  guidance_rescale=0.7, output_type="np").images
assert numpy.isfinite(images).all() and images.std() > 0
"""


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


def verbs(
    work: Path,
    parameters: dict[str, int],
    resolution: int,
    sample_px: int,
    training: Sequence[str] = (),
) -> list[Verb]:
    """Lists the commands in their order; they start from work/base and work/photos.

    `parameters` counts those of unet, vae and text_encoder; training images have `resolution` px,
    the sampled picture `sample_px`. `training` are further settings of the run.
    """
    python, base, run_dir = sys.executable, work / "base", work / "run"
    blackpoint = verb_command()
    photos, shards, latents = work / "photos", work / "shards", work / "latents"
    samples, found, export = work / "samples", work / "found", work / "export"
    scored, evaluated, swept = work / "scored", work / "evaluated", work / "swept"
    unet, pipeline = 4.0 * parameters["unet"], 4.0 * sum(parameters.values())
    encoders = pipeline - unet
    train = [
        *blackpoint,
        "train",
        f"run_dir={run_dir}",
        f"checkpoint={base}",
        f"data.shards={latents}",
        f"data.resolution={resolution}",
        "data.num_workers=0",
        "batch_size=1",
        "trainer.max_steps=4",
        "trainer.gradient_checkpointing=true",
        "trainer.log_every_steps=1",
        "trainer.checkpoint_every_steps=4",
        "trainer.keep_checkpoints=1",
        "trainer.validate_every_steps=0",
        "preview.every_steps=0",
        "wandb.enabled=false",
        *training,
    ]
    five = "UNet 4 B/parameter, gradients 4, AdamW 8, average 4"
    whole = "UNet, VAE and text encoder, 4 B/parameter"
    code = RELOAD.format(prompt=PROMPT, side=resolution)
    pixels = f"height={sample_px} width={sample_px}".split()
    run_export = run_dir / "export"
    return [
        Verb(
            "imports alone",
            [python, "-c", "import blackpoint.train.run"],
            holds="interpreter, libraries",
        ),
        Verb(
            "data pack",
            [*blackpoint, *f"data pack source={photos} output={shards}".split()],
            writes=[shards],
        ),
        Verb("data check", [*blackpoint, "data", "check", f"shards={shards}"]),
        Verb(
            "data encode",
            [
                *blackpoint,
                *f"data encode source={shards} checkpoint={base} output={latents}".split(),
                *f"resolution={resolution} batch_size=1 num_workers=0".split(),
            ],
            encoders,
            "VAE and text encoder, 4 B/parameter",
            writes=[latents],
        ),
        Verb(
            "train, stopped after 2 steps",
            train,
            5 * unet,
            five,
            writes=[run_dir],
            stop_after_a_step=run_dir / "metrics.csv",
        ),
        Verb("train, resumed for 2 more, exported and verified", train, 5 * unet, five),
        Verb(
            "sample 2 steps with guidance",
            [
                *blackpoint,
                *f"sample checkpoint={run_export} output={samples} num_steps=2".split(),
                *pixels,
                f"prompts={PROMPT}",
            ],
            pipeline,
            whole,
            writes=[samples],
            done_with=[run_export],
        ),
        Verb(
            "search 2 candidates of 2 steps",
            [
                *blackpoint,
                *f"search checkpoint={base} output={found} num_steps=2 budget_nfe=8".split(),
                *["batch_size=1", "verifiers.dark.kind=luminance", "verifiers.dark.target=0"],
                *pixels,
                f"prompts={PROMPT}",
            ],
            pipeline,
            whole,
            writes=[found],
        ),
        Verb(
            "search by stability, 1 noise of 2 steps",
            [
                *blackpoint,
                *f"search checkpoint={base} output={scored} num_steps=2 budget_nfe=4".split(),
                *["batch_size=1", "guidance_scale=1", "verifiers.stable.kind=stability"],
                *pixels,
                f"prompts={PROMPT}",
            ],
            pipeline,
            whole,
            writes=[scored],
        ),
        Verb(
            "evaluate 2 images of 2 steps",
            [
                *blackpoint,
                *f"evaluate checkpoint={base} output={evaluated} num_steps=2 num_images=2".split(),
                *["batch_size=1", "verifiers.dark.kind=luminance", "verifiers.dark.target=0"],
                *["brightness.invariance_prompts=1", "brightness.invariance_noises=2"],
                *pixels,
                f"prompts={PROMPT}",
            ],
            pipeline,
            whole,
            writes=[evaluated],
        ),
        Verb(
            "sweep 2 cells of 1 and 2 steps",
            [
                *blackpoint,
                *f"sweep run_dir={swept} evaluate.checkpoint={base}".split(),
                *(f"evaluate.{key}" for key in pixels),
                "evaluate.brightness.invariance_prompts=0",
                "grid.evaluate.num_steps=[1,2]",
                f"evaluate.prompts={PROMPT}",
            ],
            holds="its own process; each cell has one, like evaluate",
            writes=[swept],
        ),
        Verb(
            "sweep's report",
            [*blackpoint, "report", f"run_dir={swept}"],
            done_with=[evaluated, swept],
        ),
        Verb(
            "export and verify",
            [*blackpoint, *f"export checkpoint={run_dir} output={export}".split()],
            pipeline,
            whole,
            writes=[export],
            done_with=[run_dir / "checkpoints"],
        ),
        Verb(
            "reload by diffusers, 2 steps",
            [python, "-c", code, str(export)],
            pipeline,
            whole,
            done_with=[export],
        ),
        Verb("report", [*blackpoint, "report", f"run_dir={run_dir}"]),
    ]
