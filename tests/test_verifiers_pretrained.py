"""Models by hub id: what is fetched, and what a user is told who cannot fetch or keep it."""

import errno
from pathlib import Path
from typing import Any

import pytest

from blackpoint.data.files.errors import RunFailed, UserError
from blackpoint.sampling.verifiers.kind import MODEL_FILES
from blackpoint.sampling.verifiers.models.pretrained import find_folder


def fetched(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> Any:
    """Finds a model by hub id while the hub gives `answer`; returns folder and patterns."""
    asked: dict[str, Any] = {}

    def snapshot_download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.update(hub_id=hub_id, files=allow_patterns)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return find_folder("someone/model", "checkpoint", "other/model"), asked


def test_safetensors_and_text_files_are_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, asked = fetched(monkeypatch, tmp_path)
    assert folder == tmp_path and asked["hub_id"] == "someone/model"
    assert asked["files"] == list(MODEL_FILES)


def test_each_failure_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot be fetched.*hf download someone/model.*other/mod"):
        fetched(monkeypatch, ConnectionError("no network"))
    with pytest.raises(UserError, match="may not be written to the hub's cache"):
        fetched(monkeypatch, PermissionError(errno.EACCES, "not yours"))
    with pytest.raises(RunFailed, match="checkpoint=someone/model does not fit on the disk"):
        fetched(monkeypatch, OSError(errno.ENOSPC, "full"))
    with pytest.raises(ZeroDivisionError):  # our own mistakes are not the network's
        fetched(monkeypatch, ZeroDivisionError())
