"""docs/tutorial.md in an empty folder: its commands in order, as they stand, on tiny models.

Hub ids are folders of that name here, so that nothing is replaced; ADDED keeps it short.
"""

import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blackpoint.scripts.cli import main
from tests.test_readme import PAGES, SPAN, blocks
from tests.tiny_sdxl import make_tiny_sdxl
from tests.tiny_single_file import make_folder
from tests.tiny_vision import make_tiny_clip

PAGE = PAGES["docs/tutorial.md"]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ADDED = {
    "doctor": "limit_s=300",
    "data pack": "num_processes=1",
    "data check": "num_processes=1",
    "data encode": "batch_size=4",
    "buckets.enabled": "buckets.step_px=8",
    "train configs": "trainer.max_steps=2 trainer.accumulate_grad_batches=1 data.num_workers=0"
    " preview.num_steps=2 wandb.enabled=false",
    "data.shards=latents/sdxl": "data.buckets.step_px=8",
    "sample ": "num_steps=2",
    "search ": "num_steps=2 budget_nfe=8",
    "evaluate ": "num_steps=2 limit=4",
}
"""Part of a command -> keys that follow it: fewer steps, a side of 16 px, one process."""
SHADES = {"black": 10, "gray": 128, "white": 245}


def pictures(number: int) -> list[tuple[bytes, str]]:
    rng = np.random.default_rng(number)
    made = []
    for index in range(number):
        shade, level = list(SHADES.items())[index % 3]
        pixels = np.clip(level + rng.integers(-10, 10, (24, 24, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
        made.append((file.getvalue(), f"a photo of the {shade} night"))
    return made


def photos(folder: Path, number: int) -> None:
    folder.mkdir(parents=True)
    for index, (image, caption) in enumerate(pictures(number)):
        (folder / f"{index:04d}.png").write_bytes(image)
        (folder / f"{index:04d}.txt").write_text(caption)


def as_img2dataset(options: dict[str, str]) -> None:
    """Writes what its writer for webdataset leaves: a tar, and a table and statistics beside it."""
    folder = Path(options["--output_folder"])
    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for index, (image, caption) in enumerate(pictures(6)):
            key = f"{index:09d}"
            meta = json.dumps({"caption": caption, "key": key, "status": "success"})
            for end, body in (("png", image), ("txt", caption.encode()), ("json", meta.encode())):
                member = tarfile.TarInfo(f"{key}.{end}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    (folder / "00000.parquet").write_bytes(b"PAR1")
    (folder / "00000_stats.json").write_text("{}")


def as_hugging_face(options: dict[str, str]) -> None:
    """Writes the Parquet of a data set of images."""
    folder = Path(options["--local-dir"]) / "data"
    folder.mkdir(parents=True)
    images, texts = zip(*pictures(6), strict=True)
    columns = {"image": [{"bytes": image, "path": None} for image in images], "text": texts}
    pq.write_table(pa.table(columns), folder / "train-00000-of-00001.parquet")


OTHERS = {"img2dataset": as_img2dataset, "hf": as_hugging_face}
"""Programs of others that download -> what writes what they leave."""


def run(words: list[str]) -> int:
    if words[0] in OTHERS:
        OTHERS[words[0]](dict(zip(words, words[1:], strict=False)))
        return 0
    assert words[0] == "blackpoint"
    line = " ".join(words[1:])
    added = [key for part, keys in ADDED.items() if part in line for key in keys.split()]
    return main([*words[1:], *added])


@pytest.mark.slow
def test_its_commands_run_in_order_in_an_empty_folder(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "stable-diffusion-v1-5" / "stable-diffusion-v1-5", "sd1")
    make_tiny_sdxl(tmp_path / "stabilityai" / "stable-diffusion-xl-base-1.0")
    for name in ("yuvalkirstain/PickScore_v1", "openai/clip-vit-large-patch14"):
        make_tiny_clip(tmp_path / name, pipeline / "tokenizer")
    photos(tmp_path / "photos" / "train", 8)
    photos(tmp_path / "photos" / "held_out", 4)
    for language, body in BLOCK.findall(PAGE):
        if language == "python":
            exec(compile(body, "tutorial.md", "exec"), {})
            continue
        for line in body.splitlines():
            words = shlex.split(line, comments=True)
            # A machine without a GPU, or too slow to answer, is no fault of the page.
            assert run(words) in ((0, 1) if words[1] == "doctor" else (0,)), line
    named = {span for span in SPAN.findall(PAGE) if re.match(r"(runs|before|after)/|night\.", span)}
    assert len(named) > 5 and not [path for path in named if not Path(path).exists()]


def test_what_is_not_run_is_the_setup_and_the_page_that_waits_for_a_browser() -> None:
    setup, page = blocks(PAGE, "console")
    assert len(setup.splitlines()) == 2 and "make setup" in setup
    assert len(page.splitlines()) == 1 and page.startswith("blackpoint show ")
