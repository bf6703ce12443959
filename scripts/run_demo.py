"""`blackpoint demo`: the whole path on real digits, from shards to a report.

Every step leaves its result in run_dir and is skipped when the result is there, so a demo that is
stopped continues with the same command.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data.digits import Split, write_digit_folder
from data.pack import PackConfig, pack
from sampling.errors import UserError
from sampling.evaluation.black_point import BlackPointConfig
from sampling.evaluation.black_point_study import is_complete
from sampling.evaluation.black_point_summary import (
    OPEN_RATIO,
    READ,
    Finding,
    border_name,
    read_difference_name,
    show,
)
from sampling.export_check import check_against_diffusers
from sampling.model import DiffusionModel
from scripts import run_evaluate, run_report
from scripts.config import load
from train.config import TrainConfig
from train.run import fit

BASE, FINE_TUNED, CONTROL = "base", "fine_tuned", "control"
EXPECTED = {
    OPEN_RATIO: {BASE: "at most .60", FINE_TUNED: "at least .80", CONTROL: "at most .60"},
    border_name("black", 3): {BASE: "above .15", FINE_TUNED: "at most .05", CONTROL: "above .15"},
    border_name("white", 3): {BASE: "below .85", FINE_TUNED: "at least .95", CONTROL: "below .85"},
    READ: {BASE: "at least 90 %", FINE_TUNED: "at least 90 %", CONTROL: ""},
    read_difference_name(BASE): {FINE_TUNED: "about 0", CONTROL: ""},
}


@dataclass
class DemoConfig:
    """The demonstration on the embedded base; its fine-tune is configs/tiny_zero_snr.yaml."""

    run_dir: str = "runs/demo"
    """Directory of everything the demo makes."""
    config: str = "configs/tiny_zero_snr.yaml"
    """The fine-tune."""
    control_config: str = "configs/tiny_control.yaml"
    """The control: the same fine-tune with the old schedule and prediction type."""
    control: bool = False
    """Also run the control, into run_dir/control (about as long again)."""
    checkpoint: str = "assets/tiny_sd"
    """The embedded base."""
    digit_reader: str = "assets/digit_reader"
    """Folder of the digit classifier."""
    seed: int = 0
    """Seed of the sampled images."""
    num_train_images: int = 9000
    """Real digits that are rendered for training."""
    num_held_out_images: int = 500
    """Real held-out digits, for the validation loss."""
    num_images: int = 64
    """Sampled images in each cell of the evaluation."""
    reference_images: int = 2000
    """Real held-out images that the samples are compared with."""
    num_steps: int = 25
    """Sampling steps."""
    num_processes: int = 2
    """Processes that sample."""
    max_steps: int | None = None
    """Optimizer steps; those of the fine-tune's config if not set."""

    def __post_init__(self) -> None:
        if self.num_images < 2:
            raise UserError(f"num_images={self.num_images} must be at least 2")


def config_class() -> type[DemoConfig]:
    return DemoConfig


def run(config: DemoConfig) -> int:
    """Runs every step that is not done yet, then prints the numbers and where the report is."""
    run_dir = Path(config.run_dir)
    started_s = time.perf_counter()
    pack_digits(config, "train")
    pack_digits(config, "held_out")
    evaluate(config, {BASE: config.checkpoint}, "sample the base, to see the flaw")
    fine_tune(config, config.config, run_dir, "fine-tune to zero terminal SNR")
    with timed(run_dir, "verify the export with stock diffusers", again=True):
        check_against_diffusers(DiffusionModel.load(run_dir / "export"), run_dir / "export")
    checkpoints = {BASE: config.checkpoint, FINE_TUNED: str(run_dir)}
    if config.control:
        checkpoints[CONTROL] = str(run_dir / "control")
        name = "fine-tune the control (old schedule, old prediction)"
        fine_tune(config, config.control_config, run_dir / "control", name)
    findings = evaluate(config, checkpoints, "sample what was fine-tuned")
    report = run_report.write(run_report.ReportConfig(run_dir=config.run_dir))
    print("\n" + outcome(findings))
    print(f"\nreport: {report.resolve()}  ({time.perf_counter() - started_s:.0f} s in all)")
    return 0


