"""Hostile checkpoints, LoRA files, and records of searches and trainings, from seeds."""

import csv
import io
import json
import pickle
import random
import shutil
import struct
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load, save

from tests.hostile_inputs import (
    CANARY,
    MARKUP,
    Assets,
    Run,
    damaged,
    hostile_json,
    hostile_text,
)
from tests.input_cases import VALUES

SAMPLE = ["sample", "output=out", "prompts=a one", "num_steps=1", "device=cpu", "guidance_scale=1"]
SAMPLE += ["height=16", "width=16", "allow_unsound=true"]


def hostile_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Changes a file's header: its length, offsets, types, names and depth; or its bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    match rng.randrange(12):
        case 0:
            return damaged(rng, content)
        case 1:
            claimed = rng.choice([0, 1, 10**8 - 1, 2**40, 2**63, 2**64 - 1, len(content)])
            return struct.pack("<Q", claimed) + content[8:]
        case 2:  # a header of 60 MB, of which one entry is another tensor
            header["__metadata__"] = {"x": "y" * 60 * 2**20}
        case 3:
            text = hostile_json(rng, header).encode("utf-8", "replace")
            return struct.pack("<Q", len(text)) + text + body
        case 4:
            payload = pickle.dumps(Run())
            return payload if rng.random() < 0.5 else zip_of({"a/data.pkl": payload})
        case _:
            name = rng.choice([name for name in header if name != "__metadata__"])
            entry = header[name]
            match rng.randrange(6):
                case 0:
                    entry["shape"] = rng.choice([[-1], [2**62, 2**62], [0], [], entry["shape"] * 2])
                case 1:
                    entry["dtype"] = rng.choice(["F8_E4M3", "BOOL", "X", "I64", 3, None])
                case 2:
                    entry["data_offsets"] = rng.choice([[0, 0], [-1, 5], [5, 1], [0, 2**63], [0]])
                case 3:
                    header[hostile_text(rng)] = header.pop(name)
                case 4:
                    header["__metadata__"] = rng.choice(
                        [{"format": "np"}, {hostile_text(rng): hostile_text(rng)}, {"a": {}}, []]
                    )
                case 5:
                    del header[name]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def single_files(rng: random.Random, work: Path, assets: Assets) -> list[str]:
    content = (assets.folder / "single.safetensors").read_bytes()
    (work / "model.safetensors").write_bytes(hostile_safetensors(rng, content))
    return [*SAMPLE, "checkpoint=model.safetensors"]


def loras(rng: random.Random, work: Path, assets: Assets) -> list[str]:
    """Of two files one has a whole header, and values, alphas or metadata of no sense."""
    content = (assets.folder / "lora.safetensors").read_bytes()
    if rng.random() < 0.5:
        content = hostile_safetensors(rng, content)
    else:
        tensors, metadata = load(content), {}
        for name in rng.sample(sorted(tensors), rng.randint(1, 4)):
            tensor = tensors[name].float()
            match rng.randrange(5):
                case 0:
                    tensor.flatten()[0] = rng.choice([torch.nan, torch.inf, 3e38])
                case 1:
                    tensor *= rng.choice([0.0, -1e30, 1e-45])
                case 2:
                    tensor = tensor.to(
                        rng.choice([torch.float64, torch.int64, torch.float8_e4m3fn])
                    )
                case 3:
                    alpha = rng.choice([0.0, -1.0, torch.nan, 1e38])
                    tensors[name.partition(".lora_")[0] + ".alpha"] = torch.tensor(alpha)
                case 4:
                    keys = ["ss_base_model_version", "ss_network_alpha", "lora_adapter_metadata"]
                    metadata[rng.choice([*keys, hostile_text(rng)])] = hostile_text(rng)
            tensors[name] = tensor
        clean = {k: v.encode("utf-8", "replace").decode() for k, v in metadata.items()}
        content = save(
            tensors, {k.encode("utf-8", "replace").decode(): v for k, v in clean.items()}
        )
    (work / "lora.safetensors").write_bytes(content)
    return [*SAMPLE, f"checkpoint={assets.folder / 'pipeline'}", "lora=lora.safetensors"]


def folders(rng: random.Random, work: Path, assets: Assets) -> list[str]:
    """A pipeline of which one file is hostile, or whose configs ask for code or for terabytes."""
    shutil.copytree(assets.folder / "pipeline", work / "model")
    files = sorted(path for path in (work / "model").rglob("*") if path.is_file())
    path = rng.choice(files)
    if path.suffix == ".safetensors":
        path.write_bytes(hostile_safetensors(rng, path.read_bytes()))
    elif path.suffix == ".json":
        value = json.loads(path.read_text())
        if rng.random() < 0.3 and path.name == "config.json":
            value |= rng.choice(
                [
                    {"block_out_channels": [2**20, 2**21]},
                    {"vocab_size": 2**40},
                    {"num_hidden_layers": 10**7, "layers_per_block": 10**7},
                    {"_class_name": "../../evil", "architectures": ["os.system"]},
                    {"auto_map": {"AutoModel": "evil.Model"}, "trust_remote_code": True},
                    {"sample_size": 10**9},
                ]
            )
            (path.parent / "evil.py").write_text(f"import os\nos.system('touch {CANARY}')\n")
            path.write_text(json.dumps(value))
        elif rng.random() < 0.2 and path.name == "model_index.json":
            value |= {"unet": ["evil", "Model"], "_class_name": ["evil", "Pipeline"]}
            (work / "model" / "evil.py").write_text(f"import os\nos.system('touch {CANARY}')\n")
            path.write_text(json.dumps(value))
        else:
            path.write_bytes(hostile_json(rng, value).encode("utf-8", "replace"))
    else:
        path.write_bytes(damaged(rng, path.read_bytes()))
    return [*SAMPLE, "checkpoint=model"]


