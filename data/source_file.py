"""The old name of data.images.source_file."""

from data.images.source_file import MAX_CAPTION_BYTES as MAX_CAPTION_BYTES
from data.images.source_file import MAX_IMAGE_BYTES as MAX_IMAGE_BYTES
from data.images.source_file import read_source_file as read_source_file
