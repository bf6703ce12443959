"""A single .safetensors file in latent-diffusion's layout as what models are read from.

Nothing is converted on the way: a network is built without memory for weights and given views of
the file, which is mapped. So there is one copy of the weights, or, in another number format than
the file's, the converted tensors alone, whose pages of the file are dropped one by one.

Tokenizer and schedule are not in such a file. The tokenizer is CLIP's, which ships as
assets/clip_tokenizer; the schedule is the one of all Stable Diffusions, with the prediction type
and zero terminal SNR that prediction_evidence.py finds.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import CODE_ROOT
from blackpoint.data.files.safetensors_file import Header, read_header, read_tensor
from blackpoint.sampling.checkpoints.ldm_architecture import (
    SCALING_FACTOR,
    XL_SCALING_FACTOR,
    clip_config,
    open_clip_config,
    second_text_config,
    unet_config,
    vae_config,
)
from blackpoint.sampling.checkpoints.ldm_keys import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    XL_CLIP_PREFIX,
    XL_OPEN_CLIP_PREFIX,
)
from blackpoint.sampling.checkpoints.ldm_part import FolderPart, LdmPart, shapes_of_a_model
from blackpoint.sampling.checkpoints.loading import TOKENIZERS, load_tokenizer
from blackpoint.sampling.checkpoints.pipeline_folder import PipelineFolder
from blackpoint.sampling.checkpoints.prediction_evidence import (
    Evidence,
    prediction_of,
    undecided_error,
)
from blackpoint.sampling.checkpoints.saving import STABLE_DIFFUSION, STABLE_DIFFUSION_XL
from blackpoint.sampling.checkpoints.single_file_contents import (
    ZERO_SNR_MARKER,
    Contents,
    Keys,
    contents_of,
    open_clip_is_whole,
    shapes_of,
    vae_keys,
)
from blackpoint.sampling.choices import PredictionType, SingleFileConfig, Weights

log = logging.getLogger(__name__)

SINGLE_FILE = ".safetensors"
TOKENIZER = CODE_ROOT / "assets" / "clip_tokenizer"
CLIP_TOKENS = 49_408
OPEN_CLIP_PAD = "!"
"""What OpenCLIP fills texts up with, id 0; CLIP fills up with the end of the text."""
SIDE_V_PX, SIDE_PX, SIDE_XL_PX = 768, 512, 1024
"""Sides of the images of SD 2.x with v-prediction, of SD 1.x and of SDXL."""
SIDES_PX = range(8, 8193)
RESOLUTION = "modelspec.resolution"
VAE_LEVELS = (0,)
"""Of an AutoencoderKL whose config does not say it."""


@dataclass(frozen=True)
class SingleFile:
    """A Stable Diffusion 1.x, 2.x or XL in one file; `options` adds what is not in it."""

    path: Path
    options: SingleFileConfig
    is_sd2: bool
    has_zero_snr: bool
    averaged: bool
    evidence: Evidence | None
    parts: Mapping[str, LdmPart | FolderPart]

    @property
    def is_xl(self) -> bool:
        """Whether it is a Stable Diffusion XL: it has two text encoders."""
        return "text_encoder_2" in self.parts

    @classmethod
    def open(cls, path: Path, weights: Weights, options: SingleFileConfig) -> "SingleFile":
        """Reads the header; raises UserError for a file that is no such model, or not all of it.

        `weights` chooses the UNet's average, model_ema, or its plain weights where it holds both.
        """
        what = f"checkpoint={path}"
        header = read_header(path)
        contents = contents_of(header, what, weights)
        has_marker = ZERO_SNR_MARKER in header.shapes
        evidence = prediction_of(
            path,
            header.shapes,
            header.metadata,
            contents.is_sd2,
            options.prediction_type,
            lambda key: read_tensor(path, key),
            contents.is_xl,
        )
        return cls(
            path,
            options,
            contents.is_sd2,
            has_marker if options.zero_terminal_snr is None else options.zero_terminal_snr,
            contents.averaged,
            evidence,
            _parts(path, header, contents, options, evidence),
        )

    def read_json(self, name: str) -> dict[str, Any]:
        """Returns what the JSON files of the same pipeline's folder would hold."""
        part, _, file = name.rpartition("/")
        match part, file:
            case "", "model_index.json":
                return STABLE_DIFFUSION_XL if self.is_xl else STABLE_DIFFUSION
            case "scheduler", "scheduler_config.json":
                return self.scheduler()
        return self.parts[part].config

    def weight_files(self, part: str) -> list[Path]:
        """Lists the file, or those of the autoencoder that is given with it."""
        return self.parts[part].weight_files()

    def config_files(self, part: str) -> list[Path]:
        """Lists the files of a tokenizer or an autoencoder that is given with the file."""
        if part not in TOKENIZERS.values():
            return self.parts[part].config_files()
        folder = self._tokenizer_folder(part)
        return sorted(folder.iterdir()) if self.options.tokenizer else []

    def tensors(self, part: str) -> Iterator[Tensor]:
        """Yields a part's weights, in the shapes that they have in a folder."""
        return self.parts[part].tensors()

    def weights(self, part: str) -> Mapping[str, Tensor]:
        """Returns a part's weights by the names that they have in a folder."""
        return self.parts[part].weights()

    def load(self, kind: Any, part: str, dtype: torch.dtype) -> Any:
        """Loads a part and refuses missing or unexpected keys."""
        return self.parts[part].load(kind, dtype)

    def scheduler(self, undecided: PredictionType | None = None) -> dict[str, Any]:
        """Returns the scheduler config of Stable Diffusion, with what the file tells of it.

        Says what is taken from where, once; of the prediction type not to those who need none.
        """
        evidence = self.evidence
        if evidence is None and undecided is None:
            raise undecided_error(self.path)
        self._say(with_prediction=undecided is None)
        prediction_type = evidence.prediction_type if evidence else undecided
        return {
            "_class_name": "DDIMScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "num_train_timesteps": 1000,
            "prediction_type": prediction_type,
            "rescale_betas_zero_snr": self.has_zero_snr,
            "timestep_spacing": "trailing" if self.has_zero_snr else "leading",
            "set_alpha_to_one": self.has_zero_snr,
            "steps_offset": 1,
            "clip_sample": False,
            "trained_betas": None,
        }

    def tokenizer(self, text_encoder: str = "text_encoder") -> CLIPTokenizer:
        """Loads the tokenizer that is given, or CLIP's; UserError where that is another one."""
        config = self.parts[text_encoder].config
        count = config["vocab_size"]
        if not self.options.tokenizer:
            if count != CLIP_TOKENS:
                raise UserError(
                    f"checkpoint={self.path}: its text encoder knows {count} tokens, CLIP's "
                    f"vocabulary has {CLIP_TOKENS}, and none is in a single file; name the folder "
                    "of its tokenizer: single_file.tokenizer=FOLDER"
                )
            is_open_clip = self.is_sd2 or text_encoder == "text_encoder_2"
            pad = {"pad_token": OPEN_CLIP_PAD} if is_open_clip else {}
            return load_tokenizer(TOKENIZER, config, **pad)
        name = TOKENIZERS[text_encoder]
        folder = self._tokenizer_folder(name)
        is_shared = name == "tokenizer_2" and folder.name != name
        pad = {"pad_token": OPEN_CLIP_PAD} if is_shared else {}
        tokenizer = load_tokenizer(folder, config, **pad)
        if len(tokenizer) > count:
            raise UserError(
                f"single_file.tokenizer={self.options.tokenizer} makes {len(tokenizer)} tokens, "
                f"and the text encoder of checkpoint={self.path} knows {count}; name the tokenizer "
                "that it was trained with"
            )
        return tokenizer

    def _tokenizer_folder(self, name: str) -> Path:
        """Returns the folder of a tokenizer; the second one's is the first one's if it has none."""
        folder = Path(self.options.tokenizer or TOKENIZER)
        own = [folder / one for one in (name, "tokenizer") if (folder / one).is_dir()]
        return [*own, folder][0]

    def _say(self, with_prediction: bool) -> None:
        """Says what is taken without the user's word, once a process."""
        taken = []
        if with_prediction and self.evidence and self.options.prediction_type is None:
            prediction_type, source = self.evidence.prediction_type, self.evidence.source
            taken.append(f"prediction_type={prediction_type}, from {source}")
        if self.has_zero_snr and self.options.zero_terminal_snr is None:
            taken.append(f"zero terminal SNR, from its key {ZERO_SNR_MARKER}")
        if self.averaged:
            taken.append("the UNet is its average, model_ema")
        if taken:
            _say_once(f"checkpoint={self.path}: {'; '.join(taken)}")


