"""Which model to use: the argument, else LARP_MLLM_MODEL, else the newest one trained here; and which tokenizer."""

import json
import os
import urllib.request
from contextlib import suppress
from datetime import UTC, datetime
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


POINTER = "newest.json"
RUN_MODEL = "model"
MODEL_TYPE = "larp_mllm"
TOKENIZER_TYPE = "larp-tokenizer"


def home() -> Path:
    """The folder of the pointer to the newest model: LARP_MLLM_HOME, by default ~/.cache/larp-mllm."""
    return Path(os.environ.get("LARP_MLLM_HOME") or Path.home() / ".cache" / "larp-mllm")


def set_default_model(model: str | Path) -> Path:
    """Point `generate` without a model at this folder from now on; returns the pointer file."""
    pointer = home() / POINTER
    pointer.parent.mkdir(parents=True, exist_ok=True)
    written = datetime.now(UTC).isoformat(timespec="seconds")
    part = pointer.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({"model": str(Path(model).resolve()), "written": written}, indent=2) + "\n")
    part.replace(pointer)
    return pointer


def clear_default_model(model: str | Path) -> None:
    """Take back `set_default_model` of this folder; nothing happens if another is pointed at."""
    pointer = home() / POINTER
    if pointer.is_file() and _read_pointer(pointer) == Path(model).resolve():
        pointer.unlink()


def find_model(model: str | Path | None = None, option: str | None = None) -> Path:
    """The folder to load: the model folder that was chosen, or the `model` of a run folder of train_mllm.py, or the
    snapshot of a hub repository "owner/name", which is fetched unless it is in the local cache.

    option: what `model` was given as, if not as a model to use. Raises ValueError that says what the chosen folder holds
    instead, and names the option or the three ways to choose one.
    """
    pointer = home() / POINTER
    ways = _ways() if option is None else f"Give {option} such a folder, or owner/name on the hub"
    if model is not None:
        chosen, by = model, "model=" if option is None else f"{option} "
    elif os.environ.get("LARP_MLLM_MODEL"):
        chosen, by = os.environ["LARP_MLLM_MODEL"], "LARP_MLLM_MODEL="
    elif pointer.is_file():
        chosen, by = _read_pointer(pointer), f"{pointer}: "
    else:
        raise ValueError(f"no language model with video vocabulary was trained on this machine. {_ways()}")
    if is_hub_name(chosen):
        try:
            chosen = fetched(chosen)
        except ValueError as error:
            raise ValueError(f"{by}{error}. {ways}") from error
    chosen = Path(chosen)
    for folder in (chosen, chosen / RUN_MODEL):
        if _model_type(folder) == MODEL_TYPE:
            return folder
    raise ValueError(
        f"{by}{chosen}: {_content(chosen)}. Needed is a folder whose config.json has the model_type {MODEL_TYPE}, such "
        f"as OUT/{RUN_MODEL} of training/train_mllm.py. {ways}"
    )


def find_tokenizer(tokenizer: str) -> str:
    """The folder or hub name to load a tokenizer from: `tokenizer` itself, or the folder in it where a run of
    train_tokenizer.py, or a language model with video vocabulary, keeps its own.

    What is there is judged by `LarpTokenizer.from_pretrained`.
    """
    for inside in ("", RUN_MODEL, "video_tokenizer", f"{RUN_MODEL}/video_tokenizer"):
        if _model_type(Path(tokenizer, inside)) == TOKENIZER_TYPE:
            return str(Path(tokenizer, inside))
    run = Path(tokenizer)
    if not (run / "model.safetensors").is_file() and (run / "state").is_dir():
        raise ValueError(f"{tokenizer}: {_content(run)}")
    return tokenizer


def _read_pointer(pointer: Path) -> Path:
    try:
        return Path(json.loads(pointer.read_text())["model"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{pointer} is damaged ({type(error).__name__}: {error}): delete it. {_ways()}") from error


def read_config(path: Path) -> dict | None:
    """The object in a JSON file of a model folder; None without the file, or if it holds none. ValueError if damaged."""
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): copy the model folder again") from error
    return config if isinstance(config, dict) else None


def _model_type(folder: Path) -> str | None:
    return (read_config(folder / "config.json") or {}).get("model_type")


def _content(folder: Path) -> str:
    if not folder.is_dir():
        return "no model folder (there is no such folder)"
    if other := _model_type(folder):
        return f"the folder holds a {other}"
    if other := _model_type(folder / RUN_MODEL):
        return f"the folder holds a run that trained a {other}"
    if (folder / "state").is_dir():
        return f"the folder holds a run that has not written {RUN_MODEL} yet (go on with it with --resume)"
    missing = "has no model_type" if (folder / "config.json").is_file() else "is missing"
    return f"no model folder (config.json {missing})"


def _ways() -> str:
    return (
        "Give a model as model=FOLDER, or owner/name on the hub (--model on the command line), or in the environment variable LARP_MLLM_MODEL, or "
        "train one with training/train_mllm.py, which is then found by itself; `make quickstart` trains a small one"
    )
