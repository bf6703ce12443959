"""The ablation: python -m blackpoint.scripts.studies.ablation makes its data, runs its sweep and
keeps its tables.

configs/ablation.yaml says what is trained and evaluated. Every step is skipped when its result is
there, so the same command continues a night that was cut short.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blackpoint.data.files.whole_file import write_whole
from blackpoint.sampling.report.page import Page
from blackpoint.sampling.report.results import Results
from blackpoint.sampling.report.results_tables import marked_change, seed_difference, settings_of
from blackpoint.sampling.statistics.table import Table
from blackpoint.scripts.config import load
from blackpoint.scripts.miniature.digits import Split, packed_digits
from blackpoint.scripts.stand_alone import run_script
from blackpoint.scripts.studies.study import blackpoint, run_study

YAML, RUN_DIR = "configs/ablation.yaml", Path("runs/ablation")
BASE, RESOLUTION = "assets/tiny_sd", 64
METRICS = [
    "luminance error",
    "luminance, black",
    "luminance, white",
    "luminance spread over the references', open",
    "noise-invariance",
    "KID",
    "digits",
]
FULL = "+multiscale"
FIXES = (
    ("v-prediction", "v_leading", "eps_leading", ""),
    ("zero terminal SNR", "v_zero_leading", "v_leading", "all_but_zero_snr"),
    ("trailing timesteps", "v_zero_trailing", "v_zero_leading", "all_but_trailing"),
    ("guidance rescale", "+rescale", "v_zero_trailing", "all_but_rescale"),
    ("resolution shift", "+shift", "+rescale", "all_but_shift"),
    ("multi-scale loss", "+multiscale", "+shift", "+shift"),
)
"""Fix, the link of the chain that adds it, the link before, all fixes without it. Without v there
is none: epsilon-prediction at zero terminal SNR divides by 0."""


@dataclass
class AblationConfig:
    """How much data, and where the tables go."""

    num_train_images: int = 9000
    """Compositions of real digits that are trained on; two of each of 4,500 digits."""
    num_held_out_images: int = 2000
    """Compositions of held-out digits: the references."""
    seed: int = 0
    """Seed of the compositions."""
    num_processes: int = 2
    """Cells that are run at once."""
    output: str = "docs/ablation"
    """Folder of the tables."""


def ablate(config: AblationConfig) -> None:
    """Runs every step that is not done yet."""
    counts: dict[Split, int] = {
        "train": config.num_train_images,
        "held_out": config.num_held_out_images,
    }
    for split, count in counts.items():
        shards = packed_digits(RUN_DIR, split, count, config.seed)
        latents = RUN_DIR / "latents" / split
        arguments = [f"source={shards}", f"checkpoint={BASE}", f"output={latents}"]
        arguments += [f"resolution={RESOLUTION}", "dtype=float32", "batch_size=64"]
        if not latents.exists():
            blackpoint("data", "encode", *arguments, "num_workers=0")
    results = run_study(YAML, config.output, config.num_processes, METRICS)
    write_whole(Path(config.output) / "fixes.md", fixes(results))


def fixes(results: Results) -> str:
    """Writes what each fix changes: added to the chain, and left out of all fixes, as Markdown."""
    settings = settings_of(results)
    rows: list[dict[str, Any]] = []
    for fix, with_it, before, without in FIXES:
        pairs = {"added": (with_it, before), "in all": (FULL, without)}
        for kind, (fixed, unfixed) in pairs.items():
            if fixed in settings and unfixed in settings:
                changes = {
                    name: marked_change(seed_difference(settings[fixed], settings[unfixed], name))
                    for name in METRICS
                }
                rows.append({"fix": fix, "": kind, **changes})
    columns = {"fix": "", "": "", **dict.fromkeys(METRICS, "+.3f")}
    note = (
        "Change of the metric by the fix, mean over three trainings, paired by seed; 95 % interval "
        "of Student's t. Added: to the link before it in the chain. In all: the full set minus the "
        "full set without it. Bold: the interval leaves out 0."
    )
    return Page("", [Table(rows, columns, note=note)]).markdown()


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("ablation", lambda: ablate(load(AblationConfig, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
