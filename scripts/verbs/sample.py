"""blackpoint sample: samples prompts to a folder of images."""

from blackpoint.data.files.imports import uncollected
from blackpoint.data.files.signals import stoppable
from blackpoint.sampling.options import SampleConfig


def config_class() -> type[SampleConfig]:
    """Returns the dataclass that configures this verb."""
    return SampleConfig


def run(config: SampleConfig) -> int:
    """Samples and returns the exit status."""
    # A scheduler's signal may come at any time from here on, also while torch is imported.
    with stoppable():
        with uncollected():
            from blackpoint.sampling.sample import sample_to_folder

        output = sample_to_folder(config)
    print(f"images, samples.jsonl and grid.png are in {output}")
    return 0
