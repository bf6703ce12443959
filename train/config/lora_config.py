"""Options of a run that trains low-rank adapters (train/lora.py), as its config says them."""

from dataclasses import MISSING, dataclass, field, fields

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.rules import check_ranges

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
PROJECTIONS = ("proj_in", "proj_out")
CONVOLUTIONS = (
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    *("downsamplers.0.conv", "upsamplers.0.conv"),
)
"""Layers of the residual blocks, and of the changes of resolution between them."""


@dataclass
class LoraConfig:
    """Low-rank adapters, which are trained in the place of the UNet's weights."""

    rank: int | None = None
    """Rank r of the adapters, at most the width of the layers; not set: the whole UNet is trained,
    and there are no adapters."""
    alpha: float | None = None
    """Scale of the adapters, W + (alpha / rank) B A; not set: rank, so that the scale is 1."""
    dropout: float = 0.0
    """Probability with which an adapter does not see an activation of its layer's input."""
    dora: bool = False
    """Train the length of each row of the weights apart from its direction (DoRA, Liu et al. 2024).
    Its result is exported merged alone: clients disagree on DoRA files."""
    targets: list[str] = field(default_factory=lambda: [*ATTENTION, *FEED_FORWARD, *PROJECTIONS])
    """Layers that get an adapter: names, or ends of names, of linear layers and convolutions of
    the UNet, as target_modules of peft."""
    convolutions: bool = False
    """Add the layers of the residual blocks and of the changes of resolution (LoCon)."""

    def __post_init__(self) -> None:
        check_ranges(self, "lora.", rank=">= 1", alpha="> 0", dropout=">= 0 and < 1")
        if self.rank is None:
            for each in fields(self):
                value, factory = getattr(self, each.name), each.default_factory
                if value != (each.default if factory is MISSING else factory()):
                    raise UserError(
                        f"lora.{each.name}={value}, but lora.rank is not set, so that there are no "
                        "adapters; set lora.rank, such as lora.rank=16, or leave the other out"
                    )
        elif not self.targets and not self.convolutions:
            raise UserError(
                "lora.targets=[] names no layers; leave it out for attention, feed-forward layers "
                "and projections, or set lora.convolutions=true"
            )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        assert self.rank is not None
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def all_targets(self) -> tuple[str, ...]:
        """The names of layers, those of the convolutions included."""
        return (*self.targets, *(CONVOLUTIONS if self.convolutions else ()))


def has_files(lora: LoraConfig) -> bool:
    """Whether what is trained can be written as files of adapters; those of DoRA are ambiguous."""
    return lora.rank is not None and not lora.dora
