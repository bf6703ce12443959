"""The settings of `blackpoint show`; free of torch, so that its help is instant."""

from dataclasses import dataclass

from omegaconf import MISSING

from blackpoint.data.files.paths import OutputText, PathText


@dataclass
class ShowConfig:
    """A page of this machine's own: a checkpoint beside its base, and searches, as you ask."""

    checkpoint: PathText = MISSING
    """Checkpoint to look at: a run directory, folder, hub id, .ckpt or single .safetensors file of
    Stable Diffusion 1.x, 2.x or XL, or a pixel-space model."""
    base: PathText | None = None
    """Checkpoint to show beside it, sampled by its own schedule; if not set, the one that a run
    directory was fine-tuned from, where that is a folder or file that is still there."""
    search: PathText | None = None
    """YAML of a search, such as configs/qi_sdxl.yaml: its verifiers, algorithm and settings are
    those of the page's searches. Not set: a search for a luminance."""
    output: OutputText | None = None
    """Folder that keeps the searches; they are removed at the end if it is not set."""
    port: int = 8765
    """Port at 127.0.0.1, which other machines don't reach; 0 takes a free one."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, cuda, cuda:1, ..."""
