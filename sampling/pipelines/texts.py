"""Prompts of a pipeline, encoded once each, alone, and held as long as anybody holds the prompt.

What a text encoder says of a prompt then depends on no other one. Rows of a batch are put together
from what was said of each: tensors of one row along their first dimension, lists one after the
other; what has no row per prompt, such as positions, is the same for all.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Text:
    """A prompt and, by the arguments of the call, what `encode_prompt` returned."""

    prompt: str
    encoded: dict[str, Any] = field(default_factory=dict)

    def shapes(self) -> list[Any]:
        """Returns the shapes of all that it was encoded to."""
        return [_shapes(value) for value in self.encoded.values()]


@dataclass(frozen=True)
class Texts:
    """A prompt per image."""

    rows: tuple[Text, ...]

    @classmethod
    def of(cls, prompts: Sequence[str]) -> "Texts":
        """Returns new texts, equal prompts sharing one."""
        known = {prompt: Text(prompt) for prompt in prompts}
        return cls(tuple(known[prompt] for prompt in prompts))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | Tensor) -> "Texts":
        if isinstance(rows, slice):
            return Texts(self.rows[rows])
        return Texts(tuple(self.rows[row] for row in rows.tolist()))

    def followed_by(self, others: Sequence["Texts"]) -> "Texts":
        """Returns these rows and then those of the others."""
        return Texts(sum((other.rows for other in others), self.rows))

    @property
    def prompts(self) -> list[str]:
        return [text.prompt for text in self.rows]


class Encoding:
    """In place of a pipeline's `encode_prompt`: encodes the rows of `texts` one by one, if any."""

    def __init__(self, encode: Callable[..., Any]) -> None:
        self._encode, self._signature = encode, inspect.signature(encode)
        self.texts: Texts | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.texts is None:
            return self._encode(*args, **kwargs)
        bound = self._signature.bind(*args, **kwargs)
        whole = dict(bound.arguments)
        parts = []
        for row, text in enumerate(self.texts.rows):
            bound.arguments.update({k: self._row(k, v, row) for k, v in whole.items()})
            key = repr(bound.arguments)
            if key not in text.encoded:
                with torch.no_grad():
                    text.encoded[key] = self._encode(*bound.args, **bound.kwargs)
            parts.append(text.encoded[key])
        return _joined(parts)

    def _row(self, name: str, value: Any, row: int) -> Any:
        assert self.texts is not None
        is_per_row = "prompt" in name and isinstance(value, list) and len(value) == len(self.texts)
        return [value[row]] if is_per_row else value


def _joined(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, tuple):
        return tuple(_joined(column) for column in zip(*parts, strict=True))
    if isinstance(first, list):
        return [item for part in parts for item in part]
    if isinstance(first, Tensor) and first.ndim and len(first) == 1:
        return torch.cat(list(parts))
    return first


def _shapes(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_shapes(part) for part in value]
    return tuple(value.shape) if isinstance(value, Tensor) else None
