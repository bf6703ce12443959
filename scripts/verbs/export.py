"""blackpoint export: writes a trained checkpoint as a diffusers folder and proves it."""

from blackpoint.data.files.signals import left_by_sigterm
from blackpoint.sampling.options import ExportConfig


def config_class() -> type[ExportConfig]:
    """Returns the dataclass that configures this verb."""
    return ExportConfig


def run(config: ExportConfig) -> int:
    """Exports and returns the exit status."""
    from blackpoint.data.files.errors import NotExportable
    from blackpoint.sampling.export.export import export

    try:
        with left_by_sigterm():
            folder = export(
                config.checkpoint,
                config.output,
                config.weights,
                config.verify,
                config.dtype,
                config.variant,
            )
    except NotExportable as error:
        raise NotExportable(f"{error}; verify=false writes the folder unchecked") from None
    verified = "verified against diffusers" if config.verify else "not verified"
    print(f"exported to {folder} ({config.weights} weights, {config.dtype}, {verified})")
    return 0
