"""The real pictures that a set is compared with: measured once, kept for whoever asks next.

What is kept is DIGEST.npz in `reference_cache`, or in references/ of the evaluation where that is
not set. The digest is of the pictures (names, sizes in bytes, times of change), of the version of
the decoder, of the size in px that they are cut to and of the network's settings.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blackpoint.data.files.signals import stop_if_asked
from blackpoint.data.files.whole_file import write_whole
from blackpoint.data.images.decode import DECODER_VERSION
from blackpoint.sampling.evaluation.metric import FEATURE_COLUMN, Measure
from blackpoint.sampling.evaluation.metrics.set_models import read_reference
from blackpoint.sampling.evaluation.rows import column_digest
from blackpoint.sampling.pixels.luminance import border_luminance, image_luminance
from blackpoint.sampling.verifiers.reference import reference_pictures

ARRAYS = ("luminance", "border_luminance", "features")
TOLERANCE = 1e-4
"""Within which measurements of the same pictures count as equal."""
_EARLIER_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Reference:
    """The real pictures of a folder, as our images are measured."""

    luminance: np.ndarray
    """(M,)"""
    border_luminance: np.ndarray
    """(M,)"""
    features: Tensor | None
    """(M, d) float32, where features are asked for."""
    num_resized: int
    """Pictures that had another size in px."""
    measured_otherwise: bool = False
    """An earlier version, which decoded references otherwise than training images, measured other
    values of the same files."""

    def notes(self, height: int, width: int, num_images: int) -> list[str]:
        """Returns notes on the references beside `num_images` generated images."""
        notes, count = [], len(self.luminance)
        if self.measured_otherwise:
            notes.append(
                "the references are decoded as training images are from here on (orientation, "
                "transparency, 16 bits, colour profiles), and measure otherwise than before: so do "
                "FID, KID and every other distance to them"
            )
        if self.num_resized:
            notes.append(
                f"{self.num_resized} of {count} references had another size than {width} x "
                f"{height} px and were resized and cut"
            )
        if count != num_images:
            notes.append(
                f"{count} references and {num_images} images: FID is biased upwards in small "
                "sets; compare FID of equal numbers, or KID, which is unbiased"
            )
        return notes


def measure_reference(
    source: str,
    folder: Path,
    network: str | None,
    measure: Measure | None,
    size: tuple[int, int],
    batch_size: int,
) -> Reference:
    """Measures the real pictures in `source`, or reads the measurements that `folder` keeps.

    network: digest of the settings of the features that are asked for; measure: gives them, where
    it could be loaded. size: height and width in px. Raises UserError for fewer than two pictures,
    or a broken one.
    """
    files = reference_pictures(source, "sets.reference")
    path = folder / f"{_digest(files, size, network)}.npz"
    kept = _read(path)
    if kept is not None:
        return kept
    reference = _measured(files, measure, size, batch_size)
    earlier = [file for file in files if file.suffix.lower() in _EARLIER_SUFFIXES]
    before = _read(folder / f"{_digest(earlier, size, network, None)}.npz")
    if before is not None and not _is_same(before, reference):
        reference = replace(reference, measured_otherwise=True)
    if network is None or measure is not None:  # else it lacks the features that its name tells
        write_whole(path, _packed(reference))
    return reference


@torch.no_grad()
def _measured(
    files: Sequence[Path], measure: Measure | None, size: tuple[int, int], batch_size: int
) -> Reference:
    luminances, borders, features = [], [], []
    num_resized = 0
    for start in range(0, len(files), batch_size):
        stop_if_asked()
        batch = [read_reference(file, *size) for file in files[start:][:batch_size]]
        pixels = torch.cat([picture for picture, _ in batch])
        num_resized += sum(is_other for _, is_other in batch)
        images = pixels.float() / 255
        luminances.append(image_luminance(images).double().numpy())
        borders.append(border_luminance(images).double().numpy())
        if measure is not None:
            features += [row[FEATURE_COLUMN] for row in measure(pixels, ())]
    whole = torch.from_numpy(np.stack(features)) if features else None
    return Reference(np.concatenate(luminances), np.concatenate(borders), whole, num_resized)


def _digest(
    files: Sequence[Path],
    size: tuple[int, int],
    network: str | None,
    decoder: int | None = DECODER_VERSION,
) -> str:
    """decoder: None for measurements from before the digest held its version."""
    pictures = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    versions = [] if decoder is None else [decoder]
    return column_digest([pictures, *size, network, *versions])


def _is_same(first: Reference, second: Reference) -> bool:
    """Tells whether two measurements of a folder agree, features as far as both have them."""
    pairs = [(getattr(first, name), getattr(second, name)) for name in ARRAYS]
    known = [pair for pair in pairs if pair[0] is not None and pair[1] is not None]
    return all(a.shape == b.shape and np.allclose(a, b, atol=TOLERANCE) for a, b in known)


def _packed(reference: Reference) -> bytes:
    arrays = {name: getattr(reference, name) for name in (*ARRAYS, "num_resized")}
    content = io.BytesIO()
    np.savez(content, **{name: array for name, array in arrays.items() if array is not None})
    return content.getvalue()


def _read(path: Path) -> Reference | None:
    """Reads kept measurements; None where none can be read."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            features = torch.from_numpy(kept["features"]) if "features" in kept else None
            return Reference(
                kept["luminance"], kept["border_luminance"], features, int(kept["num_resized"])
            )
    except (OSError, ValueError, LookupError, zipfile.BadZipFile):
        return None
