"""The steps of `blackpoint demo`: the whole path on real digits, from shards to a report.

Every step leaves its result in run_dir and is skipped when the result is there, so a demo that is
stopped continues with the same command.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from blackpoint.data.files.whole_file import write_whole
from blackpoint.data.pack.pack import PackConfig, pack
from blackpoint.sampling.evaluation.black_point import BlackPointConfig
from blackpoint.sampling.evaluation.black_point_study import is_complete
from blackpoint.sampling.evaluation.black_point_summary import (
    OPEN_RATIO,
    READ,
    Finding,
    border_name,
    read_difference_name,
    show,
)
from blackpoint.sampling.export.verify import check_against_diffusers
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.scripts.config import load
from blackpoint.scripts.miniature import evaluation
from blackpoint.scripts.miniature.digits import DIGIT_NAMES, Split, write_digit_folder
from blackpoint.scripts.verb_process import verb_command
from blackpoint.scripts.verbs import report_content
from blackpoint.scripts.verbs.demo import DemoConfig
from blackpoint.scripts.verbs.report import ReportConfig
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.run import fit

BASE, FINE_TUNED, CONTROL = "base", "fine_tuned", "control"
SEARCH_STEPS = 10
SEARCHED = (
    "a red three on a black background",
    "a black eight on a white background",
    "a blue five on a gray background",
    "a white nine on a dark gray background",
    "a green two on a light gray background",
    "a white seven on a black background",
    "a red four on a white background",
    "a black six on a gray background",
)
EXPECTED = {
    OPEN_RATIO: {BASE: "at most .60", FINE_TUNED: "at least .80", CONTROL: "at most .60"},
    border_name("black", 3): {BASE: "above .15", FINE_TUNED: "at most .05", CONTROL: "above .15"},
    border_name("white", 3): {BASE: "below .85", FINE_TUNED: "at least .95", CONTROL: "below .85"},
    READ: {BASE: "at least 90 %", FINE_TUNED: "at least 90 %", CONTROL: ""},
    read_difference_name(BASE): {FINE_TUNED: "about 0", CONTROL: ""},
}


def demonstrate(config: DemoConfig) -> None:
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
    search(config)
    report = report_content.write(ReportConfig(run_dir=config.run_dir))
    print("\n" + outcome(findings))
    print(f"\nreport: {report.resolve()}  ({time.perf_counter() - started_s:.0f} s in all)")


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
        write_whole(path, json.dumps(timings, indent=1) + "\n")


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
    num_devices = 1 if torch.cuda.is_available() else config.num_processes
    settings.append(f"trainer.devices={num_devices}")
    train_config = load(TrainConfig, [yaml, *settings])
    if (run_dir / "export").exists():
        skipped(name, run_dir / "export")
        fit(train_config)  # does nothing, unless it must refuse a run of another config
        return
    with timed(Path(config.run_dir), name):
        if num_devices == 1:
            fit(train_config)
        else:
            train_in_processes([yaml, *settings])


def train_in_processes(arguments: list[str]) -> None:
    """Runs `blackpoint train`, whose processes are started by running its command again.

    On two cores, two processes of one thread train 1.3 times as fast as one of two threads. What
    stops this process stops them, saved; their exit status, if it is not 0, becomes ours.
    """
    process = subprocess.Popen(verb_command("train", *arguments))
    previous = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),  # Ctrl-C reaches them itself
    }
    try:
        status = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if status:
        sys.exit(status if status > 0 else 128 - status)


def evaluate(config: DemoConfig, checkpoints: dict[str, str], name: str) -> list[Finding]:
    """Samples the cells of the black-point study that are not sampled yet."""
    study = BlackPointConfig(
        checkpoints=checkpoints,
        output=str(Path(config.run_dir) / "black_point"),
        digit_reader=config.digit_reader,
        num_images=config.num_images,
        border_images=-(-config.num_images // 2),  # black and white together make a cell
        beside_images=-(-config.num_images // 2),
        read_images=2 * config.num_images,
        reference_images=config.reference_images,
        num_steps=config.num_steps,
        seed=config.seed,
        batch_size=64,
        num_processes=config.num_processes,
    )
    if is_complete(study, evaluation.digit_captions()):
        skipped(name, Path(study.output))
        return evaluation.evaluate(study)[1]
    with timed(Path(config.run_dir), name):
        return evaluation.evaluate(study)[1]


def search(config: DemoConfig) -> None:
    """Searches the noise of a few prompts for digits that can be read."""
    output = Path(config.run_dir) / "search"
    labels = f"[{','.join(DIGIT_NAMES)}]"
    settings = [
        f"checkpoint={config.run_dir}",
        f"prompts={json.dumps(SEARCHED)}",
        f"output={output}",
        f"num_steps={SEARCH_STEPS}",
        f"budget_nfe={SEARCH_STEPS * config.search_candidates}",
        "guidance_scale=1",
        "channels_last=true",
        f"batch_size={4 * config.search_candidates}",
        f"seed={config.seed}",
        "verifiers.reader.kind=classifier",
        "verifiers.reader.module=blackpoint.scripts.miniature.digit_reader:DigitReader",
        f"verifiers.reader.checkpoint={config.digit_reader}",
        f"verifiers.reader.labels={labels}",
        "held_out.judge.kind=classifier",
        "held_out.judge.module=blackpoint.scripts.miniature.digit_perceptron:DigitPerceptron",
        f"held_out.judge.checkpoint={config.held_out_reader}",
        f"held_out.judge.labels={labels}",
        "held_out.judge.output=top1",
    ]
    name = f"search the noise of {len(SEARCHED)} prompts, {config.search_candidates} candidates"
    search_config = load(SearchConfig, settings)
    if (output / "hacking.json").is_file():
        skipped(name, output)
        search_to_folder(search_config)  # does nothing, unless it must refuse other settings
        return
    with timed(Path(config.run_dir), name):
        print("\n".join(search_to_folder(search_config)[1]))


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
