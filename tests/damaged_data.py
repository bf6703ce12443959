"""Damaged, hostile and merely unusual samples and shards, made from a seed.

`odd_samples` makes files: each is bad, with a word of its reason, or unusual but good.
`damaged_shards` writes tars that no tar program would; each says which keys must survive.
"""

import functools
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data_images import encoded, png_of_size

BLOCK = 512
Rng = np.random.Generator
UNREADABLE = "not an image|truncated or damaged"


@dataclass(frozen=True)
class OddSample:
    """An image file and its caption; `reason` is a pattern of why it is bad, "" if it is good."""

    key: str
    suffix: str
    image: bytes
    caption: bytes
    reason: str


@dataclass
class DamagedShard:
    """What must be found in a shard: keys kept, and {key, or "" for the tar itself: reason}."""

    name: str
    content: bytes
    kept: list[str]
    bad: list[tuple[str, str]] = field(default_factory=list)


def noise(rng: Rng, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Returns an RGB image of (width, height)."""
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))


def odd_samples(seed: int, count: int = 200) -> list[OddSample]:
    """Returns `count` samples, each kind as often as the others."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        name, make = list(KINDS.items())[number % len(KINDS)]
        suffix, image, reason, *caption = make(rng)
        text = caption[0] if caption else f"{name} {number}".encode()
        samples.append(OddSample(f"odd_{number:03d}_{name}", suffix, image, text, reason))
    return samples


def good_samples(seed: int, count: int, name: str = "good") -> list[OddSample]:
    """Returns `count` plain PNGs."""
    rng = np.random.default_rng(seed)
    return [
        OddSample(
            f"{name}_{number:03d}", "png", encoded(noise(rng)), f"{name} {number}".encode(), ""
        )
        for number in range(count)
    ]


@functools.cache
def huge_png(side: int = 30_000) -> bytes:
    """Returns a whole black PNG of side x side pixels, a few hundred kilobytes, made by rows."""
    packer = zlib.compressobj(1)
    row = bytes(1 + -(-side // 8))
    rows = b"".join(packer.compress(row * 100) for _ in range(side // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return PNG_MAGIC + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, content: bytes) -> bytes:
    """Returns a PNG chunk."""
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def _cut(form: str) -> Callable[[Rng], tuple]:
    def make(rng: Rng) -> tuple:
        content = encoded(noise(rng, (64, 64)), form)
        return form.lower(), content[: int(len(content) * rng.uniform(0.3, 0.8))], UNREADABLE

    return make


def _flipped(rng: Rng, form: str, after: bytes, offset: int) -> tuple:
    content = bytearray(encoded(noise(rng), form))
    content[content.index(after) + offset] ^= int(rng.integers(1, 256))
    return form.lower(), bytes(content), UNREADABLE


def _text_bomb(rng: Rng) -> tuple:
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(4_000_000)))
    content = encoded(noise(rng))
    return "png", content[:33] + bomb + content[33:], UNREADABLE  # after IHDR


def _bitmap(width: int, header_size: int, reason: str) -> Callable[[Rng], tuple]:
    def make(rng: Rng) -> tuple:
        content = bytearray(encoded(noise(rng), "BMP"))
        content[14:18] = struct.pack("<I", header_size)
        content[18:26] = struct.pack("<ii", width, width)
        return "bmp", bytes(content), reason

    return make


def _looping_tiff(rng: Rng) -> tuple:
    content = bytearray(encoded(noise(rng), "TIFF"))
    start = struct.unpack_from("<I", content, 4)[0]
    num_tags = struct.unpack_from("<H", content, start)[0]
    struct.pack_into("<I", content, start + 2 + 12 * num_tags, start)  # next directory: itself
    return "tiff", bytes(content), ""


def _rotated(rng: Rng) -> tuple:
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(1, 9))
    form = ("JPEG", "PNG", "WEBP", "TIFF")[rng.integers(4)]
    return form.lower(), encoded(noise(rng), form, exif=exif), ""


def _animation(rng: Rng) -> bytes:
    frames = [noise(rng, (32, 32)) for _ in range(3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def _palette(rng: Rng) -> tuple:
    return "png", encoded(noise(rng).quantize(8), transparency=0), ""


KINDS: dict[str, Callable[[Rng], tuple]] = {
    "cut_jpeg": _cut("JPEG"),
    "cut_png": _cut("PNG"),
    "cut_webp": _cut("WEBP"),
    "cut_gif": _cut("GIF"),
    "cut_bmp": _cut("BMP"),
    "flipped_png_header": lambda rng: _flipped(rng, "PNG", b"IHDR", 4 + int(rng.integers(13))),
    "flipped_png_data": lambda rng: _flipped(rng, "PNG", b"IDAT", 4),
    "flipped_jpeg_frame": lambda rng: _flipped(rng, "JPEG", b"\xff\xc0", 2),
    "zero_bytes": lambda rng: ("jpg", b"", "zero bytes"),
    "html": lambda rng: ("jpg", b"<html>404 not found</html>", "not an image"),
    "zeroed": lambda rng: ("png", bytes(len(encoded(noise(rng)))), "not an image"),
    "huge": lambda rng: ("png", huge_png(), "decompression bomb"),
    "huge_header": lambda rng: ("png", png_of_size(65_000, 65_000), "decompression bomb"),
    "float": lambda rng: ("tif", encoded(Image.new("F", (8, 8)), "TIFF"), "32-bit"),
    "postscript": lambda rng: (
        "jpg",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "not an",
    ),
    "text_bomb": _text_bomb,
    "wide_bitmap": _bitmap(2**31 - 1, 40, "decompression bomb"),
    "odd_bitmap": _bitmap(24, 2**32 - 1, UNREADABLE),
    "empty_caption": lambda rng: ("png", encoded(noise(rng)), "empty caption", b""),
    "blank_caption": lambda rng: ("png", encoded(noise(rng)), "empty caption", b" \r\n\t"),
    "latin_caption": lambda rng: ("png", encoded(noise(rng)), "not UTF-8", b"caf\xe9"),
    "long_caption": lambda rng: ("png", encoded(noise(rng)), "", b"word " * 9_999 + b"end"),
    "marked_caption": lambda rng: ("png", encoded(noise(rng)), "", b"\xef\xbb\xbfa mark"),
    "animation": lambda rng: ("gif", _animation(rng), ""),
    "cut_animation": lambda rng: ("gif", _animation(rng)[:-900], ""),
    "cmyk": lambda rng: ("jpg", encoded(noise(rng).convert("CMYK"), "JPEG"), ""),
    "deep_gray": lambda rng: (
        "png",
        encoded(Image.fromarray(rng.integers(0, 65_536, (9, 9), np.uint16))),
        "",
    ),
    "rotated": _rotated,
    "wrong_suffix": lambda rng: ("jpg", encoded(noise(rng)), ""),
    "bad_profile": lambda rng: ("jpg", encoded(noise(rng), "JPEG", icc_profile=b"x" * 99), ""),
    "palette": _palette,
    "pixel": lambda rng: ("png", encoded(noise(rng, (1, 1))), ""),
    "line": lambda rng: ("png", encoded(noise(rng, (1, 20_000))), ""),
    "trailing": lambda rng: ("jpg", encoded(noise(rng), "JPEG") + bytes(999), ""),
    "looping_tiff": _looping_tiff,
    "two_tone": lambda rng: ("png", encoded(noise(rng).convert("1")), ""),
}


def header(name: bytes, size: int, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """Returns a tar header with a right checksum, whatever it claims."""
    digits = b"%011o\0" % size if 0 <= size < 8**11 else b""
    digits = digits or (b"\x80" if size > 0 else b"\xff") + size.to_bytes(11, "big", signed=True)
    fields = (name, b"0000644\0", b"0000000\0" * 2, digits, b"00000000000\0", b" " * 8, kind, link)
    block = struct.pack("100s8s16s12s12s8s1s100s8s247s", *fields, b"ustar\x0000", b"")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def member(name: str, content: bytes, size: int | None = None, kind: bytes = b"0") -> bytes:
    """Returns header and padded content; `size` is what the header claims instead."""
    claimed = len(content) if size is None else size
    return header(name.encode(), claimed, kind) + content + bytes(-len(content) % BLOCK)


def sample_members(sample: OddSample, key: str | None = None) -> bytes:
    """Returns the image and the caption of a sample as two members."""
    key = key or sample.key
    return member(f"{key}.{sample.suffix}", sample.image) + member(f"{key}.txt", sample.caption)


END = bytes(2 * BLOCK)


def damaged_shards(seed: int) -> list[DamagedShard]:
    """Returns shards of up to eight samples, each damaged in one way."""
    shards: list[DamagedShard] = []

    def shard(name: str, build: Callable[[list[OddSample]], tuple]) -> None:
        samples = good_samples(seed + len(shards), 8, name)
        content, kept, *bad = build(samples)
        shards.append(DamagedShard(f"{name}.tar", content, kept, bad[0] if bad else []))

    def replaced(reason: str, torn: str, make: Callable[[OddSample], bytes]) -> Callable:
        """Sample 3 is written by `make`; the rest is whole. `torn`: the reason of the tar."""

        def build(samples: list[OddSample]) -> tuple:
            parts = [sample_members(sample) for sample in samples]
            parts[3] = make(samples[3])
            kept = [sample.key for sample in samples]
            bad = [(kept.pop(3), reason)] if reason else []
            return b"".join(parts) + END, kept, bad + ([("", torn)] if torn else [])

        return build

    def caption_of(sample: OddSample) -> bytes:
        return member(f"{sample.key}.txt", sample.caption)

    def image_of(sample: OddSample, size: int | None = None) -> bytes:
        return member(f"{sample.key}.png", sample.image, size)

    def flip(content: bytes, place: int) -> bytes:
        return content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]

    def instead(content: bytes, caption: bytes | None = None) -> Callable[[OddSample], bytes]:
        def make(sample: OddSample) -> bytes:
            text = caption_of(sample) if caption is None else caption
            return content.replace(b"KEYKEY", sample.key.encode()[-6:]) + text

        return make

    def cut(share: float, lost: int) -> Callable:
        def build(samples: list[OddSample]) -> tuple:
            content = b"".join(sample_members(sample) for sample in samples)
            keys = [sample.key for sample in samples]
            middle = len(content) * 5 // 8 + int(share * BLOCK * 3)  # within the sixth image
            bad = [(keys[5], "no caption")] if lost else []
            kept = keys[:5] if lost else keys
            return (content[:middle] if lost else content), kept, [*bad, ("", "damaged tar")]

        return build

    wrong = "wrong size in the tar's header"
    torn = "damaged tar"
    shard("cut_in_image", cut(0.6, 1))
    shard("cut_before_end", cut(0, 0))
    for place in (0, 100, 130, 150, 260):
        shard(
            f"flipped_image_header_{place}",
            replaced("no image", torn, lambda s, p=place: flip(image_of(s), p) + caption_of(s)),
        )
    shard(
        "flipped_caption_header",
        replaced("no caption", torn, lambda s: image_of(s) + flip(caption_of(s), 5)),
    )
    for size in (2_000, 2_050, 9_999, 8**11 - 1, 2**62):
        shard(
            f"size_{size}", replaced(wrong, torn, lambda s, n=size: image_of(s, n) + caption_of(s))
        )
    shard("size_small", replaced("truncated", torn, lambda s: image_of(s, 600) + caption_of(s)))
    shard("size_below_0", replaced("no image", torn, lambda s: image_of(s, -512) + caption_of(s)))

    def twice(samples: list[OddSample]) -> tuple:
        keys = [sample.key for sample in samples]
        parts = [sample_members(sample) for sample in samples]
        parts[6] = sample_members(samples[6], keys[2])
        parts.insert(4, sample_members(samples[0], keys[3]))  # right behind its first
        bad = [(key, "duplicate key") for key in (keys[3], keys[2])]
        return b"".join(parts) + END, keys[:6] + keys[7:], bad

    shard("keys_twice", twice)

    def hostile(samples: list[OddSample]) -> tuple:
        names = ["../../escape", "/tmp/blackpoint_escape", "a/../../b"]
        parts = [sample_members(sample, name) for sample, name in zip(samples, names, strict=False)]
        parts += [sample_members(sample) for sample in samples[3:]]
        bad = [(name, "leads out of the folder") for name in names]
        return b"".join(parts) + END, [sample.key for sample in samples[3:]], bad

    shard("hostile_names", hostile)
    kinds = {"symbolic": b"2", "hard": b"1", "device": b"3", "fifo": b"6"}
    for name, kind in kinds.items():
        shard(
            f"{name}_member",
            replaced(
                "no regular file",
                "",
                lambda s, k=kind: (
                    header(f"{s.key}.png".encode(), 0, k, b"/etc/passwd") + caption_of(s)
                ),
            ),
        )

    def with_nul(sample: OddSample) -> bytes:
        record = f"path={sample.key}\0x.png\n".encode()
        text = b"%d %s" % (len(record) + 3, record)
        return member("pax", text, kind=b"x") + image_of(sample) + caption_of(sample)

    def nul_names(samples: list[OddSample]) -> tuple:
        content, kept, _ = replaced("", "", with_nul)(samples)
        kept.pop(3)
        bad = [(f"{samples[3].key}\0x", "NUL byte"), (samples[3].key, "no image")]
        return content, kept, bad

    shard("nul_in_name", nul_names)
    plain = lambda samples: [sample.key for sample in samples]  # noqa: E731
    whole = lambda samples: b"".join(map(sample_members, samples))  # noqa: E731
    shard(
        "zeroed_header",
        replaced(
            "no image", "not the end", lambda s: bytes(BLOCK) + image_of(s)[BLOCK:] + caption_of(s)
        ),
    )
    shard(
        "two_tars",
        lambda s: (whole(s[:4]) + END * 5 + whole(s[4:]) + END, plain(s), [("", "not the end")]),
    )
    shard("empty_file", lambda s: (b"", [], [("", torn)]))
    shard("no_samples", lambda s: (END, []))
    shard("garbage", lambda s: (np.random.default_rng(seed).bytes(50_000), [], [("", torn)]))
    shard("compressed", lambda s: (b"\x1f\x8b" + whole(s), [], [("", "compressed")]))
    extension = member("pax", b"0 path=x\n", kind=b"x")
    shard("wrong_pax", replaced("", torn, lambda s: extension + sample_members(s)))
    claim = header(b"pax", 2**40, b"x")
    shard("huge_pax", replaced("", torn, lambda s: claim + sample_members(s)))
    chain = member("././@LongLink", b"name\0", kind=b"L") * 400 + b"x" * BLOCK

    def long_chain(samples: list[OddSample]) -> tuple:
        content, kept, bad = replaced("", torn, lambda s: chain + sample_members(s))(samples)
        return content, kept, bad * 2  # Python's recursion ends within it, then its last block

    shard("long_chain", long_chain)
    aside = member("README", b"x") + member(".hidden.png", b"x") + header(b"folder/", 0, b"5")
    shard("files_aside", replaced("", "", lambda s: aside + sample_members(s)))
    shard("json_captions", _json_captions)
    return shards


def _json_captions(samples: list[OddSample]) -> tuple:
    """Image and .json without .txt, as img2dataset may write; then what no caption can be."""
    texts = [json.dumps({"caption": f"said {number}", "url": "x"}) for number in range(2)]
    faults = [
        "{",
        "[1]",
        '{"caption": null}',
        '{"caption": "\\ud800"}',
        "[" * 100_000,
        '{"url": 1}',
    ]
    parts = [
        member(f"{sample.key}.png", sample.image) + member(f"{sample.key}.json", text.encode())
        for sample, text in zip(samples, texts + faults, strict=True)
    ]
    keys = [sample.key for sample in samples]
    return b"".join(parts) + END, keys[:2], [(key, "caption") for key in keys[2:]]


def write_tar(path: Path, samples: list[OddSample]) -> None:
    """Writes a sound tar, with Python's own tarfile."""
    with tarfile.open(path, "w") as tar:
        for sample in samples:
            for suffix, content in ((sample.suffix, sample.image), ("txt", sample.caption)):
                info = tarfile.TarInfo(f"{sample.key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
