"""kohya's metadata: one JSON object of {image: {"caption": "...", "tags": "..."}}, meta_cap.json.

As in its trainer, tags follow the caption after ", ", or stand alone, and an image is a path, or a
name without suffix. The file is read as a whole, as its own tools do.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blackpoint.data.bad_samples import BadSample
from blackpoint.data.files.errors import UserError
from blackpoint.data.images.decode import IMAGE_SUFFIXES, BadImage
from blackpoint.data.pack.image_folder import EITHER_CASE, suffix_of

SEPARATOR = ", "
_NAME = re.compile(r"meta_.*\.json", re.IGNORECASE)


def is_metadata_name(name: str) -> bool:
    """Tells whether a file has a name as kohya's tools use: meta_cap.json, meta_lat.json."""
    return _NAME.fullmatch(name) is not None


def is_metadata(path: Path) -> bool:
    """Tells whether a file is a JSON object of objects, as kohya's metadata are."""
    try:
        entries = _entries(path)
    except UserError:
        return False
    return bool(entries) and all(isinstance(values, dict) for values in entries.values())


def metadata_rows(
    table: Path, columns: Sequence[str], lines: bool
) -> Iterator[tuple[str, dict[str, Any] | BadSample]]:
    """Yields the place of each image, and its name and caption as two `columns`.

    `lines`: every line of a caption gets the tags. Raises UserError for a file of another form.
    """
    for image, values in _entries(table).items():
        where = f"{table.name}: {image}"
        if not isinstance(values, dict):
            yield where, BadSample(where, "no caption: no JSON object")
            continue
        tags = values.get("tags")
        if tags is not None and not isinstance(tags, str):
            yield where, BadSample(where, "no caption: tags is no text")
            continue
        tags = SEPARATOR.join(filter(None, map(str.strip, (tags or "").split("\n"))))
        caption = values.get("caption")
        captions = _tagged(caption, tags, lines) if tags else caption
        yield where, dict(zip(columns, (image, captions), strict=True))


def _tagged(caption: Any, tags: str, lines: bool) -> Any:
    """Returns the caption, each text of a list, or each line of a text, with the tags after it."""
    if isinstance(caption, list):
        blank = [text is None or (isinstance(text, str) and not text.strip()) for text in caption]
        texts = [text for text, no in zip(caption, blank, strict=True) if not no] or [""]
        return [_tagged(text, tags, lines) if isinstance(text, str) else text for text in texts]
    if caption is not None and not isinstance(caption, str):
        return caption  # refused by who reads it
    texts = [text for text in (caption or "").split("\n") if text.strip()] if lines else []
    texts = texts or [caption or ""]
    return "\n".join(SEPARATOR.join(filter(None, (text.strip(), tags))) for text in texts)


def image_name(folder: Path, image: str) -> str:
    """Returns the image, relative to `folder`, that kohya's tools would take; raises BadImage."""
    names = [image] if suffix_of(image) in IMAGE_SUFFIXES else []
    names = names or [f"{image}.{suffix}" for suffix in EITHER_CASE]
    # isfile is False for what is too long or no name; an absolute name is looked up as it is.
    files = [name for name in names if os.path.isfile(folder / name)]
    if not files and not os.path.isabs(image):  # as seen from where the tool was run, perhaps here
        files = [os.path.abspath(name) for name in names if os.path.isfile(name)]
    if not files:
        raise BadImage("no image: no such file")
    if len(files) > 1:
        raise BadImage(f"no image: {' and '.join(files)} are of that name; write the suffix")
    name = files[0]
    if os.path.isabs(name):
        name = os.path.relpath(os.path.realpath(name), os.path.realpath(folder))
    return name


def _entries(table: Path) -> dict[str, Any]:
    try:
        entries = json.loads(table.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{table}: can't be read as JSON: {error}") from None
    if not isinstance(entries, dict):
        raise UserError(
            f"{table}: is no JSON object of images. kohya's metadata is "
            '{"image": {"caption": "a text"}}; name another file with captions_file'
        )
    return entries
