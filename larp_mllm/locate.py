"""Which model or tokenizer to load: an argument, the environment, the newest model trained here, or a hub repository."""

import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from larp.files import cache_folder, error_line, read_json, user_path, user_text, write_json
from larp.hub_files import ANSWER, snapshot, within
from larp.models.class_names import class_number

if TYPE_CHECKING:
    from larp.engine.generator_run import Training
    from larp.models.generator import LarpGenerator
    from larp.models.tokenizer import LarpTokenizer

    import torch

SHIPPED_MODELS = {"tiny": "language-model"}
"""Names of the language models that come with the package, for `model=`, and their folders."""
MODEL_TYPE = "larp_mllm"
TOKENIZER_TYPE = "larp-tokenizer"
# The folder of the trained model inside a run folder.
RUN_MODEL = "model"
POINTERS = {"model": "newest.json", "generator": "newest-generator.json"}
"""Files that point to the newest language model and class-conditional generator that were trained here."""
# What the training writes beside the weights.
TRAINING = "training.json"
PROCESSOR_FILES = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "video_tokenizer/config.json",
    "video_tokenizer/model.safetensors",
)
MODEL_FILES = (*PROCESSOR_FILES, "*.safetensors")
SHIPPED_KNOWS = "archery, basketball dunk, horse race, playing piano, playing violin, surfing, and coloured shapes that move, at 64x64"
"""What the language model that comes with the package was trained on."""
_SHIPPED = Path(__file__).parent / "shipped"
# What a part needs beside config.json and model.safetensors.
_SHIPPED_FILES = {
    "generator": (TRAINING,),
    "language-model": ("tokenizer.json", "tokenizer_config.json", "processor_config.json", TRAINING),
}


def find_model(model: str | Path | None = None, option: str | None = None) -> Path:
    """The folder of a language model with video vocabulary.

    Args:
        model: a model folder, a run folder of train_mllm.py, a name of `SHIPPED_MODELS`, or a hub repository "owner/name",
            which is fetched unless it is in the local cache. None: the environment variable LARP_MLLM_MODEL, else the newest
            model trained here, else the one that comes with the package, which is said once on stderr.
        option: name of the option that `model` was given with, for errors; None: `model`.

    Raises ValueError that says what the folder holds instead, and how to choose a model.
    """
    names = " or ".join(SHIPPED_MODELS)
    remedy = (
        _remedy()
        if option is None
        else f"Give {option} such a folder, owner/name on the hub, or {names}, which comes with the package"
    )
    if model is not None:
        chosen = user_text(model) if isinstance(model, str) else user_path(model)
        source = "model=" if option is None else f"{option} "
    elif os.environ.get("LARP_MLLM_MODEL"):
        chosen, source = user_text(os.environ["LARP_MLLM_MODEL"]), "LARP_MLLM_MODEL="
    elif (newest := _newest("model")) is not None:
        chosen, source = newest, f"{home() / POINTERS['model']}: "
    else:
        folder = shipped(SHIPPED_MODELS["tiny"])
        _say_once(
            f"no language model was trained here, so it is the small one that comes with larp-mllm: {SHIPPED_KNOWS}"
        )
        return folder
    if (name := str(chosen)) in SHIPPED_MODELS and not Path(chosen).is_dir():
        return shipped(SHIPPED_MODELS[name])
    if is_hub_name(chosen):
        try:
            chosen = fetch_folder(chosen)
        except ValueError as error:
            raise ValueError(f"{source}{error}. {remedy}") from error
    if len(Path(chosen).parts) == 1 and not Path(chosen).exists():
        raise ValueError(
            f"{source}{chosen}: there is no such folder, and no model of this name comes with the package. {remedy}"
        )
    chosen = Path(chosen)
    for folder in (chosen, chosen / RUN_MODEL):
        if _model_type(folder) == MODEL_TYPE:
            return folder
    raise ValueError(
        f"{source}{chosen}: {_content(chosen)}; needed is a folder whose config.json has the model_type {MODEL_TYPE}, such "
        f"as OUT/{RUN_MODEL} of training/train_mllm.py. {remedy}"
    )


def find_generator(generator: str | None = None, classes: Sequence[str] = ()) -> str:
    """The folder or hub name of a class-conditional generator.

    That is `generator` itself. None: the newest one trained here, else the one that comes with the package, also where the
    latter alone knows all of the `classes`; which of them is said once on stderr. Raises ValueError if it is damaged.
    """
    if generator is not None:
        return user_text(generator)
    newest, reason = _newest("generator"), "no generator was trained here"
    if newest is not None:
        lacking = _unknown(classes, newest)
        if not lacking or _unknown(classes, _SHIPPED / "generator"):
            _say_once(f"the generator is the newest one that was trained here: {newest}")
            return str(newest)
        reason = f"the newest generator that was trained here, {newest}, knows no class {lacking[0]}"
    folder = shipped("generator")
    known = ", ".join(_class_names(folder))
    _say_once(f"{reason}, so it is the small one that comes with larp-mllm: {known}, at 64x64")
    return str(folder)


