"""The table of clients as text: for the users of one single file, and for docs/clients.md."""

import textwrap
from collections.abc import Mapping

from blackpoint.sampling.export.clients import (
    CLIENTS,
    KNOWN_KINDS,
    SIGN_NAMES,
    SIZES_UNKNOWN,
    TYPE_NAMES,
    Architecture,
    Kind,
    Sign,
    client_notes,
    values_of,
)
from blackpoint.sampling.process import Process
from blackpoint.sampling.schedule import NoiseSchedule

WIDTH = 96


def file_report(name: str, process: Process, architecture: Architecture) -> str:
    """Returns what each client recognises of the single file `name`, and what its user chooses."""
    kind = architecture.kind if architecture.kind != "unknown" else "Stable Diffusion"
    ending = "zero" if process.schedule.is_zero_terminal_snr else "non-zero"
    first = (
        f"{name}: {kind}, {TYPE_NAMES[process.prediction_type]}, {ending} terminal SNR, sampled "
        f"with {process.timestep_spacing} timesteps"
    )
    if architecture.statistic is not None:
        first += (
            f"; standard deviation of the bias that clients look at {architecture.statistic:.3f}"
        )
    lines = [textwrap.fill(first, WIDTH, break_long_words=False, break_on_hyphens=False)]
    if architecture.kind not in KNOWN_KINDS:
        return "\n\n".join([*lines, textwrap.fill(SIZES_UNKNOWN, WIDTH)]) + "\n"
    for client in CLIENTS:
        notes = client_notes(client, process, architecture)
        lines.append("\n".join([f"{client.name} {client.version}", *map(_item, notes)]))
    return "\n\n".join(lines) + "\n"


def clients_table() -> str:
    """Returns the rows of docs/clients.md: all that CLIENTS says, of a zero-SNR v model."""
    values = values_of(Process(NoiseSchedule.scaled_linear().zero_terminal_snr()))
    head = (
        *("client", "SD 1 v", "SD 2 v", "SDXL v", "zero SNR of SD", "zero SNR of SDXL"),
        *("set by hand", "at zero SNR", "evidence"),
    )
    rows = [head, ("---",) * len(head)]
    for client in CLIENTS:
        by_hand = dict.fromkeys([*client.set_type.values(), client.set_zero_snr])
        rows.append(
            (
                f"{client.name} {client.version}",
                *(_signs(client.signs_of_v, kind) for kind in KNOWN_KINDS),
                _signs(client.signs_of_zero_snr, "SD 1"),
                _signs(client.signs_of_zero_snr, "SDXL"),
                " ".join(text for text in by_hand if text).format(**values) or "nothing",
                client.scheduler,
                client.evidence,
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _signs(signs: Mapping[Kind, tuple[Sign, ...]], kind: Kind) -> str:
    return ", else ".join(SIGN_NAMES[sign] for sign in signs.get(kind, ())) or "no"


def _item(note: str) -> str:
    wrap = textwrap.TextWrapper(WIDTH, "- ", "  ", break_long_words=False, break_on_hyphens=False)
    return wrap.fill(note.replace("`", ""))
