"""Files of hub repositories, by one rule: from the local cache if they are there, else from a hub that answers within seconds.

A repository in the cache is not asked for again; `hf download OWNER/NAME` gets its newest files. HF_HUB_OFFLINE and
TRANSFORMERS_OFFLINE keep away from the network.
"""

from __future__ import annotations

import os
import threading
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

T = TypeVar("T")

ANSWER = 8.0
"""Seconds that the hub may take for what is longer than a look."""
# Seconds for a look whether it answers; its own client would retry for minutes.
_TIMEOUT = 3.0


def snapshot(
    name: str,
    files: Sequence[str],
    needed: Sequence[str],
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Return the local folder of a hub repository.

    Args:
        name: "owner/name".
        files: patterns of the files to get.
        needed: patterns of which each must match a file, so that a folder of the cache counts as whole.
        revision, token, cache_dir: as in `huggingface_hub.snapshot_download`.
        local_files_only: leave the network alone.

    Raises what the hub, httpx and urllib raise, within seconds if the hub does not answer.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", cache_dir, revision)
    if isinstance(config, str) and all(any(Path(config).parent.glob(pattern)) for pattern in needed):
        return Path(config).parent
    options = {"revision": revision, "token": token, "cache_dir": cache_dir, "allow_patterns": list(files)}
    if local_files_only:
        options["local_files_only"] = True
    else:
        check_reachable(name, token)
    # Those at their defaults are left out.
    return Path(snapshot_download(name, **{key: value for key, value in options.items() if value is not None}))


def offline() -> str | None:
    """Return the environment variable that keeps away from the network, None if none does."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").upper() in {"1", "TRUE", "YES", "ON"}), None)


def check_reachable(name: str, token: str | bool | None = None, kind: Literal["model", "dataset"] = "model") -> None:
    """Raise OSError unless the hub answers for a repository within seconds: HTTPError if it refuses."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if variable := offline():
        raise OSError(f"{variable} is set and {name} is not in the local cache")
    url = hf_hub_url(name, "config.json" if kind == "model" else "README.md", repo_type=kind)
    keep_client_quiet()
    request = urllib.request.Request(url, method="HEAD", headers=build_hf_headers(token=token))
    within(lambda: urllib.request.urlopen(request, timeout=_TIMEOUT).close(), _TIMEOUT, request.host)


def keep_client_quiet() -> None:
    """Keep the hub's client from asking the hub first, also where it reads the cache alone, how to call the program that runs.

    It waits three seconds for that answer. With this, nothing but the versions of the client and of Python is told.
    """
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True


def within(work: Callable[[], T], seconds: float, host: str = "the hub") -> T:
    """Return the result of `work`, or raise what it raises. Raises TimeoutError, naming `host`, after so many seconds."""
    found: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            errors.append(error)

    # In a thread of its own, because the time that is spent on the address of a host has no limit.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    # urllib wraps the error of a connection that is not taken.
    if thread.is_alive() or any(isinstance(getattr(error, "reason", error), TimeoutError) for error in errors):
        raise TimeoutError(f"no answer from {host} within {seconds:g} seconds")
    if errors:
        raise errors[0]
    return found[0]
