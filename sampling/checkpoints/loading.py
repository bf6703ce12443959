"""Reads one model of a pipeline: strictly, when it is needed, and without a second copy.

A model is built without memory for weights and then given the tensors of the file, which is
mapped: nothing is initialised only to be overwritten, and a page is copied when it is first
written to. A file in another number format is converted tensor by tensor. What a pipeline is made
of is asked of a `Pipeline`: a folder (pipeline_folder.py) or a single file (single_file.py).
"""

import ctypes
import inspect
import json
import mmap
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.choices import PredictionType, Weights

if TYPE_CHECKING:
    from blackpoint.sampling.checkpoints.resolve import Resolved

CLIP_POSITIONS = 77
"""Of a CLIP text encoder whose config does not say it."""
WRONG_CONFIG = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    StrictDataclassError,
)
"""Errors that a library may raise for a config.json that makes no sense."""
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""The tokenizer of each text encoder; SDXL has two."""
CLIP_TOKENIZER_FILES = ("tokenizer.json", "merges.txt")


@runtime_checkable
class Pipeline(Protocol):
    """What the parts of a model are read from; messages call it by its path."""

    @property
    def path(self) -> Path: ...

    def read_json(self, name: str) -> dict[str, Any]:
        """Returns unet/config.json, model_index.json and their like; UserError if it is missing."""

    def weight_files(self, part: str) -> list[Path]:
        """Lists the files that hold a part's weights; UserError where there are none."""

    def config_files(self, part: str) -> list[Path]:
        """Lists the files that decide on a part beside its weights; tokenizers are some, too."""

    def tensors(self, part: str) -> Iterator[Tensor]:
        """Yields a part's weights, in the shapes that they have in a folder."""

    def weights(self, part: str) -> Mapping[str, Tensor]:
        """Returns a part's weights by their published names, mapped; read as they are asked for."""

    def load(self, kind: Any, part: str, dtype: torch.dtype) -> Any:
        """Loads a part; UserError for missing weights and for those that don't belong to it."""

    def scheduler(self, undecided: PredictionType | None = None) -> dict[str, Any]:
        """Returns the scheduler config; with `undecided` where nothing tells the prediction type,
        and without that UserError."""

    def tokenizer(self, text_encoder: str = "text_encoder") -> CLIPTokenizer:
        """Loads the tokenizer of a text encoder."""


@dataclass(frozen=True)
class Part:
    """A model of a pipeline that is there but not loaded; raises UserError where it is not."""

    kind: Any
    pipeline: Pipeline
    name: str
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.config()
        self.pipeline.weight_files(self.name)

    def config(self) -> dict[str, Any]:
        """Returns config.json as it is written."""
        return self.pipeline.read_json(f"{self.name}/config.json")

    def setting(self, key: str) -> Any:
        """Returns one entry of config.json, or the default of its class."""
        default = inspect.signature(self.kind.__init__).parameters[key].default
        return self.config().get(key, default)

    def load(self) -> Any:
        """Loads the model and refuses missing or unexpected keys."""
        return self.pipeline.load(self.kind, self.name, self.dtype)


def is_xl(index: Mapping[str, Any]) -> bool:
    """Whether model_index.json is of a Stable Diffusion XL: it names a second text encoder."""
    return names_part(index, "text_encoder_2")


def text_encoders_of(index: Mapping[str, Any]) -> list[str]:
    """Lists the text encoders of a pipeline that has one or two."""
    return ["text_encoder", "text_encoder_2"] if is_xl(index) else ["text_encoder"]


def names_part(index: Mapping[str, Any], part: str) -> bool:
    """Whether model_index.json has a class for a part, not [null, null]."""
    return bool((index.get(part) or [None])[0])


def text_parts(
    pipeline: Pipeline, encoders: Sequence[str], dtype: torch.dtype
) -> tuple[tuple[Part | None, CLIPTokenizer | None], ...]:
    """Returns text encoder and tokenizer of both places; None where a pipeline has none."""
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    return tuple(
        (Part(kind, pipeline, name, dtype), pipeline.tokenizer(name))
        if name in encoders
        else (None, None)
        for name, kind in kinds.items()
    )


def load_unet(resolved: "Resolved", dtype: torch.dtype) -> UNet2DConditionModel:
    """Loads the UNet of a pipeline, or of a .ckpt by the config of its base alone."""
    if resolved.unet_state is None:
        return Part(UNet2DConditionModel, resolved.pipeline, "unet", dtype).load()
    unet = empty_unet(resolved.pipeline)
    state, ranges = {}, _file_ranges()
    for name, weight in resolved.unet_state.items():
        state[name] = weight.to(dtype)
        if state[name] is not weight:
            forget_if_mapped(weight, ranges)
    try:
        unet.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"checkpoint={resolved.checkpoint} does not fit the UNet of its base "
            f"{resolved.pipeline.path}: {error}"
        ) from error
    return unet


def empty_unet(pipeline: Pipeline) -> UNet2DConditionModel:
    """Returns the UNet that unet/config.json describes, on the meta device: no weights."""
    config = pipeline.read_json("unet/config.json")
    try:
        with init_empty_weights():
            return UNet2DConditionModel.from_config(config)
    except WRONG_CONFIG as error:
        path = pipeline.path / "unet"
        raise UserError(f"{path} cannot be built by its config.json: {error}") from error


def check_keys(
    what: str,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[str],
    reason: str = "the file is damaged, or of another model",
) -> None:
    """Raises UserError for weights that are not there, too many or of another shape."""
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    for kind, names in wrong.items():
        if keys := sorted(names):
            raise UserError(f"{what}: {len(keys)} {kind} weights, such as {keys[0]}; {reason}")


