"""The configuration of `blackpoint data encode`; free of torch."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from omegaconf import MISSING

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import OutputText, PathText
from blackpoint.data.files.rules import check_ranges
from blackpoint.data.order.buckets import BucketsConfig, bucket_table
from blackpoint.data.shards.options import ShardOptions
from blackpoint.sampling.choices import Dtype, LoraFile, SingleFileConfig, Tf32


@dataclass
class EncodeBucketsConfig(BucketsConfig):
    """Images cut to rectangles of about resolution^2 pixels, and encoded by themselves."""

    SECTION: ClassVar[str] = ""


@dataclass
class EncodeConfig(ShardOptions):
    """Shards of images, the checkpoint that encodes them, and the shards of latents."""

    source: PathText = MISSING
    """Shards of images: a folder, a pattern such as shards/shard-{000000..000009}.tar, or the same
    as a URL (https://, s3://, gs://)."""
    checkpoint: PathText = MISSING
    """Checkpoint whose VAE and text encoder are used: a folder, hub id, run directory, .ckpt or
    single .safetensors file. Training from the result must start from a checkpoint with the same
    two."""
    output: OutputText = MISSING
    """Folder for the shards of latents and their index; must be absent or empty. A run that was
    stopped is continued, and a run that is under way is joined, by the same command."""
    lora: list[LoraFile] | None = None
    """LoRA files whose text encoder part is merged in: lora=FILE, or lora=[{path: FILE, scale:
    0.8}]. Training from the result starts from the same merged model, which `export` writes."""
    single_file: SingleFileConfig = field(default_factory=SingleFileConfig)
    """What a checkpoint that is a single file lacks."""
    resolution: int = 0
    """Side of the square images, in pixels; training must use the same data.resolution. 0: the size
    that the checkpoint was made for."""
    buckets: EncodeBucketsConfig = field(default_factory=EncodeBucketsConfig)
    """Aspect-ratio buckets; training must use the same data.buckets."""
    max_tokens: int | None = None
    """Tokens of a caption that are encoded, a multiple of what the text encoder reads at once (75
    for SD and SDXL: 75, 150, 225), in chunks of so many; null: one chunk. Training must use the
    same data.max_tokens."""
    crop: str = "center"
    """Where the square, or the bucket's rectangle, is cut from the image. Only center: latents are
    made once, so random crops and flips need training from the images."""
    batch_size: int = 8
    """Images that a process encodes at once; more need more memory."""
    dtype: Dtype = "float16"
    """Number format of the stored latents."""
    encoder_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the VAE and the text encoder while they encode. auto: bfloat16 on a GPU that
    computes in it, else float32. In float16 an image that overflows would change later ones."""
    tf32: Tf32 = "auto"
    """Compute float32 products and convolutions in TensorFloat-32 (10 bits of mantissa). auto: on a
    GPU of compute capability 8.0 or newer, and nowhere else."""
    device: str = "auto"
    """auto and cuda share the processes out among the GPUs, auto takes the CPU where there is none;
    or cpu, cuda:1, ..."""
    num_processes: int = 0
    """Processes that encode on this machine, each a shard at a time with encoders of its own; 0:
    one per GPU, or one per CPU core. Several tasks that SLURM or torchrun starts each have one."""
    num_workers: int | None = None
    """Processes that decode images for each encoding process; 0 decodes in that process. Not set:
    4, or one for each core that the process may use where those are fewer."""
    samples_per_shard: int = 5000
    """Samples of the source that become one shard."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "", batch_size=">= 1", samples_per_shard=">= 1", resolution=">= 0")
        check_ranges(self, "", num_workers=">= 0", num_processes=">= 0", max_tokens=">= 1")
        if self.buckets.enabled and self.resolution:
            bucket_table(self.buckets, self.resolution, None)
        if self.crop != "center":
            raise UserError(
                f"crop={self.crop}: latents are made once, so each image has one view; "
                "set crop=center; random crops need training from the images"
            )
