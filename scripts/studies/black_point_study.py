"""`make black-point`: three fine-tunes of the embedded base, measured against it.

Packs the digits, trains (each run resumes or is skipped when it is done), runs
configs/black_point_study.yaml, and leaves tables, rows and picture in docs/black_point.
"""

from pathlib import Path

from PIL import Image

from blackpoint.sampling.report.results import Results
from blackpoint.sampling.runtime.picture_grid import caption_grid
from blackpoint.scripts.miniature.demo_config import DemoConfig
from blackpoint.scripts.miniature.demo_steps import fine_tune, pack_digits
from blackpoint.scripts.studies.study import run_study

RUNS = {
    "fine_tuned": "configs/tiny_zero_snr.yaml",
    "control": "configs/tiny_control.yaml",
    "longer": "configs/tiny_longer.yaml",
}
YAML, DOCS = "configs/black_point_study.yaml", "docs/black_point"
METRICS = (
    "luminance, black",
    "luminance, white",
    "luminance spread over the references', open",
    "digits",
)
PICTURED = {3.0: (11, 15, 54, 57), 1.0: (3, 7)}
"""Guidance scale -> numbers of the prompts that the picture shows."""


def main() -> None:
    """Runs what is missing."""
    demo = DemoConfig(run_dir="runs/black_point", num_held_out_images=2000)
    pack_digits(demo, "train")
    pack_digits(demo, "held_out")
    for name, yaml in RUNS.items():
        fine_tune(demo, yaml, Path(demo.run_dir) / name, f"train {name}")
    results = run_study(YAML, DOCS, demo.num_processes, METRICS)
    before_after(results).save(Path(DOCS) / "before_after.png")


def before_after(results: Results) -> Image.Image:
    """Lays out the same prompts and seeds, the base above the fine-tuned model."""
    shown = [shown_pictures(results, arm) for arm in ("base", "fine-tuned")]
    pictures = [[Image.open(path) for _, path in line] for line in shown]
    titles = [prompt.removesuffix(" background") for prompt, _ in shown[0]]
    lines = ["base: epsilon, leading timesteps, terminal SNR .0047"]
    lines.append("fine-tuned: v, trailing timesteps, zero terminal SNR")
    return caption_grid(lines, pictures, titles)


def shown_pictures(results: Results, arm: str) -> list[tuple[str, Path]]:
    """Returns each prompt of PICTURED with the file of an arm's first picture of it."""
    shown = []
    for scale, prompts in PICTURED.items():
        [cell] = [
            cell
            for cell in results.cells
            if cell.arm == arm and cell.varied["evaluate.guidance_scale"] == scale
        ]
        by_prompt = {
            number: (prompt, picture.path)
            for (number, prompt, image), picture in cell.pictures.items()
            if image == 0
        }
        shown += [by_prompt[prompt] for prompt in prompts]
    return shown


if __name__ == "__main__":
    main()
