"""Writes CLIP's tokenizer as transformers reads it: python -m
blackpoint.scripts.measurements.make_clip_tokenizer output=FOLDER.

From the merges that open-clip-torch ships (bpe_simple_vocab_16e6.txt.gz of OpenAI's CLIP). The
vocabulary follows from them: 256 bytes, the same at the end of a word, one token a merge, and the
two that begin and end a text (Radford et al. 2021; Sennrich et al. 2016).
"""

import gzip
import json
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from omegaconf import MISSING

from blackpoint.sampling.checkpoints.saving import write_json
from blackpoint.sampling.export.export import moved_into_place, require_empty
from blackpoint.scripts.config import load
from blackpoint.scripts.measurements.make_random_base import (
    NUM_TOKENS,
    PROMPT_TOKENS,
    byte_letters,
)
from blackpoint.scripts.stand_alone import run_script

START, END = "<|startoftext|>", "<|endoftext|>"
SETTINGS = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": PROMPT_TOKENS,
    "bos_token": START,
    "eos_token": END,
    "pad_token": END,
    "unk_token": END,
}


@dataclass
class ClipTokenizerConfig:
    """A folder with vocab.json, merges.txt and tokenizer_config.json."""

    output: str = MISSING
    """Folder to write; must be empty or not exist."""


def make(config: ClipTokenizerConfig) -> Path:
    """Writes the folder and returns it; it appears whole or not at all."""
    packed = files("open_clip").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    letters = byte_letters()
    num_merges = NUM_TOKENS - 2 * len(letters) - 2
    merges = lines[1 : 1 + num_merges]  # the first line is a version
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["".join(merge.split()) for merge in merges]
    vocabulary = {token: number for number, token in enumerate([*tokens, START, END])}
    output = Path(config.output)
    require_empty(output)
    with moved_into_place(output) as folder:
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        text = "\n".join(["#version: 0.2", *merges, ""])
        (folder / "merges.txt").write_text(text, encoding="utf-8")
        write_json(folder / "tokenizer_config.json", SETTINGS)
    return output


def main(argv: list[str]) -> int:
    """Is the command; returns the exit status, 2 for wrong input."""
    return run_script("make_clip_tokenizer", lambda: print(make(load(ClipTokenizerConfig, argv))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
