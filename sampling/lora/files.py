"""Reads adapters from a .safetensors file, or from a folder of diffusers or peft that holds one."""

from collections.abc import Sequence
from pathlib import Path

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.safetensors_file import opened
from blackpoint.sampling.lora.adapters import Lora
from blackpoint.sampling.lora.keys import ADAPTER_METADATA, read_modules

DIFFUSERS, PEFT, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)
SUFFIX = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl")


def read_lora(path: Path, named: str) -> Lora:
    """Returns the adapters of a file or folder, under names as the file has them (keys.py).

    `named` is the key and value that the user named them by. Raises UserError for what is no LoRA.
    """
    if path.is_dir():
        path = path / chosen(sorted(file.name for file in path.glob(f"*{SUFFIX}")), named)
    if path.suffix != SUFFIX:
        what = (
            "a pickle, which can run any code when it is loaded" if is_pickle(path) else "no LoRA"
        )
        raise UserError(f"{named} is {what}; give a {SUFFIX} file")
    with opened(path, "lora") as file:
        metadata = dict(file.metadata() or {})
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    config = path.with_name(PEFT_CONFIG)
    if path.name == PEFT and config.is_file():
        metadata[ADAPTER_METADATA] = config.read_text(encoding="utf-8", errors="replace")
    return read_modules(state, metadata, named)


def is_pickle(path: Path) -> bool:
    """Whether a file's name is that of a pickle."""
    return path.suffix in PICKLES


def chosen(names: Sequence[str], named: str) -> str:
    """Returns the file of a LoRA among the .safetensors of a folder; UserError where none is."""
    for name in (DIFFUSERS, PEFT):
        if name in names:
            return name
    files = [name for name in names if name.endswith(SUFFIX)]
    if len(files) == 1:
        return files[0]
    there = f"{len(files)} of them, such as {files[0]}" if files else f"no {SUFFIX} file"
    raise UserError(
        f"{named} holds {there}, and neither {DIFFUSERS} nor {PEFT}; name the file of the LoRA"
    )
