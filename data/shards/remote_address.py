"""Addresses, and the file systems of fsspec behind them: one request and its answer."""

import re
from email.utils import parsedate_to_datetime
from typing import Any

from blackpoint.data.files.errors import UserError

COMMAND = "pipe:"
DATE_RESOLUTION_S = 2
OF_EXTRA = ("s3", "gs", "gcs")
"""Protocols of the packages that the extra `remote` installs."""
# By which stores tell one version of a file from another, the most certain first.
VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
    "created",
)


def shown(source: str) -> str:
    """Returns a URL without its query and password, which may be secret; a command as it is."""
    if source.startswith(COMMAND):
        return source
    return re.sub(r"//[^/@]*@", "//", source.partition("?")[0])


def request(file_system: Any, path: str, wanted: str = "", version: str = "") -> Any:
    """Returns fsspec's stream of a GET, whose answer is `.r`; raises for an error status."""
    headers = {"Accept-Encoding": "identity"}
    if wanted:
        headers["Range"] = wanted
    if version and wanted:
        headers["If-Range"] = version  # A file that changed meanwhile comes whole.
    # The size is a dummy: without one, fsspec would ask for it first.
    return file_system.open(path, "rb", block_size=0, size=1, headers=headers)


def http_version(answer: Any) -> str:
    """Returns ETag or Last-Modified of an answer, "" without either.

    A date so recent that the file may change again and keep it is none (RFC 9110, 8.8.2.2).
    """
    tag, changed = (answer.headers.get(name, "") for name in ("ETag", "Last-Modified"))
    if tag or not changed:
        return tag
    try:
        now = parsedate_to_datetime(answer.headers.get("Date", ""))
        is_recent = (now - parsedate_to_datetime(changed)).total_seconds() < DATE_RESOLUTION_S
    except (ValueError, TypeError):
        return changed
    return "" if is_recent else changed


def stored_version(info: dict[str, Any]) -> str:
    """Returns a file's version in a store, by fsspec's `info` of it."""
    return next((str(info[name]) for name in VERSIONS if info.get(name)), "")


def total_bytes(answer: Any) -> int | None:
    """Returns the size of the whole file that an answer is of, None where it does not say."""
    whole = re.match(r"bytes [\d-]+/(\d+)", answer.headers.get("Content-Range", ""))
    if answer.status == 206:
        return int(whole[1]) if whole else None
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def is_http(file_system: Any) -> bool:
    """Tells http and https from stores."""
    return "http" in file_system.protocol  # one text, or several


def open_file_system(source: str, stall_s: float) -> tuple[Any, str]:
    """Returns fsspec's file system, one per process, and the path in it; raises UserError.

    A connection that gives nothing for `stall_s` is dropped.
    """
    from fsspec.core import url_to_fs  # It takes a tenth of a second: not for local shards.

    protocol = re.match(r"[a-z0-9+.-]*", source)
    name = protocol[0] if protocol else ""
    options: dict[str, Any] = {}
    try:
        if name in ("http", "https"):
            from aiohttp import ClientTimeout

            # aiohttp's own limit of five minutes is for a whole file, however large.
            limit = ClientTimeout(total=None, sock_connect=stall_s, sock_read=stall_s)
            options = {"client_kwargs": {"timeout": limit, "trust_env": True}}
        return url_to_fs(source, **options)
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        remedy = "pip install -e '.[remote]'" if name in OF_EXTRA else reason
        raise UserError(
            f"{shown(source)}: reading {name}:// needs a package that is not installed: {remedy}"
        ) from None
    except ValueError as error:
        raise UserError(f"{shown(source)}: no such kind of URL ({error})") from None