@contextmanager
def timed(run_dir: Path, name: str, again: bool = False) -> Iterator[None]:
    """Says what is done and how long it took; adds the time to run_dir/timings.json.

    `again`: the step is done anew every time, so its time replaces the one before.
    """
    print(f"* {name} ...", flush=True)
    started_s = time.perf_counter()
    try:
        yield
    finally:  # a step that is stopped and continued took both times
        seconds = time.perf_counter() - started_s
        print(f"  {seconds:.0f} s", flush=True)
        path = run_dir / "timings.json"
        timings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        timings[name] = seconds + (0.0 if again else timings.get(name, 0.0))
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}")
        unfinished.write_text(json.dumps(timings, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, path)


def skipped(name: str, result: Path) -> None:
    """Says that a step was done before."""
    print(f"* {name}: there already, {result}", flush=True)


def pack_digits(config: DemoConfig, split: Split) -> None:
    """Renders one split of the digits and packs it into shards."""
    run_dir = Path(config.run_dir)
    num_images = config.num_train_images if split == "train" else config.num_held_out_images
    name, shards = f"pack {num_images} real digits ({split})", run_dir / "shards" / split
    if shards.exists():  # data pack makes it only when it is whole
        skipped(name, shards)
        return
    with timed(run_dir, name):
        folder = run_dir / "digits" / split
        write_digit_folder(folder, num_images, config.seed, split)
        shards.parent.mkdir(parents=True, exist_ok=True)
        pack(PackConfig(source=str(folder), output=str(shards)))


def fine_tune(config: DemoConfig, yaml: str, run_dir: Path, name: str) -> None:
    """Fine-tunes by one of the configs on the demo's shards; continues what was stopped."""
    shards = Path(config.run_dir) / "shards"
    settings = [
        f"run_dir={run_dir}",
        f"checkpoint={config.checkpoint}",
        f"data.shards={shards / 'train'}",
        f"data.validation_shards={shards / 'held_out'}",
    ]
    if config.max_steps is not None:
        settings.append(f"trainer.max_steps={config.max_steps}")
    train_config = load(TrainConfig, [yaml, *settings])
    if (run_dir / "export").exists():
        skipped(name, run_dir / "export")
        fit(train_config)  # does nothing, unless it must refuse a run of another config
        return
    with timed(Path(config.run_dir), name):
        fit(train_config)


def evaluate(config: DemoConfig, checkpoints: dict[str, str], name: str) -> list[Finding]:
    """Samples the cells of the black-point study that are not sampled yet."""
    study = BlackPointConfig(
        checkpoints=checkpoints,
        output=str(Path(config.run_dir) / "black_point"),
        digit_reader=config.digit_reader,
        num_images=config.num_images,
        beside_images=-(-config.num_images // 2),  # black and white together make a cell
        read_images=3 * config.num_images,
        reference_images=config.reference_images,
        num_steps=config.num_steps,
        seed=config.seed,
        batch_size=64,
        num_processes=config.num_processes,
    )
    if is_complete(study, run_evaluate.digit_captions()):
        skipped(name, Path(study.output))
        return run_evaluate.evaluate(study)[1]
    with timed(Path(config.run_dir), name):
        return run_evaluate.evaluate(study)[1]


def outcome(findings: list[Finding]) -> str:
    """Writes the numbers beside what is expected of them."""
    found = {(finding.quantity, finding.checkpoint): finding.estimate for finding in findings}
    header = ("", "checkpoint", "measured [95 % interval]", "expected at 500 images")
    lines = [header]
    for quantity, by_checkpoint in EXPECTED.items():
        for name, expected in by_checkpoint.items():
            if (quantity, name) in found:
                lines.append((quantity, name, show(found[quantity, name], quantity), expected))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    rows = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        for line in lines
    ]
    return "\n".join(row.rstrip() for row in rows)
