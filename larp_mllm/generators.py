"""Trained generators: where a run keeps its model, and what the run says of the clips that it was trained on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from larp_mllm.home import RUN_MODEL


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


def find_generator(generator: str) -> str:
    """The folder or hub name to load a generator from: `generator` itself, or the model in the folder of its run.

    What is there is judged by `LarpGenerator.from_pretrained`.
    """
    own, inside = Path(generator), Path(generator, RUN_MODEL)
    if (inside / "model.safetensors").is_file() and not (own / "model.safetensors").is_file():
        return str(inside)
    return generator


def find_training(generator: str) -> Training:
    """What the run of train_generator.py around a model folder (see `find_generator`) says of its training.

    Raises ValueError if a file of the run is damaged.
    """
    folder = Path(generator).resolve()
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
    return _of_cache(Path(config["tokens"] or folder.parent / "tokens-train"), config)


def _of_cache(cache: Path, config: dict[str, Any]) -> Training:
    """What a run says that trained on the cache; one that is gone, or never was, leaves what the run's options say."""
    from larp.data.tokens import INDEX, read_json, read_shard

    if not (cache / INDEX).is_file():
        # Of a run that was given a cache, these options did not act.
        acting = {} if config["tokens"] else config
        return Training(config.get("tokenizer"), None, None, acting.get("stride"), acting.get("condition_frames"))
    index = read_json(cache / INDEX)
    fps = read_shard(cache / index["shards"][0])[0].get("fps")
    known = None if fps is None else fps[~fps.isnan()]
    return Training(
        config.get("tokenizer") or index["tokenizer"],
        index.get("variant"),
        None if known is None or not len(known) else known.mode().values.item(),
        index["key"].get("stride"),
        index["key"].get("condition_frames") or None,
    )
