"""Probes of the servers that a run talks to: Weights & Biases and the Hugging Face hub.

Each asks who its key belongs to. Every wait has a limit, and the whole probe has one too.
"""

import base64
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from blackpoint.sampling.runtime.tracking import api_key, base_url
from blackpoint.scripts.doctor.row import Row, one_line

PATIENCE_S = 4.0
MOST_BYTES = 2**20
REFUSED = (401, 403)


def wandb() -> Iterator[Row]:
    """Whether runs will be seen at once: a key, and a server that takes it."""
    mode, key, server = os.environ.get("WANDB_MODE", "online"), api_key(), base_url()
    later = "runs go on offline, to be uploaded by `wandb sync`"
    if mode != "online":
        yield Row("wandb", "green", f"WANDB_MODE={mode}: {later}")
    elif key is None:
        remedy = "`wandb login`, or WANDB_API_KEY; WANDB_MODE=offline or wandb.enabled=false: none"
        yield Row("wandb", "yellow", f"no key for {server}; {later}", remedy)
    else:
        token = base64.b64encode(f"api:{key}".encode()).decode()
        question = json.dumps({"query": "{viewer {username}}"}).encode()
        headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}
        yield _asked("wandb", f"{server}/graphql", headers, question, "WANDB_MODE=offline")


def hub() -> Iterator[Row]:
    """Whether bases can be downloaded, and as whom."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Row("hub", "green", "HF_HUB_OFFLINE is set: bases come from folders and the cache")
        return
    from huggingface_hub import constants, get_token

    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    address = f"{constants.ENDPOINT}/api/whoami-v2"
    yield _asked("hub", address, headers, None, "download bases first, and HF_HUB_OFFLINE=1")


def _asked(
    name: str, address: str, headers: dict[str, str], question: bytes | None, without: str
) -> Row:
    """Asks a server who we are; `without` is how to do without it."""
    server, start_s = urlsplit(address).netloc, time.monotonic()
    request = urllib.request.Request(address, question, {"User-Agent": "blackpoint", **headers})
    proxy = urllib.request.getproxies().get(urlsplit(address).scheme)
    proxy = None if urllib.request.proxy_bypass(server) else proxy
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            user = _user(json.loads(answer.read(MOST_BYTES)))
    except urllib.error.HTTPError as error:
        if error.code in REFUSED and not headers:
            login = "`hf auth login`, or HF_TOKEN, gives access to gated models"
            return Row(name, "green", f"{server} answers; no token ({login})")
        finding = f"{server} answers {error.code} ({error.reason})"
        remedy = "log in again: the key or token is not valid" if error.code in REFUSED else without
        return Row(name, "red" if error.code in REFUSED else "yellow", finding, remedy)
    except ValueError:
        return Row(name, "yellow", f"{server} answers something else than its API", without)
    except OSError as error:
        reason = getattr(error, "reason", error)
        waited = isinstance(reason, TimeoutError)
        text = f"nothing within {PATIENCE_S:g} s" if waited else one_line(reason or error)
        if proxy is None:
            return Row(name, "yellow", f"{server}: {text}", f"without network: {without}")
        proxy = urlsplit(proxy).netloc.rpartition("@")[2] or proxy
        remedy = f"correct or unset http_proxy, https_proxy; or do without: {without}"
        return Row(name, "red", f"{server}, through the proxy {proxy}: {text}", remedy)
    if user is None:
        return Row(name, "red", f"{server} does not know this key", "log in again")
    taken_ms = 1e3 * (time.monotonic() - start_s)
    return Row(name, "green", f"{server} answers in {taken_ms:.0f} ms, to {user}")


def _user(answer: Any) -> str | None:
    """Reads the name in an answer; None where the server knows nobody by the key."""
    if not isinstance(answer, dict):
        raise ValueError
    if "data" not in answer:
        return str(answer["name"]) if "name" in answer else None
    viewer = (answer["data"] or {}).get("viewer")
    return str(viewer["username"]) if viewer else None
