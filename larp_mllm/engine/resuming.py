"""What --resume makes of a run folder: one that ended stays as it is, and of one that goes on the report says what changed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from larp.engine.state import CONFIG_FILE, changed_values, newest_state
from larp_mllm.engine.report import REPORT
from larp_mllm.home import RUN_MODEL


def ended(run: Path, steps: int, minutes: float | None = None) -> dict[str, Any] | None:
    """The report of a run that trained all of its `steps`, or all of its `minutes` where it has them, and wrote, judged and sampled its
    model; else None.
    """
    report, state = _read(run / REPORT), newest_state(run)
    # The samples are what a report gets last.
    whole = report is not None and "samples" in report and any((run / RUN_MODEL).glob("*.safetensors"))
    if not whole or state is None or report.get("steps") != state.step:
        return None
    full = state.step == steps if minutes is None else state.loader_state.get("elapsed", 0.0) >= 60 * minutes
    return report if full else None


def nothing_to_do(run: Path, report: Mapping[str, Any]) -> str:
    """What is said of a run that `ended`."""
    return (
        f"{run} finished before, at step {report['steps']}: nothing to do, its report and {run / RUN_MODEL} stay as they are, "
        "whatever options are given now; it goes on if they ask for more steps"
    )


def going_on(run: Path, options: Mapping[str, Any], step: int, earlier: list[dict]) -> list[dict[str, Any]]:
    """For the report: at which steps a run went on with other options than it had until then, and with which.

    options: all of them now, as plain values. earlier: what this gave when the checkpoint was saved that the run goes on from, at
    `step`. An item is {"step", "changed": {option: [the value that the run began with, now]}}; nothing in "changed" means
    that the run went back to the options that it began with.
    """
    now = json.loads(json.dumps(options))
    found = changed_values(_read(run / CONFIG_FILE) or {}, now)
    changed = {name: values for name, values in found.items() if name not in ("resume", "out")}
    before = earlier[-1]["changed"] if earlier else {}
    return earlier if changed == before else [*earlier, {"step": step, "changed": changed}]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing, or damaged: then it is written anew
        return None
