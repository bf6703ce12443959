"""blackpoint sample: samples prompts to a folder of pictures."""

from sampling.config import SampleConfig


def config_class() -> type[SampleConfig]:
    """Returns the dataclass that configures this verb."""
    return SampleConfig


def run(config: SampleConfig) -> int:
    """Samples and returns the exit status."""
    from sampling.sample import sample_to_folder

    print(f"pictures, samples.jsonl and grid.png are in {sample_to_folder(config)}")
    return 0
