"""Command lines drawn at random, each with what must hold where it is accepted.

Of each kind: captions of a folder, shards written again at their place, prompts on the command
line, scheduler configs, output paths.
"""

import contextlib
import csv
import io
import itertools
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import yaml
from hypothesis import strategies as st
from pyarrow import parquet

from blackpoint.data.config import DataConfig
from blackpoint.data.index.index import INDEX_FOLDER
from blackpoint.data.module import CaptionedImages
from blackpoint.scripts.cli import main
from tests.data_images import encoded, picture

IMAGES = ("0.png", "1.png", "sub/2.png")
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=40)
AWKWARD = st.sampled_from(
    ["a cat, sitting", 'a "cat"', '"', "a\nb", "#3", "- a", "null", "[a, b]", "${x}", "???", " a "]
)


@dataclass
class Case:
    """A command line, run in `folder`, and what must hold where it is accepted."""

    arguments: list[str]
    output: Path | None
    accepted: Callable[[str], None]
    """Called with what the command printed."""


def in_this_process(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Runs the command's entry and returns its status and all that it printed."""
    printed, before = io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return main(arguments), printed.getvalue()
    finally:
        os.chdir(before)


# --- Captions of a folder of images ---


FORMS = ("csv", "jsonl", "parquet", "sidecar", "caption", "json", "kohya", "embedded", "parts")
LISTS = ("jsonl", "parquet", "json", "embedded", "parts")
"""Forms in which an image may have several captions."""
Captions = tuple[str, ...]


def packed_captions(output: Path) -> dict[str, Captions]:
    """Reads the captions of each key from the shards themselves."""
    found: dict[str, Captions] = {}
    for path in output.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.rpartition(".")
                text = tar.extractfile(member).read()  # type: ignore[union-attr]
                if suffix == "txt":
                    found[key] = (text.decode(),)
                elif suffix == "json" and key not in found:
                    found[key] = tuple(json.loads(text)["caption"])
    return found


def stripped(texts: Captions) -> Captions:
    """Returns the captions that are not empty, as they are stored."""
    return tuple(text.strip() for text in texts if text.strip())


def captions_case(draw: st.DrawFn, folder: Path) -> Case:
    """Captions in one of the forms, written rightly, then perhaps with one character changed."""
    source, output = folder / "source", folder / "out"
    form = draw(st.sampled_from(FORMS))
    most = 3 if form in LISTS else 1
    texts = st.lists(TEXTS | AWKWARD, min_size=1, max_size=most).map(tuple)
    captions = {name: draw(texts) for name in IMAGES}
    for number, name in enumerate(IMAGES if form != "embedded" else ()):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(encoded(picture(number, (8, 8))))
    source.mkdir(exist_ok=True)
    damaged = write_captions(draw, source, form, captions)
    key_of = {name: name.removesuffix(".png") for name in IMAGES}
    if form == "embedded":
        key_of = {name: f"metadata/{number:08d}" for number, name in enumerate(IMAGES)}

    def accepted(printed: str) -> None:
        found = packed_captions(output)
        for name, expected in (captions if damaged is None else damaged).items():
            if (key := key_of.get(name, name.removesuffix(".png"))) in found:
                assert found[key] == stripped(expected)
            else:
                assert not stripped(expected) or damaged is not None, (name, printed)
        assert set(found) <= set(key_of.values())

    rules = [f"max_bad_share={draw(st.sampled_from(['1', '0']))}", "num_processes=1"]
    if form in ("json", "sidecar", "caption"):
        rules.append(f"captions={form}")  # where all are bad, there is nothing to find
    return Case(["data", "pack", f"source={source}", f"output={output}", *rules], output, accepted)


def write_captions(
    draw: st.DrawFn, source: Path, form: str, captions: dict[str, Captions]
) -> dict[str, Captions] | None:
    """Writes captions; where the file is then changed, returns what it holds, read strictly."""
    one = {name: texts[0] if len(texts) == 1 else list(texts) for name, texts in captions.items()}
    rows = [{"file_name": name, "text": text} for name, text in one.items()]
    if form in ("sidecar", "caption", "json"):
        suffix = ".txt" if form == "sidecar" else f".{form}"
        for name, text in one.items():
            content = json.dumps({"caption": text}) if form == "json" else captions[name][0]
            (source / name).with_suffix(suffix).write_bytes(content.encode())
        return None
    if form in ("parquet", "embedded", "parts"):
        images = [encoded(picture(n, (8, 8))) for n in range(len(IMAGES))]
        rows = [row | {"text": list(captions[row["file_name"]])} for row in rows]
        if form == "embedded":
            rows = [{"image": {"bytes": b, "path": None}, "text": row["text"]}
                    for b, row in zip(images, rows, strict=True)]  # fmt: skip
        parts = {"metadata": rows}
        if form == "parts":
            parts = {f"train-0000{n}-of-00003": [row] for n, row in enumerate(rows)}
        for name, part in parts.items():
            parquet.write_table(pyarrow.Table.from_pylist(part), source / f"{name}.parquet")
        return None
    table = source / ("meta_cap.json" if form == "kohya" else f"metadata.{form}")
    if form == "kohya":
        table.write_text(json.dumps({name: {"caption": text} for name, text in one.items()}))
    elif form == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    if not draw(st.booleans()):
        return None
    content = table.read_text(encoding="utf-8")
    place = draw(st.integers(0, len(content)))
    inserted = draw(st.sampled_from(["", '"', ",", "\n", "\t", "\0", "{", " "]))
    content = content[:place] + inserted + content[place + draw(st.integers(0, 1)) :]
    with table.open("w", encoding="utf-8", newline="") as file:
        file.write(content)
    return read_strictly(content, form)


def read_strictly(content: str, form: str) -> dict[str, Captions]:
    """Returns {file_name: captions} of the whole rows; nothing of a table that is damaged."""
    found: dict[str, Any] = {}
    if form == "csv":
        header: list[str] = []
        with contextlib.suppress(csv.Error):
            for values in csv.reader(io.StringIO(content, newline=""), strict=True):
                if not header:
                    header = [name.strip() for name in values]
                elif len(values) == len(header) and {"file_name", "text"} <= set(header):
                    row = dict(zip(header, values, strict=True))
                    found[os.path.normpath(row["file_name"].strip())] = row["text"]
    for line in content.split("\n") if form == "jsonl" else ():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            row = json.loads(line)
            found[row["file_name"].strip()] = row["text"]
    if form == "kohya":
        with contextlib.suppress(ValueError, AttributeError, KeyError, TypeError):
            found = {name: row["caption"] for name, row in json.loads(content).items()}
    lists = {name: (text,) if isinstance(text, str) else text for name, text in found.items()}
    return {
        name: tuple(texts)
        for name, texts in lists.items()
        if isinstance(texts, tuple | list) and all(isinstance(text, str) for text in texts)
    }


# --- Shards that are written again at their place ---


def tar_of(captions: dict[str, str], pictures: dict[str, int], path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for key, caption in captions.items():
            image = encoded(picture(pictures[key], (8, 8)), "BMP")  # as many bytes for each
            for suffix, content in (("bmp", image), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def shards_case(draw: st.DrawFn, folder: Path) -> Case:
    """A shard that is indexed, then written again: with other captions, images, order or none."""
    words = st.sampled_from(["cat", "dog", "a cat on a sofa", "c"])
    keys = [f"{number:02d}" for number in range(draw(st.integers(1, 4)))]
    before = {key: draw(words) for key in keys}
    images = {key: number for number, key in enumerate(keys)}
    shards = folder / "shards"
    shards.mkdir()
    tar_of(before, images, shards / "a.tar")
    assert in_this_process(["data", "check", f"shards={shards}", "num_processes=1"], folder)[0] == 0
    times = (shards / "a.tar").stat()
    kept = draw(st.permutations(keys))[: draw(st.integers(1, len(keys)))]
    after = {key: draw(st.just(before[key]) | words) for key in kept}
    pictured = {key: images[key] if draw(st.booleans()) else 100 + images[key] for key in kept}
    tar_of(after, pictured, shards / "a.tar")
    if draw(st.booleans()):
        os.utime(shards / "a.tar", ns=(times.st_atime_ns, times.st_mtime_ns))
    same = list(after.items()) == list(before.items()) and pictured == images
    full = draw(st.booleans())

    def accepted(printed: str) -> None:
        assert ("changed" in printed or "not where they were" in printed) == (not same), printed
        shutil.rmtree(shards / INDEX_FOLDER)
        images = CaptionedImages(DataConfig(str(shards), resolution=8, num_workers=0), 0, 1)
        images.prepare_data()
        images.setup("fit")
        samples = itertools.islice(images.train_dataloader(), len(after))
        served = {
            key: text for s in samples for key, text in zip(s["key"], s["caption"], strict=True)
        }
        assert {key: served[key] or after[key] for key in served} == after

    arguments = ["data", "check", f"shards={shards}", "num_processes=1"]
    return Case([*arguments, *(["full=true"] if full else [])], None, accepted)


# --- Prompts on the command line ---


def prompts_case(draw: st.DrawFn, folder: Path) -> Case:
    """A text as prompts, as negative prompt and in a list: each is the same text in the config."""
    prompt, negative = draw(TEXTS | AWKWARD), draw(TEXTS | AWKWARD)
    if "/" in prompt or prompt.startswith(("~", "$")):
        prompt = prompt.replace("/", "-").lstrip("~$")  # a file, or a path to expand
    in_list = draw(st.booleans())
    value = json.dumps([prompt, "b"]) if in_list else prompt
    try:
        plain = not isinstance(json.loads(value, strict=False), list)
    except ValueError:
        plain = True

    def accepted(printed: str) -> None:
        lines = printed.split("\n")
        notes = [number for number, line in enumerate(lines) if line.startswith("checkpoint:")]
        config = yaml.safe_load("\n".join(lines[notes[0] :]))
        assert config["negative_prompt"] == negative
        if in_list or plain:
            assert config["prompts"] == ([prompt, "b"] if in_list else prompt)

    arguments = ["sample", "checkpoint=c", "output=o", f"prompts={value}"]
    return Case([*arguments, f"negative_prompt={negative}", "--print-config"], None, accepted)


# --- Scheduler configs ---

SCHEDULERS = ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "LCMScheduler")
SCHEDULERS += ("DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "NoScheduler")
NUMBERS = st.sampled_from([0.00085, 0.012, 1e-4, "0.012", "x", [0.1], None, -1, 2, True, 1e400])
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "_class_name": st.sampled_from([*SCHEDULERS, 3, None]),
    "beta_start": NUMBERS,
    "beta_end": NUMBERS,
    "beta_schedule": st.sampled_from(
        ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "", 1, None, ["linear"]]
    ),
    "num_train_timesteps": st.sampled_from([1000, "1000", 10, 0, -1, 1.5, None, [1000], True]),
    "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample", "flow", None, 1]),
    "timestep_spacing": st.sampled_from(["leading", "trailing", "linspace", "x", None, 1]),
    "rescale_betas_zero_snr": st.sampled_from([True, False, "true", None, 1]),
    "steps_offset": st.sampled_from([0, 1, "1", None, 5000, -1, 0.5]),
    "set_alpha_to_one": st.sampled_from([True, False, None, "false"]),
    "trained_betas": st.sampled_from(
        [None, [], [0.1, 0.2], [0.1] * 10, "x", [[0.1]], ["0.1"], [2.0] * 10, [-0.1] * 10]
    ),
    "clip_sample": st.sampled_from([True, False, None]),
    "thresholding": st.sampled_from([True, False]),
    "use_karras_sigmas": st.sampled_from([True, False]),
    "final_sigmas_type": st.sampled_from(["zero", "sigma_min", 1]),
}


