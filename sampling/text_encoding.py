"""From texts to embeddings, by one CLIP text encoder (SD 1.x, 2.x) or by two (SDXL).

    one    last hidden states, after the final layer norm
    two    penultimate hidden states of both, without a norm, side by side; beside them `pooled`:
           the second encoder's state at the end of the text, after its norm and text_projection

(Podell et al. 2023, section 2.1.) Every row is as long as the encoder reads, filled up by each
tokenizer's own padding, to which the UNet attends too: the end token in SD 1.x and SDXL's first
tokenizer, token 0 in SD 2.x and SDXL's second.

Longer texts are encoded in chunks, each between the tokens that begin and end a text; the
embeddings follow one another along the tokens, and `pooled` is the first chunk's. All texts have
as many chunks as `max_tokens` says, those behind the end as of the empty text: no row depends on
its batch. (kohya's trainers leave out the tokens of begin and end between chunks: 227 for our 231.)
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.notes import first
from blackpoint.sampling.conditioning import Conditioning, joined
from blackpoint.sampling.runtime.transfer import sent

log = logging.getLogger(__name__)

TEXT_BATCH = 64
"""Rows of a text encoder at a time."""
NUM_ENDS = 2
"""Tokens that begin and end a text."""


def encode_text(
    tokenizers: Sequence[Any],
    text_encoders: Sequence[Any],
    prompts: Sequence[str],
    device: torch.device,
    clip_skip: int = 0,
    max_tokens: int | None = None,
) -> Conditioning:
    """Encodes each distinct prompt once; over-long ones are cut, with a warning for the first.

    clip_skip: last layers to leave out, as in diffusers: before the final layer norm of one
    encoder, beyond the last layer of two. max_tokens: of a text, a multiple of what fits between
    begin and end (75 for SD and SDXL), which None stands for. Raises UserError for others.

    Returns prompt_embeds (N, tokens, width) and, of two encoders, pooled (N, projection), float32.
    The encoders run in the format of their own weights, also under the autocast of a run in mixed
    precision: training and its previews embed alike.
    """
    most_layers = min(encoder.config.num_hidden_layers for encoder in text_encoders)
    most_layers -= len(text_encoders) - 1  # two leave out their last layer by themselves
    if not 0 <= clip_skip <= most_layers:
        which = "the text encoder" if len(text_encoders) == 1 else "both encoders but the last"
        raise UserError(
            f"clip_skip={clip_skip} must be from 0 to {most_layers}, the layers of {which}"
        )
    num_chunks = chunks_of(max_tokens, tokenizers[0])
    distinct, size = list(dict.fromkeys(prompts)), max(1, TEXT_BATCH // num_chunks)
    with torch.autocast(device.type, enabled=False):
        batches = [
            _encode(
                tokenizers, text_encoders, distinct[i : i + size], device, clip_skip, num_chunks
            )
            for i in range(0, len(distinct), size)
        ]
    row_of = {text: row for row, text in enumerate(distinct)}
    rows = torch.tensor([row_of[text] for text in prompts])
    return joined(batches)[sent(rows, device)].to(torch.float32)


def chunks_of(max_tokens: int | None, tokenizer: Any, field: str = "max_tokens") -> int:
    """Returns how many chunks hold `max_tokens`; raises UserError that names the field."""
    room = tokenizer.model_max_length - NUM_ENDS
    if max_tokens is None:
        return 1
    if max_tokens < room or max_tokens % room:
        raise UserError(
            f"{field}={max_tokens} must be a multiple of {room}, the tokens that the text "
            f"encoder reads at once; give {room}, {2 * room} or {3 * room}"
        )
    return max_tokens // room


def _encode(
    tokenizers: Sequence[Any],
    text_encoders: Sequence[Any],
    texts: list[str],
    device: torch.device,
    clip_skip: int,
    num_chunks: int,
) -> Conditioning:
    is_xl = len(text_encoders) > 1
    columns, pooled = [], None
    for tokenizer, encoder in zip(tokenizers, text_encoders, strict=True):
        tokens = _tokens(tokenizer, texts, num_chunks, tells_cuts=tokenizer is tokenizers[0])
        uses_mask = getattr(encoder.config, "use_attention_mask", False)
        mask = sent(tokens.attention_mask, device) if uses_mask else None
        keeps_all = is_xl or clip_skip > 0
        encoded = encoder(
            sent(tokens.input_ids, device), attention_mask=mask, output_hidden_states=keeps_all
        )
        if is_xl:
            states = encoded.hidden_states[-(clip_skip + 2)]
            pooled = getattr(encoded, "text_embeds", None)
        elif clip_skip:
            inner = getattr(encoder, "text_model", encoder)  # transformers 4
            states = inner.final_layer_norm(encoded.hidden_states[-(clip_skip + 1)])
        else:
            states = encoded.last_hidden_state
        columns.append(states.reshape(len(texts), -1, states.shape[-1]))
    embeds = torch.cat(columns, dim=-1)
    return Conditioning(embeds, None if pooled is None else pooled[::num_chunks])


def _tokens(tokenizer: Any, texts: list[str], num_chunks: int, tells_cuts: bool) -> Any:
    """Returns input_ids and attention_mask, (N chunks, L), the chunks of a text in succession."""
    limit = tokenizer.model_max_length
    room = limit - NUM_ENDS
    rows: list[list[int]] = []
    for text, ids in zip(texts, tokenizer(texts, verbose=False).input_ids, strict=True):
        begin, *body, end = ids
        most = num_chunks * room
        if len(body) > most and tells_cuts and first("texts cut to what the text encoder reads"):
            log.warning("cut to %d of %d tokens: %.60r", most + NUM_ENDS, len(ids), text)
        rows += [[begin, *body[start : start + room], end] for start in range(0, most, room)]
    return tokenizer.pad(
        {"input_ids": rows}, padding="max_length", max_length=limit, return_tensors="pt"
    )
