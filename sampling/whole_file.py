"""Files that are whole or as they were before: data/files/whole_file.py, by its name here."""

from blackpoint.data.files.whole_file import write_new as write_new
from blackpoint.data.files.whole_file import write_whole as write_whole
