"""Hostile files from seeds: for every reader a kind, which writes its input and the command.

Three sorts take turns: a good file with bytes changed, cut, doubled or moved; a file that claims
more than it holds (headers, bombs, depth); and payloads that would run, escape or leave the folder.
Whatever runs them touches the file `CANARY` of the working folder.
"""

import csv
import io
import json
import os
import random
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file

from blackpoint.scripts.cli import main
from tests.data_images import encoded, picture, png_of_size
from tests.lora_files import adapted_unet, adapters
from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_run import make_tiny_shards
from tests.tiny_single_file import make_folder, tensors_of, write_file

CANARY = "executed"
MARKUP = "<script>alert(7331)</script>"
TEXTS = (
    MARKUP,
    f"</style></title>{MARKUP}",
    '"><img src=x onerror=alert(7331)>',
    "\x1b[2J\x1b]0;title\x07\x1b[31mred",
    "\x9b31m\x08\x08\x00\r",
    "\u202egpj.exe\u2066",
    "=cmd|' /C calc'!A0",
    f"$(touch {CANARY}) `touch {CANARY}` ; touch {CANARY}",
    f"pipe:touch {CANARY}",
    "{{7*7}} {% raw %} ${oc.env:HOME} %s %n {0.__class__}",
    "../../../../escaped",
    "\ud7ff\ufffe\U0010ffff",
    "a" * 200_000,
    " \t\n\v",
    "(((((a:1.5)))))" * 500,
    "null",
)


class Run:
    """A pickle that runs a command when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {CANARY}",)


@dataclass(frozen=True)
class Assets:
    """Good inputs, made once, which cases copy and change."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "Assets":
        make_tiny_pipeline(folder / "pipeline")
        make_tiny_shards(folder / "images", 6)
        write_file(folder / "single.safetensors", tensors_of(make_folder(folder / "ldm", "sd1")))
        state = adapters(adapted_unet(folder / "pipeline", rank=2))
        lora = {f"unet.{name}": tensor for name, tensor in state.items()}
        save_file(lora, folder / "lora.safetensors")
        search = [f"checkpoint={folder / 'pipeline'}", 'prompts=["a red one", "a night"]']
        search += [f"output={folder / 'search'}", "budget_nfe=4", "num_steps=2", "device=cpu"]
        search += ["guidance_scale=1", "verifiers.dark.kind=luminance", "verifiers.dark.target=0"]
        assert main(["search", *search]) == 0
        state = {"unet.x": torch.zeros(3), "unet.y": torch.ones(2, 2)}
        torch.save({"state_dict": state, "blackpoint": {"base": "x"}}, folder / "good.ckpt")
        return cls(folder)


Kind = Callable[[random.Random, Path, Assets], list[str]]
"""Writes an input below the working folder; returns the command line."""