@cache
def _say_once(text: str) -> None:
    log.warning("note: %s", text)


def _parts(
    path: Path,
    header: Header,
    contents: Contents,
    options: SingleFileConfig,
    evidence: Evidence | None,
) -> dict[str, LdmPart | FolderPart]:
    """Returns the parts with their configs; UserError where names and shapes make no networks."""
    if not contents.vae and not options.vae:
        raise UserError(
            f"checkpoint={path} holds no autoencoder (no key starts with {VAE_PREFIX}); name one, "
            "a diffusers folder or a .safetensors file: single_file.vae=PATH"
        )
    if options.text_projection and not contents.is_xl:
        raise UserError(
            f"single_file.text_projection={options.text_projection}: checkpoint={path} is no SDXL, "
            "whose second text encoder alone has a projection; leave it out"
        )
    is_turned = options.text_projection != "as_is"
    scale = XL_SCALING_FACTOR if contents.is_xl else SCALING_FACTOR
    named = Path(options.vae) if options.vae else None
    vae = _vae_of(named, scale) if named else _vae(path, header, contents.vae, scale)
    second = dict[str, Any]()
    with shapes_of_a_model(f"checkpoint={path}"):
        if contents.is_sd2:
            shapes = shapes_of(header, contents.text_encoder, OPEN_CLIP_PREFIX)
            text = open_clip_config(shapes, open_clip_is_whole(header))
        else:
            prefix = XL_CLIP_PREFIX if contents.is_xl else CLIP_PREFIX
            text = clip_config(shapes_of(header, contents.text_encoder, prefix))
        if contents.is_xl:
            shapes = shapes_of(header, contents.text_encoder_2, XL_OPEN_CLIP_PREFIX)
            if not is_turned:
                shapes = {**shapes, "text_projection": shapes["text_projection"][::-1]}
            second = second_text_config(shapes)
        levels = len(vae.config.get("block_out_channels", VAE_LEVELS))
        side_px = _side_px(header, contents, evidence)
        shapes = shapes_of(header, contents.unet, UNET_PREFIX)
        unet = unet_config(shapes, side_px, 2 ** (levels - 1), contents.is_xl)
    used = {
        name: key
        for name, key in contents.text_encoder.items()
        if _layer(name) < text["num_hidden_layers"] or not contents.is_sd2
    }
    parts = {
        "unet": LdmPart(path, "unet", unet, contents.unet),
        "vae": vae,
        "text_encoder": LdmPart(path, "text_encoder", text, used),
    }
    if contents.is_xl:
        of_second = LdmPart(path, "text_encoder_2", second, contents.text_encoder_2)
        parts["text_encoder_2"] = replace(of_second, projection_is_turned=is_turned)
    return parts


