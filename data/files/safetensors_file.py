"""Opens a .safetensors file of anyone's: names, shapes, number formats and metadata, checked.

The library refuses what does not fit: offsets that overlap or leave a gap, more or less data than
the header says. The header's size is looked at before it reads it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from blackpoint.data.files.errors import UserError

MAX_HEADER_BYTES = 25_000_000
"""Of SDXL with thousands of metadata entries and a preview picture: below 3 MB."""
OTHERS = {
    b"PK\x03\x04": "a pickle of PyTorch under another name, which can run any code when it is "
    "loaded; take the .safetensors file of the same model",
    b"\x80\x02": "a pickle under another name, which can run any code when it is loaded; take the "
    ".safetensors file of the same model",
    b"version ": "the pointer that Git LFS leaves for a file; fetch it: git lfs pull",
    b"<!DOCTYP": "a web page; download the file itself",
    b"GGUF": "a GGUF file, whose weights are quantised; take the .safetensors file of the same "
    "model",
}
"""First bytes of what people call .safetensors, and what it is."""


@dataclass(frozen=True)
class Header:
    """What a file says of its tensors; `formats` are safetensors' own names, such as F16."""

    shapes: dict[str, tuple[int, ...]]
    formats: dict[str, str]
    metadata: dict[str, str] = field(default_factory=dict)


@contextmanager
def opened(path: Path, field: str = "checkpoint") -> Iterator[Any]:
    """Yields the file of safetensors; UserError, naming `field`, where it can't be read."""
    try:
        _check_start(path, field)
        file: Any = safe_open(path, framework="pt")
    except OSError as error:
        raise UserError(f"{field}={path} can't be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(
            f"{field}={path} can't be read as a .safetensors file ({error}); it is damaged, or was "
            "not downloaded whole: fetch it again"
        ) from error
    with file as whole:
        yield whole


def read_header(path: Path, field: str = "checkpoint") -> Header:
    """Reads a file's header; raises UserError, naming `field`, for one that is damaged."""
    with opened(path, field) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
        formats = {name: str(one.get_dtype()) for name, one in slices.items()}
        return Header(shapes, formats, dict(file.metadata() or {}))


def read_tensor(path: Path, key: str) -> Any:
    """Returns one tensor of a file; it maps the file."""
    with opened(path) as file:
        return file.get_tensor(key)


def _check_start(path: Path, field: str) -> None:
    with path.open("rb") as file:
        start = file.read(8)
    for first, what in OTHERS.items():
        if start.startswith(first):
            raise UserError(f"{field}={path} is {what}")
    num_bytes = int.from_bytes(start, "little")
    if len(start) == 8 and num_bytes > MAX_HEADER_BYTES:
        raise UserError(
            f"{field}={path} says that its header has {num_bytes} bytes; the most that are read "
            f"are {MAX_HEADER_BYTES}: it is damaged or no .safetensors file"
        )
