"""Logs of a run: metrics.jsonl, TensorBoard if installed, Weights & Biases on request, and a progress bar.

Only the main rank writes.
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from larp.engine.distributed import Ranks
from larp.files import write_text

from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"
_WANDB_ID = "wandb-id.txt"


def check_wandb(project: str | None) -> None:
    """Raise ValueError if a project of Weights & Biases is given but its package is not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"wandb = {project!r} asks for Weights & Biases, which is not installed: pip install 'larp-mllm[wandb]', or "
            "leave the option out"
        )


class RunLog:
    """Metrics and progress of one run; a context manager.

    Args:
        folder: the run folder; created if missing.
        ranks: this process among all.
        total_steps: length of the progress bar; None if unknown.
        resume_step: step that training resumes from. Later lines of metrics.jsonl are removed, so that each step has one
            line.
        show: names of the metrics in the progress bar; by default the first four.
        wandb: project of Weights & Biases that gets the same metrics; its environment variables (WANDB_MODE, ...) apply.
        config: options of the run as plain values, for Weights & Biases.

    Raises ValueError if Weights & Biases does not start.
    """

    def __init__(
        self,
        folder: Path | str,
        ranks: Ranks,
        total_steps: int | None,
        resume_step: int = 0,
        show: Sequence[str] = (),
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self._show, self._main = Path(folder), tuple(show), ranks.is_main
        self._file = self._board = self._wandb = None
        self._bar = tqdm(
            total=total_steps,
            initial=resume_step,
            disable=not self._main,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.1,
        )
        if self._main:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / METRICS_FILE
            _truncate(path, resume_step)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
            self._board = _open_tensorboard(self.folder / "tensorboard", resume_step)
            self._wandb = _open_wandb(wandb, self.folder, config or {}) if wandb is not None else None

    def metrics(self, step: int, values: Mapping[str, float], **labels: str) -> None:
        """Append a line {"step", "time" (Unix seconds), **labels, **values} and move the progress bar to `step`.

        Values that are not finite become null. `labels` are text, such as the stage of the training, for the file only.
        """
        if self._file is None:
            return
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line = {"step": step, "time": round(time.time(), 3), **labels, **finite}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        shown = [name for name in self._show if name in numbers] if self._show else list(numbers)[:4]
        self._bar.set_postfix({name: f"{numbers[name]:.4g}" for name in shown}, refresh=False)
        self.progress(step)

    def progress(self, step: int) -> None:
        """Move the progress bar to `step`, for steps without metrics."""
        self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """Print a line above the progress bar, on the main rank only."""
        if self._main:
            tqdm.write(text)

    def close(self) -> None:
        """Close the files and the bar; a second call does nothing."""
        self._bar.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._file is not None:
            self._file.close()
        self._file = self._board = self._wandb = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(folder: Path | str) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, without incomplete ones; empty without the file."""
    path = Path(folder) / METRICS_FILE
    return _complete_lines(path) if path.exists() else []


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _truncate(path: Path, resume_step: int) -> None:
    if path.exists():
        selected = [record for record in _complete_lines(path) if record["step"] <= resume_step]
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in selected))


def _open_tensorboard(folder: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # Events after the checkpoint that is resumed are hidden, as in metrics.jsonl.
    return SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)


def _open_wandb(project: str, folder: Path, config: Mapping[str, Any]) -> Any:
    check_wandb(project)
    import wandb

    # A resumed run continues the same wandb run, which ignores repeated steps.
    id_file = folder / _WANDB_ID
    identity = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
    try:
        run = wandb.init(
            project=project, name=folder.name, dir=str(folder), config=dict(config), id=identity, resume="allow"
        )
    except wandb.errors.Error as error:
        raise ValueError(
            f"Weights & Biases does not start ({error}): log in with `wandb login`, set WANDB_MODE=offline, or leave the "
            "option wandb out"
        ) from error
    write_text(id_file, run.id + "\n")
    return run
