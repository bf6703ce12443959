"""sample.json: the settings of the images in a folder, by which the same command continues.

An image is there or not: files are written whole. Settings that decide images must be the same;
the checkpoint is known by the content of its weights, not by its path.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.whole_file import write_new
from blackpoint.sampling.choices import recorded_formats
from blackpoint.sampling.export.placement import require_empty
from blackpoint.sampling.options import ROUNDING_KEYS, SampleConfig
from blackpoint.sampling.runtime.precision import settle

RECORD, FORMATS, CONTENT = "sample.json", ("dtype", "tf32"), "checkpoint_digest"
DIGEST_BYTES = 12
RESULT_INVARIANT_KEYS = (*ROUNDING_KEYS, "compile")
"""Keys that change images only by rounding, or not at all."""
RESOLVED = ("seed", "num_images", "prompts")
"""Keys that are kept in resolved form: the seeds, and a digest of the texts."""


class SampleRecord:
    """The settings of config.output, of this command and, where it continues, of the one before."""

    def __init__(self, config: SampleConfig, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Raises UserError where the folder holds something else, or images of other settings."""
        self.path = Path(config.output) / RECORD
        self._checkpoint = config.checkpoint
        settings = {
            k: v for k, v in asdict(config).items() if k not in (*RESULT_INVARIANT_KEYS, *RESOLVED)
        }
        texts = json.dumps(list(prompts)).encode()
        digest = blake2b(texts, digest_size=DIGEST_BYTES).hexdigest()
        settings |= {"seeds": list(seeds), "prompts_digest": digest}
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.saved = self._read()
        if self.saved is not None:
            self._check_same(self.saved)

    def settled_formats(self, device: torch.device, say: Any) -> dict[str, Any]:
        """Returns dtype and tf32 on `device`; UserError where images there have others."""
        kept = None if self.saved is None else recorded_formats(self.saved, FORMATS)[0]
        asked = {name: self.settings[name] for name in FORMATS}
        formats = settle(f"output={self.path.parent}", asked, device, say, kept)
        self.settings |= formats
        return formats

    def keep(self, digest: str) -> None:
        """Writes sample.json, if it is not there; `digest` is the checkpoint's.

        Raises UserError where another process has begun the folder meanwhile, with other settings
        or another checkpoint.
        """
        if self.saved is not None:
            return
        settings = self.settings | {CONTENT: digest}
        try:
            write_new(self.path, json.dumps(settings, indent=1) + "\n")
            self.saved = settings
        except FileExistsError:
            self.saved = self._read() or {}
            self._check_same(self.saved)
            self.check_checkpoint(digest)

    def is_of_another_name(self) -> bool:
        """Whether `checkpoint` or `lora` is written otherwise than for the images there."""
        if self.saved is None:
            return False
        names = ("checkpoint", "lora")
        return any(self.saved.get(name) != self.settings[name] for name in names)

    def check_checkpoint(self, digest: str) -> None:
        """Raises UserError where images there are of another checkpoint."""
        merged = " with its lora" if self.settings["lora"] else ""
        if self.saved is not None and self.saved.get(CONTENT) != digest:
            raise UserError(
                f"checkpoint={self._checkpoint}{merged} has other weights, or another process, "
                f"than output={self.path.parent} was sampled with; choose another output"
            )

    def _read(self) -> dict[str, Any] | None:
        output = self.path.parent
        if not self.path.is_file():
            unfinished = f".{RECORD}."  # a kill came while it was written
            files = list(output.iterdir()) if output.is_dir() else []
            if not files or not all(file.name.startswith(unfinished) for file in files):
                require_empty(output)
            return None
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{self.path} is not JSON; choose another output") from None
        if not isinstance(saved, dict):
            raise UserError(f"{self.path} holds no settings; choose another output")
        return saved

    def _check_same(self, saved: dict[str, Any]) -> None:
        defaults = asdict(SampleConfig(checkpoint="", prompts="", output=""))
        for key in sorted(self.settings.keys() - {"checkpoint", "lora", "single_file"}):
            there, now = saved.get(key, defaults.get(key)), self.settings[key]
            if there == now or (key in FORMATS and now == "auto"):
                continue
            what = f"{key}: {there!r:.80} there, {now!r:.80} now"
            what = "other prompts" if key == "prompts_digest" else what
            raise UserError(
                f"output={self.path.parent} holds images of other settings ({what}); choose "
                "another output, or continue it with its own"
            )
