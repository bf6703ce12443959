"""`make black-point`: three fine-tunes of the embedded base, measured against it.

Packs the digits, trains (each run resumes or is skipped when it is done), evaluates
configs/black_point.yaml, and leaves rows, table and picture in docs/black_point.
"""

import shutil
from pathlib import Path

from PIL import Image

from blackpoint.sampling.evaluation.black_point import BlackPointConfig, image_path
from blackpoint.sampling.report.rows import Row
from blackpoint.sampling.runtime.pictures import caption_grid
from blackpoint.scripts.config import load
from blackpoint.scripts.miniature import evaluation
from blackpoint.scripts.miniature.demo_steps import fine_tune, pack_digits
from blackpoint.scripts.verbs.demo import DemoConfig

RUNS = {
    "fine_tuned": "configs/tiny_zero_snr.yaml",
    "control": "configs/tiny_control.yaml",
    "longer": "configs/tiny_longer.yaml",
}
DOCS = Path("docs/black_point")
KEPT = ("rows.csv.gz", "summary.md", "summary.json", "study.json")
PICTURED = {"black_g3": (1, 5), "white_g3": (4, 7), "open_g1": (3, 7)}


def main() -> None:
    """Runs what is missing."""
    demo = DemoConfig(run_dir="runs/black_point")
    pack_digits(demo, "train")
    pack_digits(demo, "held_out")
    for name, yaml in RUNS.items():
        fine_tune(demo, yaml, Path(demo.run_dir) / name, f"train {name}")
    study = load(BlackPointConfig, ["configs/black_point.yaml"])
    rows, _ = evaluation.evaluate(study)
    DOCS.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copy(Path(study.output) / name, DOCS / name)
    shutil.copytree(
        Path(study.output) / "images" / "control", DOCS / "images" / "control", dirs_exist_ok=True
    )
    before_after(study, rows).save(DOCS / "before_after.png")
    print((DOCS / "summary.md").read_text(encoding="utf-8"))


def before_after(study: BlackPointConfig, rows: list[Row]) -> Image.Image:
    """Lays out the same prompts and seeds, the base above the fine-tuned model."""
    prompts = {(row.cell, row.index): row.prompt for row in rows}
    shown = [(cell, index) for cell, indices in PICTURED.items() for index in indices]
    pictures = [
        [Image.open(image_path(Path(study.output), name, cell, index)) for cell, index in shown]
        for name in ("base", "fine_tuned")
    ]
    titles = [prompts[key].removesuffix(" background") for key in shown]
    lines = ["base: epsilon, leading timesteps, terminal SNR .0047"]
    lines.append("fine-tuned: v, trailing timesteps, zero terminal SNR")
    return caption_grid(lines, pictures, titles)


if __name__ == "__main__":
    main()
