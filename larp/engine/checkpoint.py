"""The run folder and its checkpoints: save, find the newest complete one, check that it fits, resume; and trained
weights to start from.

    runs/NAME/config.json                        options of the run
    runs/NAME/metrics.jsonl, tensorboard/        see log.py
    runs/NAME/state/step-00000100/ENGINE/        deepspeed's files of one engine, written in place and not synced
    runs/NAME/state/step-00000100/ENGINE.ema.pt  the EMA of its weights, if it has one
    runs/NAME/state/step-00000100/extra.pt       further state of the trainer
    runs/NAME/state/step-00000100/random-0.pt    random state of rank 0, and so on
    runs/NAME/state/step-00000100/state.json     the marker, written last; a checkpoint without it is ignored

Loading a checkpoint runs no code, whoever wrote it, see untrusted.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from larp.engine.backend import Engine
from larp.engine.distributed import barrier, broadcast_object, current_ranks, main_first
from larp.engine.log import METRICS_FILE
from larp.engine.untrusted import check_contents, checked_marker, naming_damaged
from larp.files import check_names, check_writable, error_number, read_json, write_json

import torch

CONFIG_FILE = "config.json"
_STATE, _MARKER, _EXTRA = "state", "state.json", "extra.pt"
# Checkpoints of a run that remain.
_KEPT = 2
# Keys of `SavedState.model` that checkpoints of earlier versions have, and their names now.
_RENAMED = {"keeps_codes": "resets_codes"}
_UNIVERSAL = "-universal"
_AVERAGE = ".ema.pt"
_LOCK = ".lock"


@dataclass(frozen=True)
class SavedState:
    """One complete checkpoint; loader_state and model are the arguments of `save_state`."""

    folder: Path
    step: int
    world_size: int
    zero_stages: dict[str, int]
    model: dict[str, Any]
    loader_state: dict[str, Any]

    @property
    def extra(self) -> dict[str, Any]:
        """The `extra` of `save_state`, loaded from disk; tensors are on the CPU."""
        with naming_damaged(self.folder):
            return torch.load(self.folder / _EXTRA, map_location="cpu", weights_only=True)


def check_folder(folder: Path | str, resume: bool) -> None:
    """Raise ValueError if the run folder is a file, or holds a run and `resume` is false. Collective."""
    main_first(lambda: _check_folder(Path(folder), resume))


def _check_folder(folder: Path, resume: bool) -> None:
    check_names(folder)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{folder} cannot be a run folder, {existing} is a file: choose another place with --out")
    if current_ranks().is_main:
        check_writable(folder / METRICS_FILE)
    started = any((folder / name).exists() for name in (CONFIG_FILE, METRICS_FILE, _STATE))
    if started and not resume and current_ranks().is_main:
        raise ValueError(
            f"{folder} holds a run already: continue it with --resume, or choose another folder with --out "
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
    """Prepare the run folder; with `resume` return its newest checkpoint, or None if there is none. Collective.

    To be called after all other checks, so that a mistake in the options leaves no run folder. A new run writes
    config.json. A resumed one writes config.resumed.json and prints the options that changed.

    Args:
        folder: the run folder.
        config: all options as plain values.
        resume: continue the run of the folder.
        steps: length of the run; None if it is in minutes.
        engines, model: if given, the checkpoint is checked against them as in `load_state`.

    Raises ValueError, before anything is written or printed, as `check_folder` does, if another process trains in the
    folder, if the checkpoint is beyond `steps`, and as `load_state` does.
    """
    folder = Path(folder)
    check_folder(folder, resume)
    _lock(folder)
    # Repeated under the lock, because another run may have started and ended since.
    check_folder(folder, resume)
    state = newest_state(folder) if resume else None
    if state is not None and steps is not None and state.step > steps:
        raise ValueError(
            f"{folder} is at step {state.step}, beyond the {steps} steps of this run: give more steps, or train in another "
            "folder"
        )
    if state is not None and engines is not None:
        _check_model(state, model)
        _check_engines(engines, state)
    if current_ranks().is_main:
        folder.mkdir(parents=True, exist_ok=True)
        first = folder / CONFIG_FILE
        if first.exists():
            remedy = "restore the file, or train in another folder"
            if not isinstance(before := read_json(first, remedy), dict):
                raise ValueError(f"{first} is damaged, it holds no options: {remedy}")
            _print_changes(before, json.loads(json.dumps(config)))
        write_json(folder / ("config.resumed.json" if first.exists() else CONFIG_FILE), dict(config))
    barrier()
    if resume and current_ranks().is_main:
        print(f"resuming from step {state.step}" if state else f"{folder} has no whole checkpoint: starting at step 0")
    return state


# Open lock files by folder; the operating system releases the locks when the process ends.
_locks: dict[Path, IO] = {}


def _lock(folder: Path) -> None:
    """Lock the folder on the main rank. Raises ValueError on all ranks if another process trains in it. Collective."""
    locked = False
    if current_ranks().is_main and (place := folder.resolve()) not in _locks:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / _LOCK, "a")  # noqa: SIM115 - open until the process ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            locked = True
            file.close()
        except OSError:
            # File systems without locks are used unlocked.
            file.close()
        else:
            _locks[place] = file
    if broadcast_object(locked):
        raise ValueError(
            f"another process trains in {folder} now: wait until it ends, or choose another folder with --out "
            "(nothing was changed)"
        )


def _print_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [text for text in differences(before, now) if not text.startswith(("resume ", "out "))]
    if changed:
        print(f"resuming with other options than the run began with: {'; '.join(changed)}")


def newest_state(folder: Path | str) -> SavedState | None:
    """Return the newest complete checkpoint of a run folder, or None; interrupted and truncated ones are ignored."""
    return next((state for candidate in _step_folders(Path(folder)) if (state := _read_marker(candidate))), None)


def _step_folders(folder: Path) -> list[Path]:
    """Return the folders of all checkpoints, newest first, complete or not."""
    return sorted((folder / _STATE).glob("step-*"), reverse=True)


def _read_marker(folder: Path) -> SavedState | None:
    """Return a checkpoint, or None if it is not complete. Raises ValueError for a marker that no training has written."""
    try:
        marker = read_json(folder / _MARKER)
    except (OSError, ValueError):
        return None
    fields = checked_marker(marker, folder / _MARKER)
    files = {folder / name: size for name, size in fields["files"].items()}
    try:
        # A pipe, which is no file, would be waited for.
        if not all(path.is_file() and path.stat().st_size == size for path, size in files.items()):
            return None
    except (OSError, ValueError):
        return None
    names = ("step", "world_size", "zero_stages", "model", "loader_state")
    state = SavedState(folder=folder, **{name: fields[name] for name in names})
    return replace(state, model={_RENAMED.get(name, name): value for name, value in state.model.items()})


def save_state(
    engines: Mapping[str, Engine],
    folder: Path | str,
    step: int,
    loader_state: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    *,
    model: Mapping[str, Any] | None = None,
    keep: int = _KEPT,
) -> Path:
    """Save a checkpoint of the run and return its folder; only the newest `keep` checkpoints remain. Collective.

    Args:
        engines: saved in this order, the model last.
        folder: the run folder.
        step: number of steps done.
        loader_state: JSON-serialisable.
        extra: numbers, text and tensors in dicts and lists, the same on all ranks.
        model: the model config as plain values, compared when the run is resumed.
        keep: number of checkpoints, at least 1.

    Raises ValueError if it cannot be written; then it is removed, and earlier ones stay.
    """
    target = Path(folder) / _STATE / f"step-{step:08d}"
    try:
        _save(engines, target, step, loader_state, extra, model)
        if current_ranks().is_main:
            _remove_old(Path(folder), keep)
    except (OSError, RuntimeError) as error:
        if (number := error_number(error)) is None:
            raise
        _remove(target)
        raise ValueError(
            f"{target} cannot be written ({os.strerror(number)}); the checkpoint before it is whole: make room there, and go on "
            "with --resume"
        ) from error
    barrier()
    return target


def _save(
    engines: Mapping[str, Engine],
    target: Path,
    step: int,
    loader_state: Mapping[str, Any],
    extra: Mapping[str, Any] | None,
    model: Mapping[str, Any] | None,
) -> None:
    if (ranks := current_ranks()).is_main:
        _remove(target)
        target.mkdir(parents=True)
    barrier()
    for name, engine in engines.items():
        engine.save(target, name, {})
    _save_random_state(target / f"random-{ranks.rank}.pt")
    if ranks.is_main:
        for name, engine in engines.items():
            if engine.average is not None:
                torch.save(engine.average.state_dict(), target / (name + _AVERAGE))
        torch.save(dict(extra or {}), target / _EXTRA)
    barrier()
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


def remove_leftovers(folder: Path | str) -> None:
    """Remove what a run that was killed while it removed old checkpoints left of them, on the main process."""
    if current_ranks().is_main:
        _remove_old(Path(folder), _KEPT)


def _remove_old(folder: Path, keep: int) -> None:
    """Remove all checkpoints, complete or not, that are older than the newest `keep` complete ones."""
    complete = 0
    for candidate in _step_folders(folder):
        if complete >= max(1, keep):
            _remove(candidate)
        else:
            with contextlib.suppress(ValueError):  # damaged, and so not complete
                complete += _read_marker(candidate) is not None


def _remove(folder: Path) -> None:
    # The marker is removed first, so that an interrupted removal leaves no checkpoint that looks complete.
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


def load_state(
    engines: Mapping[str, Engine],
    state: SavedState,
    model: Mapping[str, Any] | None = None,
    *,
    restore_random: bool = True,
) -> None:
    """Load weights, their averages, optimizers, counters and the random state of each rank. Collective.

    An average that the checkpoint lacks starts with its weights. The random state is loaded if the number of ranks is
    that of the checkpoint.

    Args:
        engines, model: as for `save_state`.
        state: the checkpoint.
        restore_random: load the random state.

    Raises ValueError, before anything is loaded, if the model config, the engines, a ZeRO stage or (at stages 1 to 3) the
    number of ranks differ from the checkpoint's, or its files hold what no training writes.
    """
    _check_model(state, model)
    _check_engines(engines, state)
    _check_contents(state)
    with naming_damaged(state.folder, ValueError):
        _load(engines, state, restore_random)


def _load(engines: Mapping[str, Engine], state: SavedState, restore_random: bool) -> None:
    ranks = current_ranks()
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
    """Return {"a.b": [saved value, current value]} for each key that differs between two nested dicts."""
    changed: dict[str, list] = {}
    for key in [*saved, *(key for key in current if key not in saved)]:
        before, after = saved.get(key, absent), current.get(key, absent)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed |= changed_values(before, after, absent, f"{prefix}{key}.")
        elif before != after:
            changed[f"{prefix}{key}"] = [before, after]
    return changed


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return "a.b was 1, is 2" for each key that differs between two nested dicts."""
    changed = changed_values(saved, current, "(absent)")
    return [f"{name} was {before}, is {after}" for name, (before, after) in changed.items()]


