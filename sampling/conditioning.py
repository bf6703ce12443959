"""From prompts to a UNet's conditioning: text embeddings, class labels, or nothing.

The empty prompt stands for "no condition" in every case: the text "", the class beyond the last, or
nothing. A UNet without text still has the inputs of its class: one token of one zero.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.notes import first

log = logging.getLogger(__name__)

TEXT_BATCH = 64
NO_TEXT_WIDTH = 1


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of a UNet.

    `pooled` and `time_ids` are None for SD 1.x and 2.x, `class_labels` for all but class models.
    """

    prompt_embeds: Float[Tensor, "n tokens width"]
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    class_labels: Int[Tensor, " n"] | None = None

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, rows: slice | Tensor) -> "Conditioning":
        return Conditioning(*(None if p is None else p[rows] for p in self._parts()))  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype) -> "Conditioning":
        """Returns it with embeddings of another number format."""
        return replace(self, prompt_embeds=self.prompt_embeds.to(dtype))

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.prompt_embeds, self.pooled, self.time_ids, self.class_labels


def joined(parts: Sequence[Conditioning]) -> Conditioning:
    """Returns the rows of all parts, in their order."""
    columns = zip(*(part._parts() for part in parts), strict=True)
    return Conditioning(*(None if c[0] is None else torch.cat(c) for c in columns))  # type: ignore[arg-type]


def encode_text(
    tokenizer: Any,
    text_encoder: Any,
    prompts: Sequence[str],
    device: torch.device,
    clip_skip: int = 0,
) -> Conditioning:
    """Encodes each distinct prompt once; over-long ones are cut, with a warning for the first.

    clip_skip: last layers to leave out before the final layer norm. Raises UserError where there
    are not so many.
    """
    num_layers = text_encoder.config.num_hidden_layers
    if not 0 <= clip_skip <= num_layers:
        raise UserError(
            f"clip_skip={clip_skip} must be from 0 to {num_layers}, the layers of the text encoder"
        )
    distinct = list(dict.fromkeys(prompts))
    states = []
    for start in range(0, len(distinct), TEXT_BATCH):
        tokens = _tokens(tokenizer, distinct[start : start + TEXT_BATCH])
        uses_mask = getattr(text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(device) if uses_mask else None
        ids = tokens.input_ids.to(device)
        encoded = text_encoder(ids, attention_mask=mask, output_hidden_states=clip_skip > 0)
        if clip_skip:
            inner = getattr(text_encoder, "text_model", text_encoder)  # transformers 4
            states.append(inner.final_layer_norm(encoded.hidden_states[-(clip_skip + 1)]))
        else:
            states.append(encoded.last_hidden_state)
    row_of = {text: row for row, text in enumerate(distinct)}
    rows = torch.tensor([row_of[text] for text in prompts], device=device)
    return Conditioning(torch.cat(states)[rows])


def _tokens(tokenizer: Any, texts: list[str]) -> Any:
    """Returns texts as tokens, all of the text encoder's length."""
    limit = tokenizer.model_max_length
    for text, ids in zip(texts, tokenizer(texts, verbose=False).input_ids, strict=True):
        if len(ids) > limit and first("texts cut to what the text encoder reads"):
            log.warning("cut to %d of %d tokens: %.60r", limit, len(ids), text)
    return tokenizer(
        texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
    )


def encode_classes(
    classes: Sequence[str], prompts: Sequence[str], device: torch.device
) -> Conditioning:
    """Looks up class names; without classes only the empty prompt is one. Raises UserError."""
    labels = {name: label for label, name in enumerate(classes)} | {"": len(classes)}
    for prompt in prompts:
        if prompt not in labels:
            shown = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
            raise UserError(
                f"prompt {prompt!r:.60} is not one of the {len(classes)} classes of this model: "
                f"{shown}; the empty prompt asks for any of them"
                if classes
                else f"prompt {prompt!r:.60}: this model is unconditional and knows the empty "
                "prompt alone; give prompts=''"
            )
    embeds = torch.zeros(len(prompts), 1, NO_TEXT_WIDTH, device=device)
    if not classes:
        return Conditioning(embeds)
    rows = torch.tensor([labels[prompt] for prompt in prompts], dtype=torch.long, device=device)
    return Conditioning(embeds, class_labels=rows)
