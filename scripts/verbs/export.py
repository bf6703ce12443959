"""blackpoint export: writes a checkpoint as a diffusers folder or a single file and proves it."""

from blackpoint.data.files.imports import uncollected
from blackpoint.data.files.signals import left_by_sigterm
from blackpoint.sampling.options import ExportConfig


def config_class() -> type[ExportConfig]:
    """Returns the dataclass that configures this verb."""
    return ExportConfig


def run(config: ExportConfig) -> int:
    """Exports and returns the exit status."""
    from pathlib import Path

    with uncollected():
        from blackpoint.data.files.errors import NotExportable
        from blackpoint.sampling.export.export import export, written_dtype
        from blackpoint.sampling.export.single_file import beside, is_single_file

    if config.format == "lora":
        return _export_lora(config)
    try:
        with left_by_sigterm():
            output = export(
                config.checkpoint,
                config.output,
                config.weights,
                config.verify,
                config.dtype,
                config.variant,
                config.single_file,
                config.lora,
            )
    except NotExportable as error:
        raise NotExportable(f"{error}; verify=false writes the folder unchecked") from None
    verified = "verified against diffusers" if config.verify else "not verified"
    dtype = written_dtype(Path(config.output), config.dtype)
    print(f"exported to {output} ({config.weights} weights, {dtype}, {verified})")
    if is_single_file(output):
        _, report = beside(output)
        print(f"\n{report.read_text(encoding='utf-8')}", end="")
    return 0


def _export_lora(config: ExportConfig) -> int:
    from blackpoint.sampling.export.lora_card import client_note
    from blackpoint.sampling.export.lora_export import export_lora

    dtype = "float32" if config.dtype == "auto" else config.dtype
    with left_by_sigterm():
        run = export_lora(config.checkpoint, config.output, config.weights, config.verify, dtype)
    verified = "verified against peft and diffusers" if config.verify else "not verified"
    print(f"exported to {config.output} ({config.weights} weights, {dtype}, {verified})")
    if note := client_note(run):
        print(f"note: {note}")
    return 0
