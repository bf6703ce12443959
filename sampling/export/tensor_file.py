"""Writes a .safetensors file one tensor after the other, with the hash of its data in the header.

    8 bytes: length of the header | header: JSON, filled up with blanks | data, without gaps

save_file of safetensors holds the bytes of all tensors before it writes them; here no more than one
is held beside what is given. The hash stands before the data that it is of, so the header is
written again when all is written.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
HASH_KEY = "modelspec.hash_sha256"
ALIGNMENT = 8


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Writes floating-point tensors and text entries; returns the hash that HASH_KEY holds.

    That is "0x" and SHA-256 of the data in hexadecimal, as ModelSpec 1.0.1 has it.
    """
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    digest = hashlib.sha256()
    with path.open("wb") as file:
        file.write(_header(entries, metadata, digest))
        for tensor in tensors.values():
            if tensor.numel():
                data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
                digest.update(data)
                file.write(data)
        file.seek(0)
        file.write(_header(entries, metadata, digest))
    return _written(digest)


def _header(entries: Mapping[str, Any], metadata: Mapping[str, str], digest: Any) -> bytes:
    """Returns the header with its length; the same length whatever the digest."""
    whole = {"__metadata__": {**metadata, HASH_KEY: _written(digest)}, **entries}
    text = json.dumps(whole, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _written(digest: Any) -> str:
    return f"0x{digest.hexdigest()}"
