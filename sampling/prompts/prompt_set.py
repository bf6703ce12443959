"""Prompts: texts from the command line or from a file, with their categories.

A prompt's index is its place among all prompts of its source, whatever part of them is asked for:
draws that are derived from it do not change with `limit` and `offset`.
"""

import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import BadPath, expanded, shipped
from blackpoint.sampling.prompts.files import (
    HALF_CHARACTER,
    NO_METADATA,
    SUFFIXES,
    PromptRow,
    file_category,
    prompt_file_rows,
)

log = logging.getLogger(__name__)

FORMATS = f"a file ({', '.join(SUFFIXES)}) or a folder of .txt files"
PUBLISHED = {
    "pickapic": "the captions of the hub's yuvalkirstain/pickapic_v1, test_unique, one per line",
    "drawbench": "the sheet of 200 prompts that https://imagen.research.google links to, as .csv",
    "geneval": "prompts/evaluation_metadata.jsonl of https://github.com/djghosh13/geneval",
}
"""Letters that the name of a benchmark's file begins with -> its prompts, which are not shipped."""


@dataclass(slots=True)  # not frozen: a million are made in half the time
class Prompt:
    """One prompt of a set."""

    text: str
    category: str = ""
    """What its benchmark files it under; "" if under nothing."""
    index: int = 0
    """Place among all prompts of the source, from 0."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else the file says of it, a plain dict; not to be written into, as it may be shared."""


def read_prompts(prompts: object) -> list[str]:
    """Returns the texts of `read_prompt_set`."""
    return [prompt.text for prompt in iterate_prompts(prompts)]


def read_prompt_set(prompts: object, limit: int | None = None, offset: int = 0) -> list[Prompt]:
    """Returns the prompts that a string, a list of strings, a file or a folder holds.

    At least one, at most `limit`, without the first `offset`; see
    `blackpoint.sampling.prompts.files` for the formats. A string is a file if it ends like one, or
    holds a slash and either is there or begins or ends as a path does; in a list every string is a
    prompt. File names may hold `*`. Empty lines are left out, and a warning says how many. Raises
    UserError.
    """
    return list(iterate_prompts(prompts, limit, offset))


def iterate_prompts(prompts: object, limit: int | None = None, offset: int = 0) -> Iterator[Prompt]:
    """Yields what `read_prompt_set` returns, reading no further than is asked for."""
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} must be at least 1; leave it out to take every prompt")
    if offset < 0:
        raise UserError(f"offset={offset} must not be negative; 0 starts at the first prompt")
    if not _is_path(prompts):
        texts = _given_texts(prompts)
        rows: Iterator[PromptRow] = ((text, "", NO_METADATA) for text in texts)
    else:
        rows = _rows_of_files(Path(prompts))  # type: ignore[arg-type]
    num_prompts = 0
    for text, category, metadata in rows:
        num_prompts += 1
        if num_prompts > offset:
            yield Prompt(text, category, num_prompts - 1, metadata)
            if limit is not None and num_prompts == offset + limit:
                return
    if num_prompts == 0:
        raise UserError(f"prompts={prompts} holds no prompt; write one per line")
    if num_prompts <= offset:
        shown = f"={prompts}" if _is_path(prompts) else ""
        raise UserError(f"offset={offset}: prompts{shown} holds {num_prompts}; give less than that")


def _given_texts(prompts: object) -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, list) or not all(isinstance(prompt, str) for prompt in texts):
        raise UserError(
            f"prompts={prompts!r} must be a prompt, a list of prompts, {FORMATS}; "
            'quote a prompt that reads as a number or holds a colon: ["1", "a: b"]'
        )
    if not texts:
        raise UserError("prompts is empty; give at least one prompt")
    if half := HALF_CHARACTER.search(" ".join(texts)):
        raise UserError(f"prompts: {half[0]!r} is half of a character; write texts in UTF-8")
    return texts


def prompts_path(text: str) -> str:
    """Returns the text; where it names a file or folder by ~ or a variable, that is expanded, and
    a file of configs/ that the working folder lacks is the one that came with the package.

    Raises BadPath.
    """
    text = shipped(text)
    if not text.startswith(("~", "$")) or not ("/" in text or text.lower().endswith(SUFFIXES)):
        return text
    try:
        path = expanded(text)
    except BadPath:
        if _is_path(text):
            raise
        return text
    return path if _is_path(path) else text


def _is_path(prompts: object) -> bool:
    if not isinstance(prompts, str):
        return isinstance(prompts, Path)
    if prompts.lower().endswith(SUFFIXES):
        return True
    looks_so = prompts.startswith(("/", "./", "../")) or prompts.endswith("/")
    return "/" in prompts and (looks_so or os.path.isfile(prompts) or os.path.isdir(prompts))


def _rows_of_files(path: Path) -> Iterator[PromptRow]:
    files, are_categories = _files(path)
    for file in files:
        num_empty = 0
        try:
            for row in prompt_file_rows(file, are_categories):
                if row is None:
                    num_empty += 1
                else:
                    yield row
        finally:
            if num_empty:
                log.warning("prompts=%s: left out %d empty lines", file, num_empty)


def _files(path: Path) -> tuple[list[Path], bool]:
    """Returns the files that a path stands for, and whether they are named for categories."""
    if path.is_file():
        return [path], False
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        remedy = "give a folder with one .txt file per category, or one file"
    elif "*" in path.name:
        files = sorted(path.parent.glob(path.name))
        remedy = "give a pattern that fits files"
    else:
        letters = re.sub(r"[^a-z]", "", path.stem.lower())
        sources = [f"save there {PUBLISHED[n]}, or " for n in PUBLISHED if letters.startswith(n)]
        raise UserError(
            f"prompts={path}: no such file; {''.join(sources)}give a prompt, a list, {FORMATS}; a "
            f"prompt that looks like a path is one in a list: prompts={json.dumps([str(path)])}"
        )
    if not files:
        raise UserError(f"prompts={path} holds no prompt file; {remedy}")
    for file, other in itertools.permutations(files, 2):
        is_part = other.stem.startswith(f"{file.stem}_")
        if is_part and file_category(other) == file_category(file):
            raise UserError(
                f"prompts={path}: {other.name} repeats prompts of {file.name}; give one of them, "
                "or a pattern such as *_val.txt"
            )
    return files, True
