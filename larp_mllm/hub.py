"""Models on the Hugging Face hub: what is fetched, and what is uploaded. Never pickle, never code."""

import os
import urllib.request
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

PROCESSOR_FILES = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "video_tokenizer/config.json",
    "video_tokenizer/model.safetensors",
)
MODEL_FILES = (*PROCESSOR_FILES, "*.safetensors")
_PATIENCE = 5.0


def is_hub_name(name: str | Path) -> bool:
    """Whether a string has the form owner/name and cannot be meant as a folder: neither it nor its parent is one here."""
    if not isinstance(name, str) or name.count("/") != 1 or name.startswith((".", "/", "~")) or "\\" in name:
        return False
    owner, repository = name.split("/")
    return bool(owner and repository) and not Path(owner).is_dir()


def fetched(
    name: str | Path,
    files: tuple[str, ...] = MODEL_FILES,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The local folder of `name`: itself, or a snapshot of those `files` of the hub repository of that name.

    Without a network, what is in the local cache. Raises ValueError within seconds if there is no such folder and the
    hub cannot be reached or has no such repository.
    """
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_name(name):
        raise ValueError(f"{name}: there is no such folder (and it is no hub name of the form owner/name)")
    try:
        return _snapshot(name, files, revision, local_files_only, token, cache_dir)
    except Exception as error:  # the hub raises a family of its own, httpx and urllib others
        raise ValueError(
            f"{name} is no folder here, and could not be fetched from the hub ({first_line(error)}): check the name and the "
            "network, or give the path of a folder"
        ) from error


@lru_cache  # so that a process asks the hub once, not for each video
def _snapshot(name, files, revision, local_files_only, token, cache_dir) -> Path:
    from huggingface_hub import snapshot_download

    where = {"revision": revision, "token": token, "cache_dir": cache_dir, "allow_patterns": list(files)}
    if local_files_only:
        return Path(snapshot_download(name, local_files_only=True, **where))
    try:
        reach(name, token)
        return Path(snapshot_download(name, **where))
    except Exception:
        with suppress(Exception):
            return Path(snapshot_download(name, local_files_only=True, **where))
        raise


def reach(name: str, token: str | bool | None = None) -> None:
    """Raise OSError unless the hub answers for `name` within seconds; its own client would retry for minutes."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "TRUE", "YES", "ON"}:
        raise OSError("HF_HUB_OFFLINE is set and the model is not in the local cache")
    headers = build_hf_headers(token=token)
    request = urllib.request.Request(hf_hub_url(name, "config.json"), method="HEAD", headers=headers)
    urllib.request.urlopen(request, timeout=_PATIENCE).close()


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
) -> str:
    """Upload a folder with its subfolders to a hub repository, made if it does not exist; returns its address.

    Raises ValueError if the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), revision=revision)
    except Exception as error:  # the hub raises a family of its own, httpx another
        raise ValueError(
            f"{repo_id} could not be uploaded to the hub ({first_line(error)}); see to the network and the token "
            "(hf auth login), or keep the model in a folder"
        ) from error
    return str(url)


def first_line(error: BaseException) -> str:
    """An exception's kind and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip('.')}" if text else type(error).__name__