def forget_pages(mapped: Tensor) -> None:
    """Drops the pages of a tensor that maps a file, unwritten, from this process's memory (Linux).

    They are read again where the tensor is used again.
    """
    if sys.platform != "linux":
        return
    storage = mapped.untyped_storage()
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def convert_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Converts a model in place, weight by weight, and drops the pages that each was mapped from.

    `model.to` would hold the mapped file beside the whole converted model.
    """
    ranges = _file_ranges()
    for weight in [*model.parameters(), *model.buffers()]:
        if weight.is_floating_point() and weight.dtype != dtype:
            before = weight.data
            weight.data = before.to(dtype)
            forget_if_mapped(before, ranges)


def forget_if_mapped(tensor: Tensor, ranges: Sequence[range]) -> None:
    """Drops a tensor's pages if they are a file's; others would be lost."""
    start = tensor.untyped_storage().data_ptr()
    if any(start in addresses for addresses in ranges):
        forget_pages(tensor)


def _file_ranges() -> list[range]:
    """Lists the addresses of this process that map a file (Linux; elsewhere none)."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8").splitlines() if maps.is_file() else []
    found = []
    for words in (line.split(maxsplit=5) for line in lines):
        start, _, end = words[0].partition("-")
        if words[4] != "0":  # the inode
            found.append(range(int(start, 16), int(end, 16)))
    return found


SHARDED_STATE = "state.pt"
"""Of the folder of a sharded .ckpt: all but its shares, which tensors on the meta device stand for;
those lie beside it, safetensors of torch.distributed.checkpoint."""


def is_ckpt(path: Path) -> bool:
    """Whether a path is a file, such as a .ckpt, or the folder of a sharded one."""
    return path.is_file() or (path / SHARDED_STATE).is_file()


def read_ckpt(
    path: Path, *prefixes: str, allocate: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Any]:
    """Returns the content of a .ckpt, mapped; of a sharded one, shares whose dotted path begins so.

    They are read into what `allocate` makes in the place of a tensor on the meta device, in every
    process; None: into whole tensors, in this process.
    """
    file = path / SHARDED_STATE if path.is_dir() else path
    if zipfile.is_zipfile(file):  # a few packed bytes may unpack to more than the memory
        entries = zipfile.ZipFile(file).infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed, which torch.save never does")
    stored: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    tensors: dict[str, Tensor] = {}

    def allocated(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_meta or not name.startswith(prefixes):
            return tensor
        tensors[name] = (allocate or partial(torch.empty_like, device="cpu"))(tensor)
        return tensors[name]

    if path.is_dir() and prefixes:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        stored = replaced(stored, allocated)
        reader = HuggingFaceStorageReader(str(path))
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
        dcp.load(tensors, storage_reader=reader, no_dist=allocate is None)
    return stored


def replaced(tree: Any, replace: Callable[[str, Tensor], Any], path: tuple[str, ...] = ()) -> Any:
    """Returns nested containers with `replace(dotted path, tensor)` for each tensor."""
    if isinstance(tree, Tensor):
        return replace(".".join(path), tree)
    if type(tree) in (dict, OrderedDict):
        return {name: replaced(one, replace, (*path, str(name))) for name, one in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(replaced(o, replace, (*path, str(i))) for i, o in enumerate(tree))
    return tree


def trained_weights(
    path: Path, stored: Mapping[str, Any], weights: Weights, prefix: str = ""
) -> dict[str, Tensor]:
    """Returns what a .ckpt, read as `stored`, holds of the module, or of its part `prefix`."""
    is_raw = weights == "raw" and "current_model_state" in stored
    key = "current_model_state" if is_raw else "state_dict"
    state = (read_ckpt(path, f"{key}.{prefix}") if path.is_dir() else stored)[key].items()
    return {name.removeprefix(prefix): one for name, one in state if name.startswith(prefix)}


def require_tokenizer(folder: Path, files: Sequence[str] = CLIP_TOKENIZER_FILES) -> None:
    """Raises UserError unless one of a tokenizer's files is in `folder`.

    transformers 5 makes an empty tokenizer of a folder without them, and every prompt is the same.
    """
    if not any((folder / file).is_file() for file in files):
        raise UserError(f"{folder}: its tokenizer is missing; {' or '.join(files)} belongs there")


def load_tokenizer(folder: Path, text_config: Mapping[str, Any], **options: Any) -> CLIPTokenizer:
    """Loads a tokenizer; its longest text is one that the text encoder has positions for.

    A tokenizer without model_max_length says 1e30, which is no length to fill up to.
    """
    require_tokenizer(folder)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # tokenizers raises Exception itself, transformers KeyError and more
        raise UserError(f"{folder} cannot be loaded: {error}") from error
    positions = text_config.get("max_position_embeddings", CLIP_POSITIONS)
    tokenizer.model_max_length = int(min(tokenizer.model_max_length, positions))
    return tokenizer


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path, name: str = "tokenizer") -> None:
    """Writes folder/name, also as vocab.json and merges.txt.

    transformers 5 writes tokenizer.json alone, which transformers 4 and other tools do not read.
    """
    folder = folder / name
    tokenizer.save_pretrained(folder)
    settings = read_json(folder / "tokenizer_config.json")
    for how_it_was_loaded in ("is_local", "local_files_only"):
        settings.pop(how_it_was_loaded, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    model = read_json(folder / "tokenizer.json")["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads one of a pipeline's JSON files; raises UserError where it is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; the pipeline folder is incomplete") from error
    except (ValueError, RecursionError) as error:  # also what is no UTF-8, or too deep
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} where an object {{...}} belongs")
    return content
