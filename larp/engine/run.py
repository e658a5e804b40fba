"""What every training script does around its loop: check the options, open or resume the run folder, log, save, stop.

    check_run(config)
    ...                                                    # build data, models and engines
    saved = open_training(config, to_dict(config), clock, engines, identity)
    with open_log(config, ranks, clock, ("loss",)) as log:
        while not clock.done:
            losses = train_step(...)
            clock.advance()
            log.metrics(clock.step, losses | step_metrics(engine, clock))
            if clock.due(config.save_every):
                save_training(config, clock, engines, identity)

The loop itself belongs to the script: what a step is, when it validates, and what its checkpoints hold.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from larp.config import to_dict
from larp.engine.backend import Engine, Ranks
from larp.engine.checkpoint import SavedState, check_folder, load_state, open_run, remove_leftovers, save_state
from larp.engine.clock import Clock
from larp.engine.distributed import gather_objects
from larp.engine.log import RunLog, check_wandb
from larp.engine.untrusted import naming_damaged


class RunConfig(Protocol):
    """The options that the configs of all trainings have."""

    out: Path
    resume: bool
    wandb: str | None


def check_run(config: RunConfig) -> None:
    """Raise ValueError for a run folder that cannot be used or a logger that is not installed. Collective.

    To be called first: nothing is written, and no data or model is needed.
    """
    check_folder(config.out, config.resume)
    check_wandb(config.wandb)


def open_training(
    config: RunConfig,
    options: Mapping[str, Any],
    clock: Clock,
    engines: Mapping[str, Engine],
    identity: Mapping[str, Any],
) -> SavedState | None:
    """Open the run folder, load the newest checkpoint into the engines with `resume`, and start the clock. Collective.

    Called when all that can fail for a mistake of the user is done, so that such a mistake leaves no run folder behind.

    Args:
        options: for config.json, as plain values.
        engines: by name, in the order in which they are saved.
        identity: what a checkpoint must agree in to be resumed, as plain values.

    Returns the checkpoint, whose `loader_state` and `extra` the caller loads; None for a run that begins.
    """
    saved = open_run(config.out, options, config.resume, clock.total, engines, identity)
    if saved is None:
        clock.start()
        return None
    load_state(engines, saved, identity)
    remove_leftovers(config.out)
    # Tokenizer runs that began before 2026-11-27 hold it in `extra`.
    with naming_damaged(saved.folder):
        elapsed = saved.loader_state.get("elapsed", saved.extra.get("elapsed", 0.0))
        clock.start(saved.step, float(elapsed))
    return saved


def open_log(config: RunConfig, ranks: Ranks, clock: Clock, show: Sequence[str]) -> RunLog:
    """Return the log of a run, from the step that the clock is at; `show` names the metrics behind the progress bar."""
    return RunLog(config.out, ranks, clock.total, clock.step, show, config.wandb, to_dict(config))


def step_metrics(engine: Engine, clock: Clock) -> dict[str, float]:
    """Return what the log holds of a step in every training: learning rates, gradient norm, skipped updates, place on the schedule."""
    skipped = {"skipped_updates": count} if (count := engine.skipped_count) else {}
    return {**engine.learning_rates, "grad_norm": engine.grad_norm or 0.0, **skipped, **clock.metrics}


def save_training(
    config: RunConfig,
    clock: Clock,
    engines: Mapping[str, Engine],
    identity: Mapping[str, Any],
    loader_state: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Save a checkpoint that `open_training` resumes; see `save_state` for loader_state and extra. Collective."""
    loader = {**(loader_state or {}), "elapsed": clock.elapsed}
    save_state(engines, config.out, clock.step, loader, extra, model=identity)


def skipped_videos(found: Sequence[tuple[str, str]], earlier: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return (name, reason) of the videos that any rank could not use, with those of before the run was resumed. Collective."""
    return sorted({*map(tuple, earlier), *(tuple(entry) for of_rank in gather_objects(found) for entry in of_rank)})


def skipped_before(saved: SavedState) -> list[tuple[str, str]]:
    """Return the `skipped_videos` in the loader state of a checkpoint. Raises ValueError or TypeError for a damaged one."""
    # Checkpoints of earlier versions hold none.
    return [(str(name), str(reason)) for name, reason in saved.loader_state.get("skipped", [])]


def stopped(config: RunConfig, step: int, log: RunLog) -> dict[str, int]:
    """Say how to go on with a run that was asked to stop and has saved; return its report for `run_script`."""
    log.say(f"stopped at step {step}, saved; go on with --resume --out {config.out}")
    return {"stopped_at": step}
