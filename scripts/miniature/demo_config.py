"""The settings of `blackpoint demo`."""

from dataclasses import dataclass

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.paths import OutputText, PathText
from blackpoint.sampling.choices import check_seed


@dataclass
class DemoConfig:
    """The demonstration on the embedded base; its fine-tune is configs/tiny_zero_snr.yaml."""

    run_dir: OutputText = "runs/demo"
    """Directory of everything the demo makes."""
    config: PathText = "configs/tiny_zero_snr.yaml"
    """The fine-tune."""
    control_config: PathText = "configs/tiny_control.yaml"
    """The control: the same fine-tune with the old schedule and prediction type."""
    control: bool = False
    """Also run the control, into run_dir/control (about as long again)."""
    checkpoint: PathText = "assets/tiny_sd"
    """The embedded base."""
    digit_reader: PathText = "assets/digit_reader"
    """Folder of the digit classifier."""
    held_out_reader: PathText = "assets/digit_perceptron"
    """Folder of another classifier, which judges what the first is searched with."""
    seed: int = 0
    """Seed of the sampled images."""
    num_train_images: int = 9000
    """Real digits that are rendered for training."""
    num_held_out_images: int = 500
    """Real held-out digits, for the validation loss."""
    num_images: int = 200
    """Captions that are sampled, of 280."""
    reference_images: int = 2000
    """Real held-out images that the samples are compared with."""
    num_steps: int = 25
    """Sampling steps."""
    num_processes: int = 2
    """Processes that sample."""
    search_candidates: int = 16
    """Noises that are tried for each of eight prompts."""
    max_steps: int | None = None
    """Optimizer steps; those of the fine-tune's config if not set."""

    def __post_init__(self) -> None:
        check_seed("seed", self.seed, self.num_images)
        if self.num_images < 2:
            raise UserError(f"num_images={self.num_images} must be at least 2")
