"""The run folder and its checkpoints: save, find the newest whole one, check that it fits, resume.

    runs/NAME/config.json                        what the run was started with
    runs/NAME/metrics.jsonl, tensorboard/        see log.py
    runs/NAME/state/step-00000100/ENGINE/        what deepspeed writes for one engine, in place and without syncing
    runs/NAME/state/step-00000100/ENGINE.ema.pt  the average of its weights, where it has one
    runs/NAME/state/step-00000100/extra.pt       the trainer's own tensors (moving averages)
    runs/NAME/state/step-00000100/random-0.pt    random state of rank 0, and so on
    runs/NAME/state/step-00000100/state.json     the marker, written last: without it a checkpoint is torn, and ignored

Reading a checkpoint unpickles (deepspeed offers nothing else): resume only runs that this program wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from larp.config import to_dict
from larp.engine import backend
from larp.engine.backend import Engine
from larp.engine.distributed import main_first
from larp.engine.log import METRICS_FILE
from larp.files import write_json
from larp.hub import EMA, LarpModel, resolve, weights_file

import torch

CONFIG_FILE = "config.json"
_STATE, _MARKER, _EXTRA = "state", "state.json", "extra.pt"
_UNIVERSAL = "-universal"
_AVERAGE = ".ema.pt"
_LOCK = ".lock"


@dataclass(frozen=True)
class SavedState:
    """One whole checkpoint; loader_state and model are what was given to `save_state`."""

    folder: Path
    step: int
    world_size: int
    zero_stages: dict[str, int]
    model: dict[str, Any]
    loader_state: dict[str, Any]

    @property
    def extra(self) -> dict[str, Any]:
        """The `extra` of `save_state`, read from disk; tensors on the CPU."""
        return torch.load(self.folder / _EXTRA, map_location="cpu", weights_only=True)


# ----------------------------------------------------------------------------------------------------------- run folder


def check_folder(folder: Path | str, resume: bool) -> None:
    """Raise ValueError on every rank if the run folder holds a run already and `resume` is false, or is no folder. Collective."""
    main_first(lambda: _check_folder(Path(folder), resume))


def _check_folder(folder: Path, resume: bool) -> None:
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{folder} cannot be a run folder, {there} is a file: choose another place with --out")
    started = any((folder / name).exists() for name in (CONFIG_FILE, METRICS_FILE, _STATE))
    if started and not resume and backend.current_ranks().is_main:
        raise ValueError(
            f"{folder} holds a run already: go on with it with --resume, or choose another folder with --out "
            "(nothing was changed)"
        )


def open_run(
    folder: Path | str,
    config: Mapping[str, Any],
    resume: bool,
    steps: int | None,
    engines: Mapping[str, Engine] | None = None,
    model: Mapping[str, Any] | None = None,
) -> SavedState | None:
    """Make the run folder ready; with `resume` return its newest checkpoint, or None if there is none yet.

    Writes config.json (`config` is the whole config as plain values) before the first step of a new run and leaves
    that of a resumed one beside it as config.resumed.json, saying which options changed. Collective. Call it when
    nothing else can fail for a mistake of the user. Raises ValueError, before anything is written or said, as `check_folder`
    does, if another process trains in the folder, if the checkpoint lies beyond `steps`, the length of the run (None: it has none in steps), and where
    `engines` are given, as `load_state` does with them and `model`.
    """
    folder = Path(folder)
    check_folder(folder, resume)
    _lock(folder)
    # Again: another run may have begun, and ended, since.
    check_folder(folder, resume)
    state = newest_state(folder) if resume else None
    if state is not None and steps is not None and state.step > steps:
        raise ValueError(
            f"{folder} is at step {state.step} already, beyond the {steps} steps asked for: give more steps, or train anew in "
            "another folder"
        )
    if state is not None and engines is not None:
        _check_model(state, model)
        _check_engines(engines, state)
    if backend.current_ranks().is_main:
        folder.mkdir(parents=True, exist_ok=True)
        first = folder / CONFIG_FILE
        if first.exists():
            _say_changes(json.loads(first.read_text(encoding="utf-8")), json.loads(json.dumps(config)))
        write_json(folder / ("config.resumed.json" if first.exists() else CONFIG_FILE), dict(config))
    backend.barrier()
    if resume and backend.current_ranks().is_main:
        print(f"going on from step {state.step}" if state else f"{folder} has no whole checkpoint: starting at step 0")
    return state


# Open files whose locks this process holds, by folder: the system gives them back when the process ends, however it ends.
_locks: dict[Path, IO] = {}


def _lock(folder: Path) -> None:
    """Make the folder this process's own on the main rank; ValueError on all if another process trains in it. Collective."""
    taken = False
    if backend.current_ranks().is_main and (place := folder.resolve()) not in _locks:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / _LOCK, "a")  # noqa: SIM115 - held while the process lives
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
            file.close()
        except OSError:
            # A file system without locks: nothing is promised there.
            file.close()
        else:
            _locks[place] = file
    if backend.broadcast_object(taken):
        raise ValueError(
            f"another process trains in {folder} now: wait until it ends, or choose another folder with --out "
            "(nothing was changed)"
        )