def find_tokenizer(tokenizer: str | None = None) -> str:
    """The folder or hub name to load a LARP tokenizer from.

    That is `tokenizer` itself, or the folder in it where a run of train_tokenizer.py, or a language model with video
    vocabulary, holds its own. None: that of the language model that LARP_MLLM_MODEL names or that was trained here last, else
    the one that comes with the package. `LarpTokenizer.from_pretrained` checks its content.
    """
    if tokenizer is None:
        tokenizer = str(find_model() if has_default_model() else shipped("tokenizer"))
    tokenizer = user_text(tokenizer)
    for subfolder in ("", RUN_MODEL, "video_tokenizer", f"{RUN_MODEL}/video_tokenizer"):
        if _model_type(Path(tokenizer, subfolder)) == TOKENIZER_TYPE:
            return str(Path(tokenizer, subfolder))
    run = Path(tokenizer)
    if is_shipped(run) and run.name in SHIPPED_MODELS.values():
        return str(shipped("tokenizer"))  # which the models of the package share
    if not (run / "model.safetensors").is_file() and (run / "state").is_dir():
        raise ValueError(f"{tokenizer}: {_content(run)}")
    return tokenizer


def load_generator_tokenizer(
    name: str,
    generator: "LarpGenerator",
    training: "Training",
    tokenizer: str | None = None,
    variant: str | None = None,
    device: "torch.device | str" = "cpu",
) -> "LarpTokenizer":
    """Load the tokenizer whose codes a generator writes.

    Args:
        name: of the generator, for errors.
        training: what its run records, see `larp.engine.generator_run.find_training`.
        tokenizer: folder or hub name; None: the one of the run.
        variant: of its weights; None: that of the run, if its tokenizer is taken.

    Raises ValueError if the run does not name one, and if it is not the generator's.
    """
    from larp.models.tokenizer import LarpTokenizer

    from_run = tokenizer is None
    if from_run and training.tokenizer is None and training.missing:
        raise ValueError(
            f"the token cache of {name}, {training.missing}, is found neither here nor near the run, so its "
            "tokenizer is not known: give --tokenizer"
        )
    if from_run and training.tokenizer is None:
        raise ValueError(f"{name} does not say which tokenizer made its codes: give --tokenizer")
    wanted = training.tokenizer if from_run else tokenizer
    variant = training.variant if from_run and variant is None else variant
    try:
        loaded = LarpTokenizer.from_pretrained(find_tokenizer(wanted), device=device, variant=variant)
        generator.check_tokenizer(loaded.num_tokens, loaded.codebook_size, loaded.weight_hash())
    except ValueError as error:
        if not from_run:
            raise
        raise ValueError(
            f"the tokenizer of {name} was {wanted} when it was trained: {error}. Give --tokenizer"
        ) from error
    return loaded


def shipped(part: str) -> Path:
    """The folder of trained weights that come with the package: "tokenizer", "generator" or "language-model".

    Raises ValueError, naming the file, if one is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    folder = _SHIPPED / part
    for name in ("config.json", "model.safetensors", *_SHIPPED_FILES.get(part, ())):
        file, state = folder / name, "missing"
        if file.is_file():
            try:
                if file.suffix == ".json":
                    read_json(file)
                else:
                    with safe_open(file, "np"):  # compares the length of the file with its header
                        pass
                continue
            except (ValueError, SafetensorError, OSError) as error:
                state = f"damaged ({first_line(error)})"
        raise ValueError(
            f"{file}, which comes with larp-mllm, is {state}: install the package again (pip install --force-reinstall larp-mllm)"
        )
    if part != "tokenizer":
        shipped("tokenizer")  # which the others share
    return folder


def is_shipped(folder: str | Path) -> bool:
    """Whether a model folder is one of those that come with the package."""
    return Path(folder).resolve().parent == _SHIPPED.resolve()


@lru_cache
def _say_once(text: str) -> None:
    """Print a line to stderr, once in a process."""
    print(text, file=sys.stderr)


def set_default_model(model: str | Path, kind: Literal["model", "generator"] = "model") -> Path | None:
    """Make a folder the language model, or the class-conditional generator, that is loaded by default.

    Returns the file that points to it; None, with a note on stderr, if that cannot be written.
    """
    pointer = home() / POINTERS[kind]
    time = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        write_json(pointer, {"model": str(Path(model).resolve()), "written": time})
    except OSError as error:
        print(
            f"note: {model} is not the default from now on: {error_line(error)}; give it with --model, or set LARP_MLLM_HOME "
            "to a folder that can be written",
            file=sys.stderr,
        )
        return None
    return pointer


def has_default_model() -> bool:
    """Whether `find_model()` has one to look for: LARP_MLLM_MODEL, or a model that was trained here and is still there."""
    return bool(os.environ.get("LARP_MLLM_MODEL")) or _newest("model") is not None


def clear_default_model(model: str | Path) -> None:
    """Undo `set_default_model` for the language model in this folder; no effect if another model is the default."""
    if _newest("model") == Path(model).resolve():
        (home() / POINTERS["model"]).unlink(missing_ok=True)  # each process of a training does so


def home() -> Path:
    """The folder of the pointers to the default models: LARP_MLLM_HOME, by default ~/.cache/larp-mllm."""
    return cache_folder("LARP_MLLM_HOME", "larp-mllm")


def read_config(path: Path) -> dict | None:
    """Read a JSON object of a model folder; None if there is no file, or no object in it. Raises ValueError if damaged."""
    if not path.is_file():
        return None
    config = read_json(path, "copy the model folder again")
    return config if isinstance(config, dict) else None


def first_line(error: BaseException) -> str:
    """The class of an exception and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip('.')}" if text else type(error).__name__


