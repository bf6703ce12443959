"""Colour profiles (ICC version 2) as cameras, screens and presses embed them, made by hand."""

import struct
from collections.abc import Callable, Sequence

Curve = Callable[[float], float]

# Primaries under D50: rows are the XYZ of red, green and blue.
SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
ADOBE_RGB = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
D50 = (0.9642, 1.0, 0.8249)


def srgb_curve(value: float) -> float:
    """Encoded -> linear."""
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def gamma(exponent: float) -> Curve:
    return lambda value: value**exponent


def rgb_profile(primaries: Sequence[Sequence[float]], curve: Curve) -> bytes:
    """Returns a profile of three primaries and one curve."""
    tags = {f"{name}XYZ": _xyz(row) for name, row in zip("rgb", primaries, strict=True)}
    return _profile(b"RGB ", tags | {f"{name}TRC": _curve(curve) for name in "rgb"})


def gray_profile(curve: Curve) -> bytes:
    return _profile(b"GRAY", {"kTRC": _curve(curve)})


def cmyk_profile(darkest: float = 0.0) -> bytes:
    """Returns a profile of a press on which L* falls by 30 for each of C, M, Y and by 60 for K.

    a* and b* are 0; `darkest` is the least L* that it prints.
    """
    rows, inks_of = bytearray(), bytearray()
    for corner in range(16):
        inks = [corner >> 3 & 1, corner >> 2 & 1, corner >> 1 & 1, corner & 1]
        lightness = max(darkest, 100 - 30 * sum(inks[:3]) - 60 * inks[3])
        rows += bytes((round(lightness * 2.55), 128, 128))
    for corner in range(8):
        inks_of += bytes((0 if corner >> 2 else 255,)) * 4
    tags = {"A2B0": _table(4, 3, rows), "B2A0": _table(3, 4, inks_of)}
    return _profile(b"CMYK", tags, b"prtr", b"Lab ")


def _table(num_in: int, num_out: int, corners: bytes) -> bytes:
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (place % 4 == 0) for place in range(9)))
    head = b"mft1" + bytes(4) + bytes((num_in, num_out, 2, 0)) + matrix
    return head + identity * num_in + bytes(corners) + identity * num_out


def _profile(
    space: bytes, tags: dict[str, bytes], kind: bytes = b"mntr", between: bytes = b"XYZ "
) -> bytes:
    name = b"made by hand\0"
    text = b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(78)
    tags = {"desc": text, "cprt": b"text" + bytes(4) + b"none\0", "wtpt": _xyz(D50)} | tags
    directory, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        directory += tag.encode() + struct.pack(">2I", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x02400000, kind, space, between)
    head += struct.pack(">6H4s", 2024, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    head += struct.pack(">3i", *(round(65536 * value) for value in D50))
    return head.ljust(128, b"\0") + directory + body


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * value) for value in values))


def _curve(curve: Curve) -> bytes:
    values = [round(65535 * curve(place / 1023)) for place in range(1024)]
    return b"curv" + bytes(4) + struct.pack(">I1024H", 1024, *values)
