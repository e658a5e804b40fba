"""Scripts of this repository as processes: stages that run once each, and parts with a time limit.

stage(folder / "report.json", ROOT / "training/train_tokenizer.py", "--out", folder)   # unless the report exists

runner = Runner(out, out / "work", deadline=time.monotonic() + 540, root=ROOT)
runner.run(100, tests=["-m", "pytest", "-q"])          # one part; several run side by side
runner.save("weights", runner.work / "weights")        # OUT/weights.tar.00, weights.tar.01, ...
unpack_results(out)                                    # elsewhere, later
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from larp.files import read_json, write_json

PIECE = 15 * 2**20
"""Maximum size of a file of results, in bytes."""
REPORT, OPTIONS = "report.json", "options.json"
_LINES = 12
# Small files of the work folder that are saved beside the logs.
_FIGURES = ("*.json", "*/report.json", "*/config.json", "*/metrics.jsonl", "*.png", "*/samples/*.png")


class StageError(ValueError):
    """A script ended with another status than 0."""


def stage(
    product: Path, script: Path, *options: object, resumes: bool = False, environment: Mapping[str, str] | None = None
) -> None:
    """Run a script in a process of its own, unless its product exists.

    Args:
        product: file that exists when the stage is done, written by the script or by the caller after it.
        script: path of the script, whose parent's parent is added to `PYTHONPATH`.
        options: command line of the script.
        resumes: add --resume where an earlier run left a config.json beside the product.
        environment: variables to add to those of this process.

    Raises StageError if the script ends with another status than 0; the script prints the reason.
    """
    if product.exists():
        return
    begun = resumes and (product.parent / "config.json").exists()
    command = [sys.executable, str(script), *map(str, options), *(["--resume"] if begun else [])]
    print("==", " ".join(command), flush=True)
    began = time.monotonic()
    variables = {**os.environ, "PYTHONPATH": str(script.resolve().parents[1]), **(environment or {})}
    status = subprocess.run(command, check=False, env=variables).returncode
    if status:
        raise StageError(f"{script.name} ended with status {status}; the same command goes on where this one stopped")
    print(f"== {time.monotonic() - began:.0f} s", flush=True)


def check_options(folder: Path, options: Sequence[str]) -> None:
    """Record the options of the stages of a folder. Raises ValueError if others are recorded: their products would be taken for these."""
    record = folder / OPTIONS
    known = read_json(record, "delete the folder, and run again") if record.is_file() else None
    if known not in (None, list(options)):
        raise ValueError(
            f"{folder} holds a training with other options ({' '.join(known)}; now {' '.join(options)}): choose another --runs"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, list(options))


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError unless there are seeds, all different."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be one or more different numbers, got {list(seeds)}")


@dataclass
class Runner:
    """Runs parts as processes of this Python until a deadline, and writes the report after each.

    Args:
        out: folder of the report and the results.
        work: folder that the parts write to.
        deadline: when the last part must end, in seconds of `time.monotonic`.
        root: working folder of the parts, and first in their `PYTHONPATH`.
        environment: further variables of the parts.
    """

    out: Path
    work: Path
    deadline: float
    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    report: dict = field(default_factory=dict)

    def __post_init__(self):
        self.began = time.monotonic()
        self.report |= {"parts": {}, "results": {}}

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def run(self, limit: float, **commands: Sequence) -> bool:
        """Run the named commands in parallel, each for at most `limit` seconds; return whether all ended with status 0.

        A signal that ends this program ends the commands first, and the report says so.
        """
        limit = min(limit, self.left)
        if limit < 5:
            self.skip("no time is left for it: give more --minutes", *commands)
            return False
        began = time.monotonic()
        started = {name: self._start(name, command) for name, command in commands.items()}
        try:
            for name, process in started.items():
                try:
                    status = "ok" if process.wait(max(0.1, began + limit - time.monotonic())) == 0 else "failed"
                except subprocess.TimeoutExpired:
                    status = "out of time"
                    _end(process)
                self._record(name, status, time.monotonic() - began)
        except BaseException:
            for name, process in started.items():
                if process.poll() is None:
                    _end(process)
                    self._record(name, "stopped", time.monotonic() - began)
            self.save_logs()
            raise
        self.save_logs()
        return all(self.report["parts"][name]["status"] == "ok" for name in commands)

    def skip(self, reason: str, *names: str) -> None:
        """Record that parts are skipped, and why."""
        for name in names:
            self.report["parts"][name] = {"status": "skipped", "seconds": 0.0, "lines": reason}
            print(f"{name}: skipped: {reason}", flush=True)
        self.write()

    def log(self, name: str) -> Path:
        """Return the file that receives the output of a part."""
        return self.work / "logs" / f"{name}.log"

    def write(self) -> None:
        """Write the report."""
        write_json(self.out / REPORT, self.report | {"seconds": round(time.monotonic() - self.began, 1)})

    def _start(self, name: str, command: Sequence) -> subprocess.Popen:
        log = self.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        paths = os.pathsep.join(filter(None, [str(self.root), os.environ.get("PYTHONPATH")]))
        own = {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "20"}
        environment = os.environ | own | self.environment
        print(f"{name}: {' '.join(map(str, command))}", flush=True)
        with open(log, "w") as file:
            return subprocess.Popen(
                [sys.executable, *map(str, command)], cwd=self.root, env=environment, stdout=file, stderr=file,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def _record(self, name: str, status: str, seconds: float) -> None:
        lines = "" if status == "ok" else last_lines(self.log(name))
        entry = {"status": status, "seconds": round(seconds, 1)} | ({"lines": lines} if lines else {})
        self.report["parts"][name] = entry
        self.write()
        print(f"{name}: {status} after {seconds:.0f} s{': ' + lines if lines else ''}", flush=True)

    def save_logs(self) -> None:
        """Save the logs and small results of all parts in `out`, in place of earlier ones."""
        figures = [path for pattern in _FIGURES for path in sorted(self.work.glob(pattern))]
        self.save("logs", *(self.log(name) for name in self.report["parts"]), *figures)

    def save(self, name: str, *paths: Path) -> None:
        """Save files and folders of `work` in `out` as NAME.tar.00, NAME.tar.01, ..., in place of earlier ones."""
        whole = self.work / f"{name}.tar"
        with tarfile.open(whole, "w") as archive:
            for path in paths:
                if path.exists():
                    archive.add(path, path.relative_to(self.work))
        for old in self.out.glob(f"{name}.tar.*"):
            old.unlink()
        pieces = 0
        with open(whole, "rb") as file:
            for piece in iter(lambda: file.read(PIECE), b""):
                (self.out / f"{name}.tar.{pieces:02d}").write_bytes(piece)
                pieces += 1
        self.report["results"][name] = {"pieces": pieces, "sha256": _sha256([whole])}
        whole.unlink()
        self.write()


def last_lines(path: Path) -> str:
    """Return the last lines of a log, where progress bars are lines too."""
    lines = path.read_text(errors="replace").replace("\r", "\n").splitlines() if path.exists() else []
    return "\n".join([line for line in lines if line.strip()][-_LINES:])


def unpack_results(folder: Path) -> list[str]:
    """Unpack the results of a run in its folder `out`, all or none, and return the names of the files.

    Raises ValueError for a folder without results, for missing pieces, and for pieces whose hash differs from the report's.
    """
    try:
        results = json.loads((folder / REPORT).read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} holds no results of eval/gpu.py, or its {REPORT} is damaged: give the folder that it wrote (--out)"
        ) from error
    found = []
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder) as temporary:
        for name, result in results.items():
            pieces = [folder / f"{name}.tar.{number:02d}" for number in range(result["pieces"])]
            if missing := [piece.name for piece in pieces if not piece.is_file()]:
                raise ValueError(f"{folder} lacks {', '.join(missing)}: bring all pieces back")
            if _sha256(pieces) != result["sha256"]:
                raise ValueError(
                    f"{pieces[0]} and its further pieces are not those that {REPORT} names: copy them again"
                )
            whole = Path(temporary) / f"{name}.tar"
            with open(whole, "wb") as file:
                for piece in pieces:
                    file.write(piece.read_bytes())
            with tarfile.open(whole) as archive:
                archive.extractall(Path(temporary) / "results", filter="data")
                found += archive.getnames()
        shutil.copytree(Path(temporary) / "results", folder, dirs_exist_ok=True)
    return found


def _sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _end(process: subprocess.Popen) -> None:
    """Stop a part and its child processes: SIGTERM first, so that a training saves, then SIGKILL."""
    for number, patience in ((signal.SIGTERM, 8), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return
