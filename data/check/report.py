"""Counts of `data check`: sizes, luminance, captions, duplicates.

Copies are found by 64-bit hashes: of the image file's bytes (the same file twice), of the caption,
of the key (the same key in several shards), and of the picture: equal gradient hashes and mean
luminances within .02 mean the same picture, scaled or compressed otherwise. A copy is counted as
often as it returns: n equal files are n - 1 copies.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from blackpoint.data.bad_samples import BadSample, kind
from blackpoint.data.index.index import Index
from blackpoint.data.record import RECORD

NEARLY_BLACK, NEARLY_WHITE = 0.05, 0.95
MAX_WORDS = 75
"""CLIP's text encoders read 77 tokens, two of them marks; a word is one token or more."""
NEAR_LUMINANCE = 0.02
NUM_EXAMPLES = 5
PERCENTILES = {"minimum": 0, "p5": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95, "maximum": 100}
Spread = dict[str, float]
"""How some values are spread: the PERCENTILES, by name."""


@dataclass
class Luminance:
    """Mean luminances of the images, 0 black to 1 white."""

    histogram: list[int]
    """Images in each tenth of [0, 1]."""
    share_nearly_black: float
    """Below .05."""
    share_nearly_white: float
    """Above .95."""
    weights: str
    """Of the colours, as the index names them: rec_601 or rec_709."""


@dataclass
class Captions:
    """Lengths of the captions."""

    characters: Spread
    words: Spread
    num_cut: int
    """Captions of more than 75 words, whose end a CLIP text encoder never sees."""
    num_several: int = 0
    """Samples with several captions; of each its longest counts."""


@dataclass
class Copies:
    """Samples that repeat an earlier one, and the keys of the first pairs."""

    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class IndexState:
    """State of the index, or its comparison with the shards."""

    state: Literal["valid", "stale", "written", "absent"]
    folder: str
    notes: list[str]


@dataclass
class CheckReport:
    """Contents of the shards."""

    shards: str
    num_shards: int
    num_bytes: int
    num_samples: int
    bad: list[BadSample]
    sizes: dict[str, Spread] = field(default_factory=dict)
    """Of width and height, in pixels, and of aspect, width / height."""
    resolution: int | None = None
    num_enlarged: int | None = None
    """Images whose shorter side is below `resolution`."""
    luminance: Luminance | None = None
    captions: Captions | None = None
    copies: dict[str, Copies] = field(default_factory=dict)
    index: IndexState = field(default_factory=lambda: IndexState("absent", "", []))
    encoding: dict[str, Any] | None = None
    """Origin of the latents, for shards that `data encode` wrote."""

    @property
    def bad_kinds(self) -> dict[str, int]:
        """How many samples are bad for one kind of reason, the most frequent first."""
        return dict(Counter(kind(sample.reason) for sample in self.bad).most_common())

    def as_json(self) -> dict[str, Any]:
        """Returns the report for json.dumps: counts of the bad samples instead of their list."""
        values = dataclasses.asdict(self)
        del values["bad"]
        return values | {"num_bad": len(self.bad), "bad_kinds": self.bad_kinds}


def summarize(
    pattern: str,
    index: Index,
    sizes: Index,
    facts: np.ndarray,
    bad: list[BadSample],
    resolution: int | None,
) -> CheckReport:
    """Returns the report on the samples of an index, with a row of `facts` (FACT) each.

    Widths, heights and luminances are those of the same shards in `sizes`; without a width there
    are none.
    """
    num_shards, num_bytes = len(index.shard_names), sum(index.shard_bytes.values())
    report = CheckReport(pattern, num_shards, num_bytes, len(index), bad, resolution=resolution)
    if not len(index):
        return report
    records = sizes.records if len(sizes) else np.zeros(0, RECORD)
    if len(sizes) > len(index):  # of the whole folder
        records = np.concatenate([sizes.rows(name) for name in index.shard_names])
    width, height = (np.array(records[name], np.float64) for name in ("width", "height"))
    if width.any():
        report.sizes = {
            "width": spread(width),
            "height": spread(height),
            "aspect": spread(width / np.maximum(height, 1)),
        }
        luminance = np.array(records["luminance"])
        report.luminance = Luminance(
            np.histogram(luminance, bins=10, range=(0, 1))[0].tolist(),
            float((luminance < NEARLY_BLACK).mean()),
            float((luminance > NEARLY_WHITE).mean()),
            sizes.luminance_weights,
        )
        if resolution:
            report.num_enlarged = int((np.minimum(width, height) < resolution).sum())
    report.captions = Captions(
        spread(facts["characters"]),
        spread(facts["words"]),
        int((facts["words"] > MAX_WORDS).sum()),
        int((facts["captions"] > 1).sum()),
    )
    report.copies = {
        "images": _copies(index, facts["image_hash"]),
        "near_images": _near_copies(index, facts),
        "captions": _copies(index, facts["caption_hash"]),
        "keys": _copies(index, facts["key_hash"]),
    }
    return report


def spread(values: np.ndarray) -> Spread:
    """Returns the percentiles of one or more values."""
    percentiles = np.percentile(values, list(PERCENTILES.values())).tolist()
    return dict(zip(PERCENTILES, percentiles, strict=True))


def _copies(index: Index, hashes: np.ndarray) -> Copies:
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    return _examples(index, order, ordered[1:] == ordered[:-1])


def _near_copies(index: Index, facts: np.ndarray) -> Copies:
    """Counts pictures that look alike but are not the same file; flat ones are left out."""
    luminance = np.array(index.records["luminance"])
    order = np.lexsort((luminance, facts["gradient_hash"]))
    gradient, image = facts["gradient_hash"][order], facts["image_hash"][order]
    same = (gradient[1:] == gradient[:-1]) & (gradient[1:] != 0) & (image[1:] != image[:-1])
    return _examples(index, order, same & (np.diff(luminance[order]) < NEAR_LUMINANCE))


def _examples(index: Index, order: np.ndarray, same: np.ndarray) -> Copies:
    """Counts the pairs of neighbours in `order` that are the `same`, and names the first."""
    pairs = zip(order[:-1][same][:NUM_EXAMPLES], order[1:][same][:NUM_EXAMPLES], strict=True)
    examples = [(_name(index, int(first)), _name(index, int(second))) for first, second in pairs]
    return Copies(int(same.sum()), examples)


def _name(index: Index, number: int) -> str:
    shard = index.shard_names[int(index.record(number)["shard"])]
    return f"{shard}:{index.key(number)}"
