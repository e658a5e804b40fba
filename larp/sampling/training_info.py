"""Trained generators: what their runs say of the clips that they were trained on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Training:
    """What a generator was trained on; None where its run does not say so."""

    tokenizer: str | None = None
    """Path or hub name, as it was typed then."""
    variant: str | None = None
    """Which of its weights."""
    fps: float | None = None
    """Frames per second of the clips."""
    stride: int | None = None
    """Every n-th frame of a video was a frame of the clip."""
    given: int | None = None
    """Given frames of frame prediction."""
    missing: str | None = None
    """The token cache that the run names, which would say more, where it is not found."""


def find_training(generator: str) -> Training:
    """What a run of train_generator.py, given by its folder or by that of its model, says of its training.

    Paths in it are relative to where it was trained; what is not below the working folder is looked for below the folders
    around the run, the nearest first. Raises ValueError if a file of the run is damaged.
    """
    from larp.hub import RUN_MODEL, resolve

    if not Path(generator).is_dir():
        return Training()
    folder = resolve(generator).resolve()
    path = folder.parent / "config.json"
    if folder.name != RUN_MODEL or not path.is_file():
        return Training()
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): copy the run again, or move {folder.name} out of it"
        ) from error
    if not isinstance(config, dict) or "tokens" not in config:
        return Training()
    kinds = {"tokens": (str, "a path"), "tokenizer": (str, "a path or hub name")}
    kinds |= dict.fromkeys(("stride", "condition_frames"), (int, "a whole number"))
    for name, (kind, words) in kinds.items():
        if not isinstance(config.get(name), kind | None):
            raise ValueError(
                f"{path}: {name} is {config[name]!r}, expected {words} or null: copy the run again, or mend it"
            )
    return _of_cache(config, folder.parent)


def _found(name: str, inside: str, *around: Path) -> str:
    """`name`, or the path of it below the nearest folder around; `inside`, which may be "", is what it must hold."""
    if (Path(name) / inside).exists():
        return name
    parents = (parent for folder in around for parent in folder.resolve().parents)
    return next((str(parent / name) for parent in parents if (parent / name / inside).exists()), name)


def _of_cache(config: dict[str, Any], run: Path) -> Training:
    """What a run says that trained on a cache; one that is gone, or never was, leaves what the run's options say."""
    from larp.data.token_cache import INDEX, read_index, read_shard

    named = config["tokens"]
    cache = Path(_found(named, INDEX, run)) if named else run / "tokens-train"
    tokenizer = config.get("tokenizer") and _found(config["tokenizer"], "", run)
    if not (cache / INDEX).is_file():
        # Of a run that was given a cache, these options did not act.
        acting = {} if named else config
        given = acting.get("condition_frames")
        return Training(tokenizer, None, None, acting.get("stride"), given, missing=named or None)
    index = read_index(cache)
    fps = read_shard(cache / index["shards"][0])[0].get("fps")
    known = None if fps is None else fps[~fps.isnan()]
    return Training(
        tokenizer or _found(index["tokenizer"], "", run, cache),
        index.get("variant"),
        None if known is None or not len(known) else known.mode().values.item(),
        index["key"].get("stride"),
        index["key"].get("condition_frames") or None,
    )