def _say_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [text for text in differences(before, now) if not text.startswith(("resume ", "out "))]
    if changed:
        print(f"resuming with other options than the run began with: {'; '.join(changed)}")


def newest_state(folder: Path | str) -> SavedState | None:
    """The newest whole checkpoint of a run folder; torn ones (killed while saving, truncated files) are passed over."""
    for candidate in _step_folders(Path(folder)):
        state = _read_marker(candidate)
        if state is not None:
            return state
    return None


def _step_folders(folder: Path) -> list[Path]:
    """The checkpoints, newest first, whole or not."""
    return sorted((folder / _STATE).glob("step-*"), reverse=True)


def _read_marker(folder: Path) -> SavedState | None:
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in marker["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    if not whole:
        return None
    names = ("step", "world_size", "zero_stages", "model", "loader_state")
    return SavedState(folder=folder, **{name: marker[name] for name in names})


# ----------------------------------------------------------------------------------------------------------------- save


def save_state(
    engines: Mapping[str, Engine],
    folder: Path | str,
    step: int,
    loader_state: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    *,
    model: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Save a checkpoint of the run at `step` and return its folder; afterwards only the newest `keep` are left.
    Collective.

    engines: saved in this order (the discriminator first, the model last). loader_state: JSON-able. extra: numbers,
    text, tensors in dicts and lists, the same on all ranks. model: the model config as plain values, compared when
    the run is resumed.
    """
    ranks = backend.current_ranks()
    target = Path(folder) / _STATE / f"step-{step:08d}"
    if ranks.is_main:
        _remove(target)
        target.mkdir(parents=True)
    backend.barrier()
    for name, engine in engines.items():
        engine.save(target, name, {})
    _save_random_state(target / f"random-{ranks.rank}.pt")
    if ranks.is_main:
        for name, engine in engines.items():
            if engine.average is not None:
                torch.save(engine.average.state_dict(), target / (name + _AVERAGE))
        torch.save(dict(extra or {}), target / _EXTRA)
    backend.barrier()
    if ranks.is_main:
        files = {str(path.relative_to(target)): path for path in sorted(target.rglob("*")) if path.is_file()}
        for path in files.values():
            _sync(path)
        marker = {
            "step": step,
            "world_size": ranks.world_size,
            "zero_stages": {name: engine.config.zero_stage for name, engine in engines.items()},
            "model": dict(model or {}),
            "loader_state": dict(loader_state),
            "files": {name: path.stat().st_size for name, path in files.items()},
        }
        write_json(target / _MARKER, marker)
        _sync(target)
        _forget_old(Path(folder), keep)
    backend.barrier()
    return target


def _forget_old(folder: Path, keep: int) -> None:
    """Remove what is older than the newest `keep` whole checkpoints, torn ones included."""
    whole = 0
    for candidate in _step_folders(folder):
        if whole >= max(1, keep):
            _remove(candidate)
        elif _read_marker(candidate) is not None:
            whole += 1


def _remove(folder: Path) -> None:
    # The marker goes first: killed in between, this leaves a torn checkpoint, not one that looks whole.
    with contextlib.suppress(FileNotFoundError):
        (folder / _MARKER).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _save_random_state(path: Path) -> None:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    torch.save({"cpu": torch.get_rng_state(), "cuda": cuda}, path)


# --------------------------------------------------------------------------------------------------------------- resume


def load_state(
    engines: Mapping[str, Engine],
    state: SavedState,
    model: Mapping[str, Any] | None = None,
    *,
    restore_random: bool = True,
) -> None:
    """Put a checkpoint into the engines: weights and their averages, optimizers, counters, and the random state of each
    rank. Collective.

    engines, model: as for save_state. An average that the checkpoint has not begins with its weights. Raises ValueError, before anything is loaded, if the model config, the engines,
    a ZeRO stage or (at stages 1 to 3) the number of ranks differ from the checkpoint's; the text names what differs
    and the way out.
    """
    ranks = backend.current_ranks()
    _check_model(state, model)
    _check_engines(engines, state)
    for name, engine in engines.items():
        if _needs_universal(engine, state, ranks.world_size):
            engine.load(state.folder, name + _UNIVERSAL, universal=True)
        else:
            engine.load(state.folder, name)
        _load_average(engine, state.folder / (name + _AVERAGE))
    if restore_random and ranks.world_size == state.world_size:
        saved = torch.load(state.folder / f"random-{ranks.rank}.pt", weights_only=True)
        torch.set_rng_state(saved["cpu"])
        if saved["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["cuda"])


def _load_average(engine: Engine, path: Path) -> None:
    if engine.average is None:
        return
    if path.exists():
        engine.average.load_state_dict(torch.load(path, map_location=engine.ranks.device, weights_only=True))
    else:
        engine.average.update(engine.module)


def changed_values(
    saved: Mapping[str, Any], current: Mapping[str, Any], absent: Any = None, prefix: str = ""
) -> dict[str, list]:
    """{"a.b": [value in saved, value in current]} for each key that differs between two nested dicts of plain values."""
    found: dict[str, list] = {}
    for key in [*saved, *(key for key in current if key not in saved)]:
        before, after = saved.get(key, absent), current.get(key, absent)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found |= changed_values(before, after, absent, f"{prefix}{key}.")
        elif before != after:
            found[f"{prefix}{key}"] = [before, after]
    return found


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """'a.b was 1, is 2' for each key that differs between two nested dicts of plain values."""
    changed = changed_values(saved, current, "(absent)")
    return [f"{name} was {before}, is {after}" for name, (before, after) in changed.items()]


def _check_model(state: SavedState, model: Mapping[str, Any] | None) -> None:
    # By way of JSON, as the saved one went: a tuple and a list are the same thing there.
    changed = differences(state.model, json.loads(json.dumps(model or {})))
    if changed:
        raise ValueError(
            f"{state.folder} does not fit this run: {'; '.join(changed)}. Give the options of the first run "
            f"(in {state.folder.parent.parent / CONFIG_FILE}), or start a new run with another --out"
        )


def _check_engines(engines: Mapping[str, Engine], state: SavedState) -> None:
    if set(engines) != set(state.zero_stages):
        raise ValueError(
            f"{state.folder} holds {', '.join(state.zero_stages)}, but this run trains {', '.join(engines)}: "
            "resume with the options "
            "of the first run, or start a new run with another --out"
        )
    world_size = backend.current_ranks().world_size
    for name, engine in engines.items():
        saved_stage, stage = state.zero_stages[name], engine.config.zero_stage
        if saved_stage != stage:
            raise ValueError(
                f"{state.folder} was saved with zero_stage {saved_stage}, this run has {stage}: resume with "
                f"zero_stage {saved_stage}"
            )
        if _needs_universal(engine, state, world_size) and not (state.folder / (name + _UNIVERSAL)).is_dir():
            raise ValueError(_universal_advice(engines, state, world_size))


def _needs_universal(engine: Engine, state: SavedState, world_size: int) -> bool:
    return engine.config.zero_stage > 0 and state.world_size != world_size


def _universal_advice(engines: Mapping[str, Engine], state: SavedState, world_size: int) -> str:
    commands = []
    for name, engine in engines.items():
        source = state.folder / name
        inject = "" if engine.config.zero_stage == 3 else " --inject_missing_state"
        commands.append(
            f"python -m deepspeed.checkpoint.ds_to_universal{inject} --input_folder {source} --output_folder "
            f"{source}{_UNIVERSAL}"
        )
    return (
        f"{state.folder} was saved by {state.world_size} ranks, this run has {world_size}: at zero_stage 1 to 3 "
        "each rank holds a share. "
        f"Resume with {state.world_size} ranks, or convert the checkpoint and resume again:\n  " + "\n  ".join(commands)
    )


def take_weights(model: LarpModel, source: str, free: Collection[str] = ()) -> None:
    """Put the weights of a trained model into a fresh one, averaged ones where it has them.

    source: folder or hub name. free: names of fields of the config that may differ. Raises ValueError that names the others
    that do.
    """
    folder = resolve(source)
    variant = EMA if (folder / weights_file(EMA)).exists() else None
    trained = type(model).from_pretrained(folder, variant=variant)
    configs = [{k: v for k, v in to_dict(m.config).items() if k not in free} for m in (trained, model)]
    if differing := differences(*configs):
        raise ValueError(f"start_from {source} is another model than this run's: {'; '.join(differing)}")
    model.load_state_dict(trained.state_dict())
