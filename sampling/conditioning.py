"""What a UNet is conditioned on: text embeddings, sizes of pictures, class labels, or nothing.

The empty prompt stands for "no condition" in every case: the text "", the class beyond the last, or
nothing. A UNet without text still has the inputs of its class: one token of one zero. Texts are
encoded in sampling/text_encoding.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.data.images.picture_size import PictureSize
from blackpoint.sampling.runtime.transfer import sent

NO_TEXT_WIDTH = 1


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of a UNet, a row per image.

    `pooled` is the second text encoder's vector, of SDXL alone; `class_labels` are those of class
    models. `time_ids` are SDXL's sizes, rows of PictureSize in pixels, float32; where nobody
    attached any, pictures are taken for whole ones of the size that the UNet is evaluated at.
    """

    prompt_embeds: Float[Tensor, "n tokens width"]
    pooled: Float[Tensor, "n projection"] | None = None
    time_ids: Float[Tensor, "n 6"] | None = None
    class_labels: Int[Tensor, " n"] | None = None

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, rows: slice | Tensor) -> "Conditioning":
        return self._map(lambda part: part[rows])

    def followed_by(self, others: Sequence["Conditioning"]) -> "Conditioning":
        """Returns these rows and then those of the others."""
        return joined([self, *others])

    def to(self, target: torch.dtype | torch.device) -> "Conditioning":
        """Returns it with embeddings of another number format, or all of it on another device.

        Sizes stay float32, which diffusers' pipeline rounds to the UNet's format: in bfloat16 1023
        is 1024.
        """
        if isinstance(target, torch.device):
            return self._map(lambda part: part.to(target))
        pooled = None if self.pooled is None else self.pooled.to(target)
        return replace(self, prompt_embeds=self.prompt_embeds.to(target), pooled=pooled)

    def with_sizes(self, sizes: Sequence[PictureSize]) -> "Conditioning":
        """Returns it with the sizes of its pictures, one per row."""
        rows = torch.tensor(sizes, dtype=torch.float32, device=self.prompt_embeds.device)
        return replace(self, time_ids=rows)

    def unet_arguments(self, height: int, width: int) -> dict[str, Any]:
        """Returns what a UNet takes beside prompt_embeds, for pictures of height x width pixels."""
        if self.class_labels is not None:
            return {"class_labels": self.class_labels}
        if self.pooled is None:
            return {}
        sizes = [PictureSize.whole(height, width)] * len(self)
        time_ids = self.with_sizes(sizes).time_ids if self.time_ids is None else self.time_ids
        return {"added_cond_kwargs": {"text_embeds": self.pooled, "time_ids": time_ids}}

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        return Conditioning(*(None if p is None else function(p) for p in self._parts()))  # type: ignore[arg-type]

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.prompt_embeds, self.pooled, self.time_ids, self.class_labels


def joined(parts: Sequence[Conditioning]) -> Conditioning:
    """Returns the rows of all parts, in their order; raises ValueError where some lack sizes."""
    columns = list(zip(*(part._parts() for part in parts), strict=True))
    if any(len({part is None for part in column}) > 1 for column in columns):
        raise ValueError(
            "conditions with and without pooled, time_ids or class_labels are no batch"
        )
    return Conditioning(*(None if c[0] is None else torch.cat(c) for c in columns))  # type: ignore[arg-type]


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
    rows = torch.tensor([labels[prompt] for prompt in prompts], dtype=torch.long)
    return Conditioning(embeds, class_labels=sent(rows, device))
