"""A user's own code by import path, "package.module:name"; the working folder is searched too."""

import importlib
import inspect
import logging
import sys
from pathlib import Path
from typing import Any

from blackpoint.data.files.errors import UserError
from blackpoint.data.files.notes import first

log = logging.getLogger(__name__)

MOVED = {
    "sampling.evaluation.digit_perceptron": "blackpoint.scripts.miniature.digit_readers",
    "sampling.evaluation.digit_reader": "blackpoint.scripts.miniature.digit_readers",
    "sampling.evaluation.imagenet_features": (
        "blackpoint.sampling.verifiers.models.imagenet_features"
    ),
}
"""Where modules lie that YAMLs name by where they lay before."""


def current_path(path: str) -> str:
    """Returns today's import path of the object that `path` named when it was written."""
    module_name, colon, name = path.partition(":")
    return MOVED.get(module_name, module_name) + colon + name


def import_object(path: str, field: str) -> Any:
    """Returns the object of "package.module:name"; raises UserError where there is none."""
    if current_path(path) != path and first(f"verifiers named as {path}"):
        log.warning("note: %s=%s is %s now; write that", field, path, current_path(path))
    module_name, _, name = current_path(path).partition(":")
    if not module_name or not name:
        raise UserError(
            f"{field}={path} must be an import path, package.module:name, such as my_scores:sharp"
        )
    here = str(Path.cwd())
    added = here not in sys.path  # removing it would otherwise remove an entry that others need
    if added:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{field}={path} cannot be imported ({error}); start the command in the folder that "
            f"holds {module_name.partition('.')[0]}, or install it"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise UserError(f"{field}={path}: {module.__file__} defines no {name}") from error


def built_object(path: str, field: str, checkpoint: str | None) -> Any:
    """Returns the object that the path names; a class is built first.

    With a checkpoint it is `Class.load(checkpoint)` where there is such a method, else
    `Class(checkpoint)`; without one `Class()`.
    """
    imported = import_object(path, field)
    if not inspect.isclass(imported):
        return imported
    if checkpoint is None:
        try:
            inspect.signature(imported).bind()
        except TypeError as error:
            raise UserError(
                f"{field}={path} is a class that needs arguments ({error}); give it a checkpoint, "
                "or a class that is built without"
            ) from error
        return imported()
    load: Any = getattr(imported, "load", imported)
    return load(checkpoint)
