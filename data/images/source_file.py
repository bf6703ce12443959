"""Reading a file of the user's image folder, whatever it turns out to be."""

import os
import stat
from pathlib import Path

from blackpoint.data.images.decode import BadImage

MAX_IMAGE_BYTES = 1 << 31
MAX_CAPTION_BYTES = 1 << 24


def read_source_file(path: Path, max_bytes: int) -> bytes:
    """Returns the bytes of a regular file; raises BadImage with the reason if there are none.

    A pipe, which may never give a byte, or a device, which may never end, is not opened.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a regular file")
        if status.st_size > max_bytes:
            raise BadImage(f"{status.st_size} bytes, above {max_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"can't be read: {error.strerror}") from None