def schedulers(rng: random.Random, work: Path, assets: Assets) -> list[str]:
    """A scheduler_config.json with keys of other types and values."""
    shutil.copytree(assets.folder / "pipeline", work / "model")
    path = work / "model" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    config |= {"num_train_timesteps": 10**9} if rng.random() < 0.1 else {}
    for key in rng.sample(sorted(VALUES), 2):
        config[key] = rng.choice([None, -1, 0, 1e308, "x", [], {}, [[1]], True, hostile_text(rng)])
    path.write_text(json.dumps(config))
    return [*SAMPLE, "checkpoint=model"]


def ckpts(rng: random.Random, work: Path, assets: Assets) -> list[str]:
    """A .ckpt: a pickle that runs a command, in torch's zip or bare, and damaged ones."""
    path, good = work / "model.ckpt", (assets.folder / "good.ckpt").read_bytes()
    match rng.randrange(5):
        case 0:
            path.write_bytes(pickle.dumps({"state_dict": Run()}))
        case 1:
            torch.save({"state_dict": {"unet.x": torch.zeros(1)}, "blackpoint": Run()}, path)
        case 2:  # 256 MB of zeros in few bytes
            path.write_bytes(zip_of({"a/data.pkl": bytes(256 * 2**20), "a/version": b"3"}))
        case 3:
            record = {"state_dict": {1: 2, "unet.x": [[]]}, "blackpoint": hostile_text(rng)}
            torch.save(record, path)
        case _:
            path.write_bytes(damaged(rng, good))
    if rng.random() < 0.5:
        return [*SAMPLE, "checkpoint=model.ckpt"]
    (work / "run" / "checkpoints").mkdir(parents=True)
    path.rename(work / "run" / "checkpoints" / "step_00000003.ckpt")
    return ["export", "checkpoint=run", "output=out"]


def searches(rng: random.Random, work: Path, assets: Assets) -> list[str]:
    """The folder of a search, of which one file is changed: continued, or reported."""
    shutil.copytree(assets.folder / "search", work / "search")
    names = ["candidates.jsonl", "winners.jsonl", "search.json", "ledger.json", "hacking.json"]
    path = work / "search" / rng.choice(names[:1] * 3 + names)
    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    place = rng.randrange(len(lines))
    value = json.loads(lines[place])
    if "prompt" in value and rng.random() < 0.5:
        value["prompt"] = hostile_text(rng)
        lines[place] = json.dumps(value)
    elif "image" in value and rng.random() < 0.5:
        value["image"] = rng.choice(["/etc/passwd", "../../x.png", f"pipe:touch {CANARY}", "\0"])
        lines[place] = json.dumps(value)
    else:
        lines[place] = hostile_json(rng, value)
    content = ("\n".join(lines) + "\n").encode("utf-8", "replace")
    path.write_bytes(content if rng.random() < 0.8 else damaged(rng, content))
    if rng.random() < 0.7:
        return ["report", "run_dir=search"]
    search = [f"checkpoint={assets.folder / 'pipeline'}", 'prompts=["a red one", "a night"]']
    search += ["output=search", "budget_nfe=4", "num_steps=2", "device=cpu", "guidance_scale=1"]
    return ["search", *search, "verifiers.dark.kind=luminance", "verifiers.dark.target=0"]


def metrics(rng: random.Random, work: Path, assets: Assets) -> list[str]:
    """The metrics.csv of a run, with its config and previews, for the page about it."""
    run = work / "run"
    (run / "checkpoints").mkdir(parents=True)
    names = ["train/loss", "validation/loss", "lr", MARKUP, hostile_text(rng)[:300]]
    rows = [
        [step, name, 1 / (step + 1)] for step in range(5) for name in names[: rng.choice((2, 5))]
    ]
    for _ in range(rng.randrange(4)):
        odd = rng.choice(["nan", "1e999", "-1", "", "x" * 200_000, MARKUP, "\0", "9" * 400])
        rows[rng.randrange(len(rows))][rng.choice((0, 1, 2))] = odd
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([["step", "name", "value"], *rows])
    content = text.getvalue().encode("utf-8", "replace")
    (run / "metrics.csv").write_bytes(content if rng.random() < 0.6 else damaged(rng, content))
    if rng.random() < 0.5:
        (run / "config.yaml").write_text(f"checkpoint: {json.dumps(hostile_text(rng))}\nseed: 0\n")
    if rng.random() < 0.5:
        environment = {"command": [hostile_text(rng)], "git_commit": hostile_text(rng)}
        (run / "environment.json").write_text(hostile_json(rng, environment), "utf-8", "replace")
    return ["report", "run_dir=run"]
