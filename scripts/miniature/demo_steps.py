"""The steps of `blackpoint demo`: the whole path on real digits, from shards to a report.

Every step leaves its result in run_dir and is skipped when the result is there, so a demo that is
stopped continues with the same command.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image

from blackpoint.data.files.paths import shipped
from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.export.verify import check_against_diffusers
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.prompts.prompt_set import read_prompt_set
from blackpoint.sampling.report.results import Results, read_results
from blackpoint.sampling.runtime.pictures import write_png
from blackpoint.sampling.search.config import SearchConfig
from blackpoint.sampling.search.run import search_to_folder
from blackpoint.scripts.config import load
from blackpoint.scripts.miniature.demo_config import DemoConfig
from blackpoint.scripts.miniature.digits import (
    DIGIT_NAMES,
    Split,
    packed_digits,
    write_digit_folder,
)
from blackpoint.scripts.sweep.cells import cells_of
from blackpoint.scripts.sweep.config import SweepConfig
from blackpoint.scripts.sweep.runner import state_of
from blackpoint.scripts.verb_process import verb_command
from blackpoint.scripts.verbs import report_content
from blackpoint.scripts.verbs import sweep as run_sweep
from blackpoint.scripts.verbs.report_config import ReportConfig
from blackpoint.train.config.config import TrainConfig
from blackpoint.train.run import fit

BASE, FINE_TUNED, CONTROL = "base", "fine-tuned", "control"
SEARCH_STEPS, POLL_S = 10, 1.0
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
YAML, PROMPTS, GUIDANCE_SCALE = "configs/black_point.yaml", "configs/prompts/digits.jsonl", 3.0
OPEN = ", no guidance"
"""What follows a checkpoint's name where captions that leave the background open are sampled."""
EXPECTED = {
    "luminance spread over the references', open": {
        BASE + OPEN: "at most .60",
        FINE_TUNED + OPEN: "at least .80",
        CONTROL + OPEN: "at most .60",
    },
    "luminance, black": {BASE: "above .15", FINE_TUNED: "at most .05", CONTROL: "above .15"},
    "luminance, white": {BASE: "below .85", FINE_TUNED: "at least .95", CONTROL: "below .85"},
    "digits": {BASE: "at least .90", FINE_TUNED: "at least .90", CONTROL: ""},
}
"""Metric -> arm of the evaluation -> what is expected of all captions."""
INTRODUCTION = (
    "Stable Diffusion cannot generate true black or true white. Its terminal SNR is not zero: "
    "at the last training timestep the image's mean still shows through the noise, but sampling "
    "starts from noise without it, so every image is drawn towards a middle gray.\n\n"
    "The zero-SNR fix (Lin et al. 2023): rescale the schedule to zero terminal SNR, train with "
    "v-prediction, start sampling at the last timestep, rescale the guidance. Below, the same "
    "prompts and seeds before and after."
)


def demonstrate(config: DemoConfig) -> None:
    """Runs every step that is not done yet, then prints the numbers and where the report is."""
    run_dir = Path(config.run_dir)
    started_s = time.perf_counter()
    pack_digits(config, "train")
    pack_digits(config, "held_out")
    compose = first_picture(run_dir, started_s)
    fine_tune(config, config.config, run_dir, "fine-tune to zero terminal SNR", compose)
    with timed(run_dir, "verify the export with stock diffusers", again=True):
        check_against_diffusers(DiffusionModel.load(run_dir / "export"), run_dir / "export")
    checkpoints = {BASE: config.checkpoint, FINE_TUNED: str(run_dir)}
    if config.control:
        checkpoints[CONTROL] = str(run_dir / "control")
        name = "fine-tune the control (old schedule, old prediction)"
        fine_tune(config, config.control_config, run_dir / "control", name)
    results = evaluate(config, checkpoints)
    search(config)
    report = report_content.write(ReportConfig(run_dir=config.run_dir), INTRODUCTION)
    print("\n" + outcome(results))
    print(f"\nreport: {report.resolve()}  ({time.perf_counter() - started_s:.0f} s in all)")


@contextlib.contextmanager
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
        packed_digits(run_dir, split, num_images, config.seed)


def settings_of(config: DemoConfig, yaml: str, run_dir: Path) -> list[str]:
    """Returns the arguments of `blackpoint train` for one of the configs on the demo's shards."""
    shards = Path(config.run_dir) / "shards"
    settings = [
        yaml,
        f"run_dir={run_dir}",
        f"checkpoint={config.checkpoint}",
        f"data.shards={shards / 'train'}",
        f"data.validation_shards={shards / 'held_out'}",
    ]
    if config.max_steps is not None:
        settings.append(f"trainer.max_steps={config.max_steps}")
    num_devices = 1 if torch.cuda.is_available() else config.num_processes
    return [*settings, f"trainer.devices={num_devices}"]