# --- Changes of bytes and texts ---


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Changes, cuts, doubles, moves or drops some bytes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 20))):
        size = max(len(data), 1)
        start, length = rng.randrange(size), rng.choice((1, 2, 8, 64, size // 2))
        match rng.randrange(6):
            case 0:
                data[start : start + 1] = rng.randbytes(1)
            case 1:
                data[start : start + length] = rng.choice((b"\0", b"\xff")) * length
            case 2:
                data = data[:start]
            case 3:
                data[start:start] = data[start : start + length]
            case 4:
                del data[start : start + length]
            case 5:
                data[start : start + length] = rng.randbytes(length)
    return bytes(data)


def hostile_text(rng: random.Random) -> str:
    return rng.choice(TEXTS)


def hostile_json(rng: random.Random, value: Any) -> str:
    """Writes a JSON value with one of its values replaced, or what JSON should not be."""
    match rng.randrange(6):
        case 0:
            return damaged(rng, json.dumps(value).encode()).decode("latin-1")
        case 1:
            return rng.choice(["[" * 100_000, '{"a":' * 50_000, "", "null", "[]", "3", '"x"'])
        case 2:
            return json.dumps(value)[:-1] + rng.choice(
                [', "a": NaN}', ', "a": 1e999}', ', "a": ' + "9" * 5000 + "}", ', "\\ud800": 1}']
            )
    return json.dumps(replaced(rng, value))


def replaced(rng: random.Random, value: Any) -> Any:
    """Returns the value with one place in it replaced by something of another kind or size."""
    odd = [None, -1, 0, 2**31, 2**63, 10**30, 1e308, True, [], {}, [[]], "", hostile_text(rng)]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        return value | {key: replaced(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], replaced(rng, value[place]), *value[place + 1 :]]
    return rng.choice(odd)


# --- Images, tars, captions and tables ---


def bomb(rng: random.Random) -> bytes:
    """An image that claims, or unpacks to, far more than its bytes."""
    match rng.randrange(6):
        case 0:
            return png_of_size(*rng.choice([(65_000, 65_000), (2**31 - 1, 1), (0, 5), (20_000, 9)]))
        case 1:  # a profile and a text of 64 MB of zeros
            packed = zlib.compress(bytes(64 * 2**20), 9)
            kind, head = rng.choice(
                [(b"iCCP", b"x\0\0"), (b"zTXt", b"x\0\0"), (b"iTXt", b"x\0\1\0\0\0")]
            )
            body = head + packed
            chunk = struct.pack(">I", len(body)) + kind + body
            chunk += struct.pack(">I", zlib.crc32(kind + body))
            good = encoded(picture(1))
            return good[:33] + chunk + good[33:]
        case 2:
            return b'<svg xmlns="http://www.w3.org/2000/svg" width="9e9"><script/></svg>'
        case 3:
            frames = [picture(n, (8, 8)) for n in range(200)]
            return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
        case 4:
            return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n(touch executed) run\n"
    return encoded(Image.new("1", (16_000, 16_000)))


def image_bytes(rng: random.Random) -> tuple[bytes, str]:
    form = rng.choice(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
    suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(form, form.lower())
    content = encoded(picture(rng.randrange(99)), form)
    return bomb(rng) if rng.random() < 0.3 else damaged(rng, content), suffix


def file_name(rng: random.Random, number: int) -> str:
    """A name that a file system takes, hostile to pages and terminals."""
    text = hostile_text(rng).replace("/", "_").replace("\0", "")[:60] or "x"
    name = text.encode("utf-8", "surrogateescape")
    if rng.random() < 0.2:
        name += b"\xff\xfe"
    return f"{number}{os.fsdecode(name)}" if rng.random() < 0.5 else f"{number}"


PACK = ["max_bad_share=1", "num_processes=1", "output=out"]


def images(rng: random.Random, work: Path, assets: Assets) -> list[str]:
    folder = work / "source"
    folder.mkdir()
    for number in range(3):
        content, suffix = image_bytes(rng)
        name = file_name(rng, number)
        (folder / f"{name}.{suffix}").write_bytes(content)
        (folder / f"{name}.txt").write_text("a", encoding="utf-8")
    return ["data", "pack", "source=source", *PACK]


def captions(rng: random.Random, work: Path, assets: Assets) -> list[str]:
    folder = work / "source"
    folder.mkdir()
    form = rng.choice(["txt", "json", "caption"])
    for number in range(3):
        name = file_name(rng, number)
        (folder / f"{name}.png").write_bytes(encoded(picture(number, (8, 8))))
        content = hostile_text(rng).encode("utf-16" if rng.random() < 0.2 else "utf-8")
        if form == "json":
            text = hostile_json(rng, {"caption": ["a", hostile_text(rng)], "prompt": "b"})
            content = text.encode("utf-8", "replace")
        if rng.random() < 0.3:
            content = damaged(rng, content)
        (folder / f"{name}.{form}").write_bytes(content)
    return ["data", "pack", "source=source", *PACK]


def table_rows(rng: random.Random) -> list[dict[str, Any]]:
    names = ["0.png", "../../outside.png", "/etc/passwd", "0.png\0", f"pipe:touch {CANARY}", ""]
    return [
        {"file_name": "0.png" if n < 2 else rng.choice(names), "text": hostile_text(rng)}
        for n in range(4)
    ]


def source_with_image(work: Path) -> Path:
    folder = work / "source"
    folder.mkdir()
    (folder / "0.png").write_bytes(encoded(picture(0, (8, 8))))
    return folder


def tables(rng: random.Random, work: Path, assets: Assets) -> list[str]:
    """metadata.csv and metadata.jsonl."""
    folder, rows = source_with_image(work), table_rows(rng)
    if rng.random() < 0.5:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
        content = content if rng.random() < 0.4 else damaged(rng, content)
        (folder / "metadata.csv").write_bytes(content)
    else:
        lines = [hostile_json(rng, row) if rng.random() < 0.5 else json.dumps(row) for row in rows]
        (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return ["data", "pack", "source=source", *PACK]


def parquets(rng: random.Random, work: Path, assets: Assets) -> list[str]:
    folder, rows = source_with_image(work), table_rows(rng)
    column: list[Any] = [row["text"] for row in rows]
    match rng.randrange(5):
        case 0:
            column = [[text] for text in column]
        case 1:
            column = [{"a": {"b": 1}}, None, {"a": None}, {}]
        case 2:
            column = [2**40, -1, None, 0]
        case 3:
            rows = [{"image": {"bytes": image_bytes(rng)[0], "path": "/etc/passwd"}} for _ in rows]
    made = pyarrow.table(
        {name: [row[name] for row in rows] for name in rows[0] if name != "text"} | {"text": column}
    )
    buffer = io.BytesIO()
    parquet.write_table(made, buffer, compression=rng.choice(["snappy", "gzip", "none"]))
    content = buffer.getvalue() if rng.random() < 0.3 else damaged(rng, buffer.getvalue())
    (folder / "metadata.parquet").write_bytes(content)
    return ["data", "pack", "source=source", *PACK]


def tars(rng: random.Random, work: Path, assets: Assets) -> list[str]:
    folder, buffer = work / "shards", io.BytesIO()
    folder.mkdir()
    form = rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number in range(4):
            key = rng.choice(["../../x", "/abs/x", "a" * 90, "x", "d/./x", hostile_text(rng)[:80]])
            for suffix in ("png", "txt"):
                member = tarfile.TarInfo(f"{key}{number}.{suffix}".replace("\0", ""))
                content = image_bytes(rng)[0] if suffix == "png" else hostile_text(rng).encode()
                member.size = len(content)
                if rng.random() < 0.1:
                    member.type = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
                    member.linkname, member.size, content = "/etc/passwd", 0, b""
                if form == tarfile.PAX_FORMAT and rng.random() < 0.3:
                    member.pax_headers = {"size": rng.choice(["-1", "1" * 30, "x"]), "comment": "c"}
                tar.addfile(member, io.BytesIO(content))
    content = buffer.getvalue()
    match rng.randrange(5):
        case 0:
            content = damaged(rng, content)
        case 1:  # a size of 8 GiB, or below 0 in base 256, in the first header
            size = rng.choice([b"77777777777\0", b"\xff" * 12, b"\x80" + b"\x7f" * 11])
            head = bytearray(content[:512])
            head[124:136], head[148:156] = size, b" " * 8
            head[148:156] = b"%06o\0 " % sum(head)
            content = bytes(head) + content[512:]
        case 2:
            content = zlib.compress(bytes(32 * 2**20))
    (folder / "a.tar").write_bytes(content)
    return ["data", "check", "shards=shards", "num_processes=1", "max_bad_share=1"]


def index(rng: random.Random, work: Path, assets: Assets) -> list[str]:
    """The index beside shards: its tables, its numbers, and an array of pickled objects."""
    shutil.copytree(assets.folder / "images" / "shards", work / "shards")
    path = rng.choice(sorted((work / "shards" / "index").iterdir()))
    content = path.read_bytes()
    if path.suffix == ".npy" and rng.random() < 0.5:
        buffer = io.BytesIO()
        if rng.random() < 0.5:
            np.save(buffer, np.array([Run()], dtype=object), allow_pickle=True)
            content = buffer.getvalue()
        else:
            huge = rng.choice([b"(9999999999,)", b"(-1,)", b"(2, 2)", b"()"])
            start = content.index(b"'shape': ") + 9
            content = content[:start] + huge.ljust(content.index(b"}") - start) + content[start:]
    elif path.suffix in (".json", ".jsonl") and content and rng.random() < 0.7:
        first = content.splitlines()[0] if path.suffix == ".jsonl" else content
        content = hostile_json(rng, json.loads(first)).encode("utf-8", "replace")
    else:
        content = damaged(rng, content)
    path.write_bytes(content)
    if rng.random() < 0.7:
        return ["data", "check", "shards=shards", "num_processes=1", "max_bad_share=1"]
    base = f"checkpoint={assets.folder / 'pipeline'}"
    encode = ["data", "encode", "source=shards", base, "output=out", "resolution=16"]
    return [*encode, "num_workers=0", "device=cpu"]


# --- Command lines, YAML, prompts ---

YAMLS = (
    f"output: !!python/object/apply:os.system ['touch {CANARY}']\n",
    f"output: !!python/name:os.system\nprompts: !!python/object/new:os.system [touch {CANARY}]\n",
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{chr(n + 1)}: &{chr(n + 1)} [{', '.join([f'*{chr(n)}'] * 9)}]\n" for n in range(97, 105)
    ),
    "prompts: " + "[" * 5000,
    "prompts: " + "{a: " * 3000,
    "a: &a\n  b: *a\n",
    "<<: [*x]\n",
    "prompts: 1:60:60\noutput: 0o777\nseed: 1_000\n",
    "seed: " + "9" * 5000 + "\n",
    "seed: .inf\nnum_steps: .nan\n",
    "prompts: ${oc.env:HOME}\noutput: ${oc.decode:${prompts}}\n",
    "output: ${output}\n",
    "prompts: " + "${prompts" * 300,
    "--- a\n--- b\n",
    "%YAML 9.9\n---\nseed: 1\n",
    "prompts: 2026-01-01\nseed: 0x7f\n",
    "? [a, b]\n: c\n",
    "\ufeffseed: 1\n",
    "seed: 1\nseed: 2\n",
    "1: 2\nnull: 3\ntrue: 4\n",
    "verifiers: {a: {kind: custom, path: 'os:system'}}\n",
    "checkpoint: 'pipe:touch executed'\n",
)
GOOD_YAML = "prompts: [a cat, a dog]\noutput: out\nseed: 3\nnum_steps: 5\nguidance_scale: 2.5\n"
VERBS = ("sample", "search", "evaluate", "train", "export", "report", "sweep", "doctor")


def yamls(rng: random.Random, work: Path, assets: Assets) -> list[str]:
    content = rng.choice(YAMLS).encode() if rng.random() < 0.6 else damaged(rng, GOOD_YAML.encode())
    (work / "config.yaml").write_bytes(content)
    return [rng.choice(VERBS), "config.yaml", "checkpoint=c", "output=o", "--print-config"][
        : rng.choice((2, 5))
    ] + ["--print-config"]


def prompts(rng: random.Random, work: Path, assets: Assets) -> list[str]:
    """Prompts in files of every format, up to a million lines, and on the command line."""
    base = [f"checkpoint={assets.folder / 'pipeline'}", "output=out", "num_steps=1", "device=cpu"]
    base += ["guidance_scale=1", "batch_size=4"]
    form = rng.choice(["txt", "jsonl", "csv", "tsv", "json", "parquet", "argument"])
    if form == "argument":
        text = hostile_text(rng)[:20_000].replace("\0", "")
        return ["sample", *base, f"prompts={text}"]
    path, text = work / f"p.{form}", hostile_text(rng)[:20_000]
    content = f"{text}\na cat\n".encode()
    if form == "jsonl":
        content = hostile_json(rng, {"prompt": text, "category": hostile_text(rng)}).encode(
            "utf-8", "replace"
        )
    elif rng.random() < 0.2:  # refused when all of them are read
        path.write_bytes(b"a cat\n" * 10**6 if rng.random() < 0.5 else b"\n" * 10**6)
        return ["evaluate", *base, f"prompts={path.name}", "offset=1000000"]
    elif rng.random() < 0.5:
        content = damaged(rng, content)
    path.write_bytes(content)
    return ["sample", *base, f"prompts={path.name}"]
