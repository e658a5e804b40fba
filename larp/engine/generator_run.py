"""What the run folder of a generator records of its training: tokenizer, data, frame rate, stride, given frames."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from larp.config import from_dict
from larp.files import read_json

FPS = 12.0
"""Frames per second of a generator's clips where its run does not say."""


RECORD = "training.json"
"""The fields of `Training` beside the weights of a generator without its run; paths are relative to this file."""


@dataclass(frozen=True)
class Training:
    """What a generator was trained on; None for unknown values."""

    tokenizer: str | None = None
    """Path or hub name, as given in training."""
    variant: str | None = None
    """Variant of the tokenizer's weights."""
    fps: float | None = None
    """Frames per second of the clips."""
    stride: int | None = None
    """Distance of a clip's frames in the video, in frames."""
    given: int | None = None
    """Given frames of frame prediction."""
    missing: str | None = None
    """The token cache that the run names, if it is not found; it would have the other values."""
    data: str | None = None
    """Data spec of the training clips."""


def find_training(generator: str) -> Training:
    """Return what a run of train_generator.py records, by the path of the run or of its model; else what `RECORD` says.

    Relative paths in the run are searched in the working folder, then in the parent folders of the run, nearest first. Raises
    ValueError if a file of the run is damaged.
    """
    from larp.hub import RUN_MODEL, resolve

    if not Path(generator).is_dir():
        return Training()
    folder = resolve(generator).resolve()
    if (record := folder / RECORD).is_file():
        known = from_dict(Training, read_json(record), where=str(record))
        return replace(known, tokenizer=known.tokenizer and str((folder / known.tokenizer).resolve()))
    path = folder.parent / "config.json"
    if folder.name != RUN_MODEL or not path.is_file():
        return Training()
    config = read_json(path, remedy=f"copy the run again, or move {folder.name} out of it")
    if not isinstance(config, dict) or "tokens" not in config:
        return Training()
    kinds = {"tokens": (str, "a path"), "tokenizer": (str, "a path or hub name"), "data": (str, "a data spec")}
    kinds["eval_tokens"] = kinds["tokens"]
    kinds |= dict.fromkeys(("stride", "condition_frames"), (int, "a whole number"))
    for name, (kind, words) in kinds.items():
        if not isinstance(config.get(name), kind | None):
            raise ValueError(
                f"{path}: {name} is {config[name]!r}, expected {words} or null: copy the run again, or correct it"
            )
    return _from_cache(config, folder.parent)


def _from_cache(config: dict[str, Any], run: Path) -> Training:
    """Read the token cache of a run; without one, the options of the run."""
    from larp.data.token_cache import INDEX, read_index, read_shard

    named = config["tokens"]
    # With --live there is no cache of the training clips, but one of held-out clips.
    own = [run / "tokens-train", run / "tokens-test"]
    if config.get("eval_tokens"):
        own.append(Path(_search(config["eval_tokens"], INDEX, run)))
    cache = Path(_search(named, INDEX, run)) if named else next((x for x in own if (x / INDEX).is_file()), run)
    tokenizer = config.get("tokenizer") and _search(config["tokenizer"], "", run)
    if not (cache / INDEX).is_file():
        # A run that names a cache ignored these options.
        used = {} if named else config
        stride, given = used.get("stride"), used.get("condition_frames")
        return Training(tokenizer, None, None, stride, given, missing=named or None, data=used.get("data"))
    index = read_index(cache)
    fps = read_shard(cache / index["shards"][0])[0].get("fps")
    known = None if fps is None else fps[~fps.isnan()]
    return Training(
        tokenizer or _search(index["tokenizer"], "", run, cache),
        index.get("variant"),
        None if known is None or not len(known) else known.mode().values.item(),
        index["key"].get("stride"),
        index["key"].get("condition_frames") or None,
        data=index["key"].get("data") if named else config.get("data"),
    )


def _search(name: str, content: str, *folders: Path) -> str:
    """Return `name`, or its path in the nearest parent of `folders`, where `name/content` exists; else `name`."""
    if (Path(name) / content).exists():
        return name
    parents = (parent for folder in folders for parent in folder.resolve().parents)
    return next((str(parent / name) for parent in parents if (parent / name / content).exists()), name)
