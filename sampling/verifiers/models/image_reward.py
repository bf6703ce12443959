"""ImageReward: a BLIP trained on experts' comparisons of generated images (Xu et al. 2023).

    score = (head(BLIP(image, prompt)[CLS]) - 0.167) / 1.033

about 0 on average over its training pairs, with standard deviation 1. The published package needs
transformers 4 (its BERT imports what version 5 took away), so its weights are read into the BLIP of
transformers, whose two towers are the same networks under other names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.verifiers.kind import VerifierKind, VerifierOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from blackpoint.sampling.verifiers.verifier import Images, ImageVerifier

EXAMPLE = "THUDM/ImageReward"
TOKENIZER = "google-bert/bert-base-uncased"
WEIGHTS = ("ImageReward.safetensors", "ImageReward.pt")
CONFIG = "med_config.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
TOKENIZER_PATTERNS = ("tokenizer*", "vocab.txt", "config.json")
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
HEAD_WIDTH = 64
VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"^norm\.", "post_layernorm."),
)
"""From the package's names of the image tower's weights to those of transformers."""


class ImageReward:
    """BLIP's image tower, its text tower that looks at the image, and a linear head."""

    def __init__(self, vision: Any, text: Any, head: nn.Module, tokenizer: Any) -> None:
        from blackpoint.sampling.verifiers.models.preprocessing import (
            CLIP_MEAN,
            CLIP_STD,
            Preprocessing,
        )

        self._vision, self._text, self._head = vision, text, head
        self._tokenizer = tokenizer
        self._read: set[str] = set()
        side = vision.config.image_size
        self._preprocess = Preprocessing(
            shortest_edge=side, crop=(side, side), crop_rounds=True, mean=CLIP_MEAN, std=CLIP_STD
        )

    def scores(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Returns the normalised reward."""
        device, dtype = self._vision.device, self._vision.dtype
        pixels = self._preprocess(images.to(device)).to(dtype)
        seen = self._vision(pixel_values=pixels).last_hidden_state
        tokens = self._tokens(list(prompts)).to(device)
        read = self._text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=seen.new_ones(seen.shape[:2]).long(),
        )
        rewards = self._head(read.last_hidden_state[:, 0].float())[:, 0]
        return (rewards - MEAN) / STD

    def _tokens(self, prompts: list[str]) -> Any:
        from blackpoint.sampling.verifiers.models.clip import warn_if_cut

        for prompt in dict.fromkeys(prompts):
            if prompt not in self._read:
                self._read.add(prompt)
                warn_if_cut(
                    prompt, len(self._tokenizer(prompt, verbose=False).input_ids), MAX_TOKENS
                )
        return self._tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )


def load(config: VerifierOptions, device: torch.device, dtype: torch.dtype) -> ImageVerifier:
    """Loads a folder with ImageReward.pt and med_config.json, and BERT's tokenizer from `base`.

    The tokenizer may also lie in the folder itself. Raises UserError for what is missing.
    """
    from blackpoint.sampling.verifiers.models.pretrained import (
        HUB_ID,
        download,
        frozen,
        load_weights,
    )
    from blackpoint.sampling.verifiers.verifier import ImageVerifier

    checkpoint = str(config.checkpoint)
    folder = Path(checkpoint)
    if not folder.is_dir() and HUB_ID.fullmatch(checkpoint):
        folder = download(checkpoint, "checkpoint", EXAMPLE, (*WEIGHTS, CONFIG))
    remedy = f"download {EXAMPLE} and give the folder that holds {WEIGHTS[1]} and {CONFIG}"
    if not (folder / CONFIG).is_file():
        raise UserError(f"checkpoint={checkpoint}: {folder / CONFIG} does not exist; {remedy}")
    files = [folder / file for file in WEIGHTS if (folder / file).is_file()]
    state = load_weights(files[0] if files else folder / WEIGHTS[1], "checkpoint", remedy)
    try:
        vision, text, head = _built(state, json.loads((folder / CONFIG).read_text("utf-8")))
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"checkpoint={checkpoint} does not hold an ImageReward model "
            f"({type(error).__name__}: {reason:.200}); {remedy}"
        ) from error
    for part in (vision.to(dtype), text.to(dtype), head):
        frozen(part.to(device))
    reward = ImageReward(vision, text, head, _tokenizer(folder, config.base))
    return ImageVerifier(config, reward.scores)


def _built(state: dict[str, Tensor], med_config: dict[str, Any]) -> tuple[Any, Any, nn.Module]:
    """Builds the three parts in the sizes that the weights have, and fills them strictly."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    from blackpoint.sampling.verifiers.models.pretrained import linear_chain

    seen = _part(state, "blip.visual_encoder.")
    patches = seen["patch_embed.proj.weight"]  # (width, 3, px, px)
    width, patch_px = patches.shape[0], patches.shape[-1]
    side = round((seen["pos_embed"].shape[1] - 1) ** 0.5) * patch_px
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=seen["blocks.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=len({key.split(".")[1] for key in seen if "blocks." in key}),
            num_attention_heads=width // HEAD_WIDTH,
            image_size=side,
            patch_size=patch_px,
            layer_norm_eps=1e-6,
        )
    )
    vision.load_state_dict({_vision_name(key): value for key, value in seen.items()})
    known = {key: value for key, value in med_config.items() if key != "encoder_width"}
    text = BlipTextModel(
        BlipTextConfig(**known | {"encoder_hidden_size": width, "is_decoder": True}),
        add_pooling_layer=False,
    )
    text.load_state_dict(_part(state, "blip.text_encoder."))
    return vision, text, linear_chain(_part(state, "mlp."))


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    keys = [key for key in state if key.startswith(prefix) and not key.endswith("position_ids")]
    return {key.removeprefix(prefix): state[key].float() for key in keys}


def _vision_name(key: str) -> str:
    for pattern, replacement in VISION_NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _tokenizer(folder: Path, base: str | None) -> Any:
    from transformers import BertTokenizer

    from blackpoint.sampling.checkpoints.loading import require_tokenizer
    from blackpoint.sampling.verifiers.models.pretrained import HUB_ID, download

    beside = any((folder / file).is_file() for file in TOKENIZER_FILES)
    source = base or (str(folder) if beside else TOKENIZER)
    path = Path(source)
    if not path.is_dir() and HUB_ID.fullmatch(source):
        path = download(source, "base", TOKENIZER, TOKENIZER_PATTERNS)
    require_tokenizer(path, TOKENIZER_FILES)
    return BertTokenizer.from_pretrained(path, local_files_only=True)


KIND = VerifierKind(
    load,
    checkpoint=f"the folder with {WEIGHTS[1]} and {CONFIG}, or {EXAMPLE}",
    files={"checkpoint": (*WEIGHTS, CONFIG), "base": TOKENIZER_PATTERNS},
    defaults={"base": TOKENIZER},
)