# The hub


def is_hub_name(name: str | Path) -> bool:
    """Whether a string has the form owner/name and there is no local folder `owner`, so that it can be no mistyped path."""
    if not isinstance(name, str) or name.count("/") != 1 or name.startswith((".", "/", "~")) or "\\" in name:
        return False
    owner, repository = name.split("/")
    return bool(owner and repository) and not Path(owner).is_dir()


def fetch_folder(
    name: str | Path,
    files: tuple[str, ...] = MODEL_FILES,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """A local folder: `name` itself, or a snapshot of a hub repository with the `files` that match these patterns.

    See larp/hub_files.py for when the hub is asked. Raises ValueError within seconds if there is neither such a folder
    nor such a repository, or the hub cannot be reached.
    """
    if user_path(name).is_dir():
        return user_path(name)
    if not is_hub_name(name):
        raise ValueError(f"{name}: there is no such folder (and it is no hub name of the form owner/name)")
    try:
        return _snapshot(name, files, revision, local_files_only, token, cache_dir)
    except Exception as error:  # the hub, httpx and urllib raise classes of their own
        raise ValueError(
            f"{name} is no folder here, and could not be fetched from the hub ({first_line(error)}): check the name and the "
            "network, or give the path of a folder"
        ) from error


@lru_cache  # look once per process, not for each video
def _snapshot(name, files, revision, local_files_only, token, cache_dir) -> Path:
    weights = [pattern for pattern in files if pattern == "*.safetensors"]
    needed = (*weights, "processor_config.json", "tokenizer_config.json", "video_tokenizer/model.safetensors")
    return snapshot(name, files, needed, revision, local_files_only, token, cache_dir)


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
) -> str:
    """Upload a folder with its subfolders to a hub repository, created if it does not exist; returns its URL.

    Raises ValueError if the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        url = within(lambda: api.create_repo(repo_id, private=private, exist_ok=True), ANSWER)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), revision=revision)
    except Exception as error:  # the hub and httpx raise classes of their own
        raise ValueError(
            f"{repo_id} could not be uploaded to the hub ({first_line(error)}): check the network and the token "
            "(hf auth login), or save the model in a folder"
        ) from error
    return str(url)


# Helpers


def _newest(kind: str) -> Path | None:
    """The folder of the newest model of a kind of `POINTERS`, None if none was trained here or it is gone."""
    pointer = home() / POINTERS[kind]
    if not pointer.is_file():
        return None
    try:
        folder = Path(json.loads(pointer.read_text(encoding="utf-8"))["model"])
    except (ValueError, TypeError, KeyError) as error:
        remedy = _remedy() if kind == "model" else "The generator is then the one that comes with the package"
        raise ValueError(f"{pointer} is damaged ({type(error).__name__}: {error}): delete it. {remedy}") from error
    return folder if folder.is_dir() else None


def _class_names(folder: Path) -> list[str]:
    return (read_config(folder / "config.json") or {}).get("class_names", [])


def _unknown(classes: Sequence[str], generator: Path) -> list[str]:
    """Return those of some classes whose names a generator does not store."""
    return [name for name in classes if class_number(name, _class_names(generator)) is None]


def _model_type(folder: Path) -> str | None:
    return (read_config(folder / "config.json") or {}).get("model_type")


def _content(folder: Path) -> str:
    """What a folder holds instead of a model, for errors."""
    if not folder.is_dir():
        return "no model folder (there is no such folder)"
    if found := _model_type(folder):
        return f"the folder holds a {found}"
    if found := _model_type(folder / RUN_MODEL):
        return f"the folder holds a run that trained a {found}"
    if (folder / "state").is_dir():
        return f"the folder holds a run that has not written {RUN_MODEL} yet (continue it with --resume)"
    missing = "has no model_type" if (folder / "config.json").is_file() else "is missing"
    return f"no model folder (config.json {missing})"


def _remedy() -> str:
    return (
        f"Give model=FOLDER, model=OWNER/NAME of the hub or model={' or '.join(SHIPPED_MODELS)}, which comes with the package "
        "(--model on the command line, or the environment variable LARP_MLLM_MODEL), or train one, which then is the default: "
        "`make quickstart` trains a small one"
    )