def _vae(
    path: Path, header: Header, keys: Keys, scale: float, field: str = "checkpoint"
) -> LdmPart:
    with shapes_of_a_model(f"{field}={path}"):
        config = vae_config(shapes_of(header, keys, VAE_PREFIX), scale)
        return LdmPart(path, "vae", config, keys, field)


def _vae_of(path: Path, scale: float) -> LdmPart | FolderPart:
    """Returns the autoencoder that single_file.vae names."""
    field = "single_file.vae"
    if (path / "vae" / "config.json").is_file():
        return FolderPart(PipelineFolder(path), "vae")
    if (path / "config.json").is_file():
        absolute = path.absolute()
        return FolderPart(PipelineFolder(absolute.parent), absolute.name)
    if path.is_file() and path.suffix == SINGLE_FILE:
        header = read_header(path, field)
        return _vae(path, header, vae_keys(header, f"{field}={path}"), scale, field)
    raise UserError(
        f"{field}={path} is neither a diffusers folder (with vae/ or config.json) nor a "
        ".safetensors file; name one of them on this machine"
    )


def _side_px(header: Header, contents: Contents, evidence: Evidence | None) -> int:
    """Returns the side of images that the model was made for: as written, else as published."""
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})", header.metadata.get(RESOLUTION, "").strip())
    if match and match[1] == match[2] and int(match[1]) in SIDES_PX:
        return int(match[1])
    is_v = evidence is not None and evidence.prediction_type == "v_prediction"
    if contents.is_xl:
        return SIDE_XL_PX
    return SIDE_V_PX if contents.is_sd2 and is_v else SIDE_PX


def _layer(name: str) -> int:
    """Returns the number of the layer of OpenCLIP that a weight belongs to; 0 outside of them."""
    match = re.search(r"\.resblocks\.(\d+)\.", name)
    return int(match[1]) if match else 0
