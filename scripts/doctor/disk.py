"""Probe of a folder: whether it can be written, its room, and its speed for large files."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from blackpoint.data.files.paths import obstacle
from blackpoint.scripts.doctor.row import Row

BLOCK_BYTES, MOST_BLOCKS, MOST_S = 4 * 2**20, 16, 1.5
CHECKPOINT_GB = 13.8
"""Of SD 1.5: 859.5 million weights, their average and two moments, 4 bytes each."""
NOTICE_S = 120
"""What slurm/train.sbatch leaves for saving before the time limit."""


def disk(path: str, room_gb: float) -> Iterator[Row]:
    """Writes and reads a file without a name in the folder, or in the nearest one that is there."""
    name, folder = f"disk {path}", Path(os.path.abspath(path))
    if reason := obstacle(folder):
        yield Row(name, "red", f"can't be written: {reason}", "name another place")
        return
    while not folder.is_dir():
        folder = folder.parent
    free_gb = shutil.disk_usage(folder).free / 1e9
    try:
        writing, reading = speeds(folder)
    except OSError as error:
        finding = f"can't be written: {error.strerror}; {free_gb:.1f} GB are free"
        remedy = "make room (also of inodes and quota), restore the rights, or name another place"
        yield Row(name, "red", finding, remedy)
        return
    finding = f"{free_gb:,.1f} GB free; writes {writing:,.0f} MB/s, reads {reading:,.0f} MB/s"
    save_s = CHECKPOINT_GB * 1e3 / writing
    if free_gb < room_gb:
        remedy = f"a checkpoint of SD 1.5 takes {CHECKPOINT_GB} GB; make room, or lower room_gb"
        yield Row(name, "yellow", finding, remedy)
    elif save_s > NOTICE_S:
        remedy = (
            f"SD 1.5's {CHECKPOINT_GB} GB take {save_s:,.0f} s to save, and slurm/train.sbatch "
            f"leaves {NOTICE_S} s: raise its --signal=USR1@{NOTICE_S}, or name a faster place"
        )
        yield Row(name, "yellow", finding, remedy)
    else:
        yield Row(name, "green", finding)


def speeds(folder: Path) -> tuple[float, float]:
    """Returns MB/s of writing through to the disk, and of reading the same file again.

    64 MiB, or what 1.5 s write. The system is asked to forget what it keeps of the file before it
    is read; file systems in memory do not. Raises OSError.
    """
    block = os.urandom(BLOCK_BYTES)
    with tempfile.TemporaryFile(dir=folder) as file:
        start_s, written = time.perf_counter(), 0
        while written < MOST_BLOCKS * BLOCK_BYTES and time.perf_counter() - start_s < MOST_S:
            written += os.write(file.fileno(), block)
        os.fsync(file.fileno())
        write_s = time.perf_counter() - start_s
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        start_s = time.perf_counter()
        while os.read(file.fileno(), BLOCK_BYTES):
            pass
        read_s = time.perf_counter() - start_s
    return written / 1e6 / write_s, written / 1e6 / read_s
