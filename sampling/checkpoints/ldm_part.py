"""One part of a single file: its config and its keys, from which the network is loaded."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextConfig, PreTrainedModel

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.safetensors_file import opened
from blackpoint.sampling.checkpoints.ldm_keys import Part, from_ldm, published_text_name
from blackpoint.sampling.checkpoints.loading import WRONG_CONFIG, check_keys, forget_pages
from blackpoint.sampling.checkpoints.pipeline_folder import PipelineFolder

TEXT_PROJECTION = "text_projection.weight"


@dataclass(frozen=True)
class FolderPart:
    """A part that lies in a diffusers folder beside the single file."""

    pipeline: PipelineFolder
    name: str

    @property
    def config(self) -> dict[str, Any]:
        """The part's config.json."""
        return self.pipeline.read_json(f"{self.name}/config.json")

    def weight_files(self) -> list[Path]:
        """Lists the files with its weights."""
        return self.pipeline.weight_files(self.name)

    def config_files(self) -> list[Path]:
        """Lists config.json."""
        return self.pipeline.config_files(self.name)

    def tensors(self) -> Iterator[Tensor]:
        """Yields the weights."""
        return self.pipeline.tensors(self.name)

    def weights(self) -> Mapping[str, Tensor]:
        """Returns the weights by name."""
        return self.pipeline.weights(self.name)

    def load(self, kind: Any, dtype: torch.dtype) -> Any:
        """Loads the part."""
        return self.pipeline.load(kind, self.name, dtype)


@dataclass(frozen=True)
class LdmPart:
    """A part of a single file; `keys` are those of the file by their names in the layout.

    Messages call the file by `field`.
    """

    path: Path
    name: Part
    config: dict[str, Any]
    keys: Mapping[str, str]
    field: str = "checkpoint"
    projection_is_turned: bool = True
    """Whether the projection of OpenCLIP's text encoder is transposed in the file."""

    def weight_files(self) -> list[Path]:
        """Lists the file."""
        return [self.path]

    def config_files(self) -> list[Path]:
        """Lists nothing: the config follows from the weights."""
        return []

    def tensors(self) -> Iterator[Tensor]:
        """Yields the weights, which map the file, and drops each from memory afterwards."""
        for tensor in self.weights().values():
            yield tensor
            forget_pages(tensor)

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights by their names in a folder: views of the mapped file."""
        try:
            with opened(self.path, self.field) as file:
                tensors = {name: file.get_tensor(key) for name, key in self.keys.items()}
        except SafetensorError as error:
            raise UserError(f"{self.field}={self.path} has changed: {error}") from error
        with shapes_of_a_model(f"{self.field}={self.path}"):
            weights = from_ldm(self.name, self.config, tensors)
        if not self.projection_is_turned:
            weights[TEXT_PROJECTION] = weights[TEXT_PROJECTION].T
        return weights

    def load(self, kind: Any, dtype: torch.dtype) -> Any:
        """Builds the part and gives it the weights of the file; refuses those that don't fit."""
        what = f"{self.field}={self.path}: {self.name}"
        try:
            with init_empty_weights():
                if issubclass(kind, PreTrainedModel):
                    model = kind(CLIPTextConfig(**self.config))
                else:
                    model = kind.from_config(self.config)
        except WRONG_CONFIG as error:
            raise UserError(f"{what} has shapes of which none can be built: {error}") from error
        state, own = self.weights(), model.state_dict()
        if self.name.startswith("text_encoder"):  # transformers 5 calls them by shorter names
            own_names = {published_text_name(name): name for name in own}
            state = {own_names.get(name, name): tensor for name, tensor in state.items()}
        check_keys(
            what,
            own.keys() - state.keys(),
            state.keys() - own.keys(),
            [name for name, tensor in state.items() if tensor.shape != own[name].shape]
            if state.keys() == own.keys()
            else [],
        )
        _convert(state, dtype)
        model.load_state_dict(state, strict=True, assign=True)
        return model


def _convert(state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Converts weights in place, and drops what is not needed any more from memory.

    Weights may be views of one tensor, as q, k and v are: it goes with the last of them.
    """
    views = Counter(tensor.untyped_storage().data_ptr() for tensor in state.values())
    for name, mapped in state.items():
        state[name] = mapped.to(dtype).contiguous()  # SDXL's projection is a transposed view
        address = mapped.untyped_storage().data_ptr()
        views[address] -= 1
        if state[name] is not mapped and not views[address]:
            forget_pages(mapped)


@contextmanager
def shapes_of_a_model(what: str) -> Iterator[None]:
    """Turns the errors of names and shapes that make no network into UserError, of `what` file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{what}: its names and shapes make no Stable Diffusion ({reason}); it is damaged, or "
            "of another model"
        ) from error