def scheduler_case(draw: st.DrawFn, folder: Path) -> Case:
    """A pipeline whose scheduler_config.json has some keys changed, dropped or of another type."""
    checkpoint, output = folder / "pipeline", folder / "out"
    path = checkpoint / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text())
    for key in draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=4, unique=True)):
        config.pop(key, None)
        if draw(st.integers(0, 3)):
            config[key] = draw(VALUES[key])
    path.write_text(json.dumps(config))

    def accepted(printed: str) -> None:
        assert len(list(output.rglob("0*.png"))) == 1

    arguments = [f"checkpoint={checkpoint}", f"output={output}", "prompts=a one", "num_steps=2"]
    arguments += ["allow_unsound=true", "guidance_scale=1", "device=cpu"]
    return Case(["sample", *arguments], output, accepted)


# --- Paths ---

PARTS = st.sampled_from(
    ["~", "$HOME", "${HOME}", "$NOT_SET", "${NOT_SET}", "..", ".", "", "a b", "\u00e4", "x" * 300]
    + ["a_file", "a_file/below", "#1", "-", "'", '"', "*", "{a,b}", "[0]", "a=b", "null", "a\nb"]
    + ["y" * 255, "full", "1e5", "%s", "\\", ":", "s3:", "a:b", "?"]
)