def _check_model(state: SavedState, model: Mapping[str, Any] | None) -> None:
    # Converted by JSON, like the saved config, because it turns tuples into lists.
    changed = differences(state.model, json.loads(json.dumps(model or {})))
    if changed:
        raise ValueError(
            f"{state.folder} does not fit this run: {'; '.join(changed)}. Give the options of the first run "
            f"(in {state.folder.parent.parent / CONFIG_FILE}), or start a new run with another --out"
        )


def _check_engines(engines: Mapping[str, Engine], state: SavedState) -> None:
    if set(engines) != set(state.zero_stages):
        raise ValueError(
            f"{state.folder} holds {', '.join(state.zero_stages)}, but this run trains {', '.join(engines)}: resume with the "
            "options of the first run, or start a new run with another --out"
        )
    world_size = current_ranks().world_size
    for name, engine in engines.items():
        saved_stage, stage = state.zero_stages[name], engine.config.zero_stage
        if saved_stage != stage:
            raise ValueError(
                f"{state.folder} was saved with zero_stage {saved_stage}, this run has {stage}: resume with "
                f"zero_stage {saved_stage}"
            )
        if _needs_universal(engine, state, world_size) and not (state.folder / (name + _UNIVERSAL)).is_dir():
            # DeepSpeed's program, which the message names, runs what a pickle names.
            _check_contents(state)
            raise ValueError(_universal_advice(engines, state, world_size))


def _check_contents(state: SavedState) -> None:
    main_first(lambda: current_ranks().is_main and check_contents(state.folder))


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
        f"each rank holds a share. Resume with {state.world_size} ranks, or convert the checkpoint and resume again:\n  "
        + "\n  ".join(commands)
    )
