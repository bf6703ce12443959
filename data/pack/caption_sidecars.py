"""Captions in a file beside each image, of the same name: .txt, .caption (kohya's) or .json."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

from blackpoint.data.bad_samples import BadSample
from blackpoint.data.caption_text import CAPTION_FIELD, Captions, json_captions, text_captions
from blackpoint.data.images.decode import IMAGE_SUFFIXES, BadImage
from blackpoint.data.images.pictures import MAX_CAPTION_BYTES, read_source_file
from blackpoint.data.pack.image_folder import (
    CaptionedFile,
    has_image_beside,
    printable,
    same_stem,
    sample_key_among,
    suffix_of,
    walk,
)

_NOT_CAPTIONS = ("readme", "license", "licence", "requirements")


def captions_beside(
    folder: Path, suffix: str, field: str = CAPTION_FIELD, lines: bool = False
) -> Iterator[CaptionedFile | BadSample]:
    """Yields every image once, with the captions beside it or the reason why it has none.

    A caption without an image is named as well. Of a .json the captions are its "caption" or, where
    it has none, its `field`; with `lines` each line of a text file is one.
    """
    read = functools.partial(_json, field) if suffix == "json" else text_captions
    for directory, names in walk(folder):
        for name in names:
            if suffix_of(name) not in IMAGE_SUFFIXES:
                continue
            relative = os.path.join(directory, name)
            siblings = same_stem(names, name)
            sidecars = [sibling for sibling in siblings if suffix_of(sibling) == suffix]
            if not sidecars:
                missing = f"{printable(os.path.splitext(name)[0])}.{suffix}"
                yield BadSample(printable(relative), f"no caption: no {missing} beside it")
                continue
            try:
                path = folder / directory / sidecars[-1]
                captions = read(read_source_file(path, MAX_CAPTION_BYTES), lines)
            except BadImage as reason:
                yield BadSample(printable(relative), str(reason))
                continue
            key = sample_key_among(siblings, relative)
            yield CaptionedFile(key, printable(relative), folder / relative, captions)
        for name in names if suffix != "json" else []:  # a .json may be anything
            stem = os.path.splitext(name)[0]
            if suffix_of(name) != suffix or stem.lower() in _NOT_CAPTIONS:
                continue
            if not has_image_beside(names, name):
                relative = os.path.join(directory, name)
                yield BadSample(printable(relative), "no image beside the caption")


def _json(field: str, content: bytes, lines: bool) -> Captions:
    try:
        return json_captions(content, CAPTION_FIELD, lines)
    except BadImage as reason:
        if "has no" not in str(reason):
            raise
    return json_captions(content, field, lines)