def path_case(draw: st.DrawFn, folder: Path) -> Case:
    """An output anywhere: it is made where a shell would have put it, and nowhere else."""
    home = folder / "home"
    (home / "full").mkdir(parents=True)
    (home / "full/there").write_text("kept")
    (home / "a_file").write_text("kept")
    text = "/".join(draw(st.lists(PARTS, min_size=1, max_size=3)))
    if draw(st.booleans()):
        text = f"{home}/{text}"
    elif text.startswith("/") or "://" in text:
        text = f".{text}"
    image = folder / "source/0.png"
    image.parent.mkdir()
    image.write_bytes(encoded(picture(0, (8, 8))))
    image.with_suffix(".txt").write_text("a")
    before = files(home)

    def accepted(printed: str) -> None:
        expected = os.path.join(home, os.path.expanduser(os.path.expandvars(text)))
        made = Path(os.path.abspath(expected))
        assert (made / "index").is_dir() or any(made.glob("*.tar")), (text, files(home))
        assert {p for p in files(home) if made not in p.parents} == before

    return Case(["data", "pack", "source=../source", f"output={text}"], None, accepted)


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


CASES = {
    "captions": captions_case,
    "shards": shards_case,
    "prompts": prompts_case,
    "schedulers": scheduler_case,
    "paths": path_case,
}