def fine_tune(
    config: DemoConfig,
    yaml: str,
    run_dir: Path,
    name: str,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Fine-tunes by one of the configs on the demo's shards; continues what was stopped.

    `meanwhile` is called now and then while other processes train, and at the end.
    """
    settings = settings_of(config, yaml, run_dir)
    train_config = load(TrainConfig, settings)
    if (run_dir / "export").exists():
        skipped(name, run_dir / "export")
        fit(train_config)  # does nothing, unless it must refuse a run of another config
        return
    with timed(Path(config.run_dir), name):
        if train_config.trainer.devices == 1:
            fit(train_config)
        else:
            train_in_processes(settings, meanwhile)
        meanwhile()


def train_in_processes(arguments: list[str], meanwhile: Callable[[], None]) -> None:
    """Runs `blackpoint train`, whose processes are started by running its command again.

    On two cores, two processes of one thread train 1.3 times as fast as one of two threads. What
    stops this process stops them, saved; their exit status, if it is not 0, becomes ours.
    """
    process = subprocess.Popen(verb_command("train", *arguments))
    previous = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),  # Ctrl-C reaches them itself
    }
    status = None
    try:
        while status is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(POLL_S)
            meanwhile()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if status:
        sys.exit(status if status > 0 else 128 - status)


def first_picture(run_dir: Path, started_s: float) -> Callable[[], None]:
    """Returns what lays the first two previews side by side, the base's and the fine-tune's, once
    both are there, and says where."""
    path = run_dir / "before_after.png"

    def compose() -> None:
        previews = sorted((run_dir / "previews").glob("step_*.png"))[:2]
        if path.is_file() or len(previews) < 2:
            return
        try:
            before, after = (Image.open(preview).convert("RGB") for preview in previews)
        except OSError:  # it is being written
            return
        size = (before.width + after.width, max(before.height, after.height))
        both = Image.new("RGB", size, before.getpixel((0, 0)))
        for left, picture in ((0, before), (before.width, after)):
            both.paste(picture, (left, size[1] - picture.height))  # a heading may take two lines
        write_png(path, both)
        after_s = time.perf_counter() - started_s
        print(f"\nbefore and after: {path.resolve()}  (after {after_s:.0f} s)\n", flush=True)

    return compose


def evaluate(config: DemoConfig, checkpoints: dict[str, str]) -> Results:
    """Samples and measures what is missing of the checkpoints, as one sweep.

    All captions at GUIDANCE_SCALE, and without guidance two images of each caption that leaves the
    background open, whose spread guidance would widen.
    """
    run_dir = Path(config.run_dir)
    references, output = run_dir / "digits" / "references", run_dir / "evaluation"
    if not (references / "metadata.jsonl").is_file():  # it is written last
        write_digit_folder(references, config.reference_images, config.seed, "held_out")
    captions = read_prompt_set(shipped(PROMPTS), config.num_images)
    left_open = {
        "evaluate.prompts": [prompt.text for prompt in captions if prompt.category == "open"],
        "evaluate.num_images": 2,
        "evaluate.guidance_scale": 1.0,
    }
    places = {arm: {"evaluate.checkpoint": place} for arm, place in checkpoints.items()}
    sweep = SweepConfig(
        run_dir=str(output),
        evaluate={
            "config": YAML,
            "limit": config.num_images,
            "num_steps": config.num_steps,
            "guidance_scale": GUIDANCE_SCALE,
            "seed": config.seed,
            "sets.reference": str(references),
            "verifiers.digits.checkpoint": config.digit_reader,
        },
        arms=places | {arm + OPEN: place | left_open for arm, place in places.items()},
        num_processes=config.num_processes,
    )
    if all(state_of(cell).state == "done" for cell in cells_of(sweep)):
        skipped("sample and measure all captions", output)
    else:
        with timed(run_dir, "sample and measure all captions"):
            run_sweep.run(sweep)
    return read_results(output)


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
        "verifiers.reader.module=blackpoint.scripts.miniature.digit_readers:DigitReader",
        f"verifiers.reader.checkpoint={config.digit_reader}",
        f"verifiers.reader.labels={labels}",
        "held_out.judge.kind=classifier",
        "held_out.judge.module=blackpoint.scripts.miniature.digit_readers:DigitPerceptron",
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


def outcome(results: Results) -> str:
    """Writes the numbers beside what is expected of them."""
    header = ("", "checkpoint", "measured [95 % interval]", "expected of all captions")
    lines = [header]
    for metric, by_arm in EXPECTED.items():
        for cell in results.cells:
            if metric in cell.values and cell.arm in by_arm:
                measured = f"{cell.values[metric].estimate:.4g}"
                lines.append((metric, cell.arm, measured, by_arm[cell.arm]))
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rows = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        for line in lines
    ]
    return "\n".join(row.rstrip() for row in rows)
