"""Everything that a GPU is needed for, in one command and by the clock: tests, speed, and the trainings of the `box` recipes.

    python eval/gpu.py --pack box.clips --minutes 9 --out runs/gpu

The parts, each a process of its own with its own limit, so that one that fails costs only itself:

    tests      the tests marked gpu
    speed      eval/speed_gpu.py
    unpack     the packed clips (larp-mllm pack-clips) become frames
    tokenizer  training/train_tokenizer.py --recipe tokenizer-box-gpu; three quarters of what is left of the time
    tokens     codes of the train, validation and test split; beside it the tokenizer's figures on the test split
    generator, mllm   the class-conditional generator and the language model, side by side

OUT gets report.json and, as each part ends, its results as NAME.tar.00, NAME.tar.01, ... of at most 15 MB (`--unpack-results OUT`
puts them together again). Without a GPU: `--device cpu --rehearse` runs the same with tiny sizes.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from larp.config import parse, run_script, to_dict
from larp.engine.clock import check_minutes
from larp.engine.log import write_json
from larp.hub import EMA, WEIGHTS, check_device, weights_file
from larp.metrics import lpips

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
PIECE = 15 * 2**20
"""Bytes of a file of results at most."""
Part = Literal["tests", "speed", "tokenizer", "generator", "mllm"]
# Seconds that a part may take at most, and how a training's time is shared out.
LIMITS = {"tests": 100, "speed": 130, "unpack": 60, "tokens": 60}
TOKENIZER_SHARE = 0.74
# Seconds that a training takes beyond its minutes: imports, reading, building; at its end figures and writing, and samples.
BEFORE, AFTER, SAMPLES = 20, 8, 6
LINES = 12


@dataclass(frozen=True)
class GpuConfig:
    """Run what needs a GPU, in a given time."""

    minutes: float = 9.0
    """For everything together."""
    out: Path = Path("runs/gpu")
    """Where the results go, in files of at most 15 MB."""
    work: Path | None = None
    """Where the parts work and leave what is too large to keep; by default the folder work in `out`."""
    parts: tuple[Part, ...] = get_args(Part)
    wheels: Path | None = None
    """Folder of wheels that this machine lacks (make wheelhouse): installed into a folder of their own first."""
    pack: Path | None = None
    """The packed clips to train on (larp-mllm pack-clips); the trainings need it."""
    start_from: Path | None = None
    """Results of an earlier run, unpacked: the trainings go on from its tokenizer, generator and mllm, where they are there."""
    tokenizer_options: str = ""
    """Further options of the tokenizer's training, as on its command line."""
    generator_options: str = ""
    """The same of the generator's."""
    mllm_options: str = ""
    """The same of the language model's."""
    device: str = "cuda"
    rehearse: bool = False
    """Tiny sizes, to see that everything runs."""
    unpack_results: Path | None = None
    """Put the pieces of an earlier run's OUT together in it, and do nothing else."""

    def __post_init__(self):
        check_minutes(self.minutes)


@dataclass
class Runner:
    """Runs parts as processes until a deadline, and keeps the report up to date."""

    config: GpuConfig
    deadline: float
    report: dict = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """The folder that the parts work in."""
        return self.config.work or self.config.out / "work"

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def run(self, limit: float, **commands: Sequence[str]) -> bool:
        """Run the named commands side by side, each for `limit` seconds at most; True if all of them ended well."""
        limit = min(limit, self.left)
        if limit < 5:
            for name in commands:
                self.note(name, "skipped", 0.0, "no time is left for it: give more --minutes")
            return False
        began = time.monotonic()
        started = {name: self._start(name, command) for name, command in commands.items()}
        for name, process in started.items():
            try:
                status = "ok" if process.wait(max(0.1, began + limit - time.monotonic())) == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "out of time"
                end(process)
            seconds = time.monotonic() - began
            self.note(name, status, seconds, "" if status == "ok" else last_lines(self.log(name)))
        self.keep("logs", *(self.log(name) for name in self.report["parts"]), *self.figures())
        return all(self.report["parts"][name]["status"] == "ok" for name in commands)

    def log(self, name: str) -> Path:
        """The file that takes what a part prints."""
        return self.work / "logs" / f"{name}.log"

    def _start(self, name: str, command: Sequence[str]) -> subprocess.Popen:
        log = self.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "20",
        }  # fmt: skip
        print(f"{name}: {' '.join(map(str, command))}", flush=True)
        with open(log, "w") as file:
            return subprocess.Popen(
                [sys.executable, *map(str, command)], cwd=ROOT, env=environment, stdout=file, stderr=file,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def note(self, name: str, status: str, seconds: float, lines: str = "") -> None:
        """Write how a part ended into the report."""
        entry = {"status": status, "seconds": round(seconds, 1)} | ({"lines": lines} if lines else {})
        self.report.setdefault("parts", {})[name] = entry
        self.report["seconds"] = round(60 * self.config.minutes - self.left, 1)
        write_json(self.config.out / "report.json", self.report)
        print(f"{name}: {status} after {seconds:.0f} s{': ' + lines if lines else ''}", flush=True)

    def keep(self, name: str, *paths: Path) -> None:
        """Put files and folders of the work folder into OUT as NAME.tar.00 and so on, in place of older ones."""
        whole = self.work / f"{name}.tar"
        with tarfile.open(whole, "w") as archive:
            for path in paths:
                if path.exists():
                    archive.add(path, path.relative_to(self.work))
        for old in self.config.out.glob(f"{name}.tar.*"):
            old.unlink()
        with open(whole, "rb") as file:
            for number, piece in enumerate(iter(lambda: file.read(PIECE), b"")):
                (self.config.out / f"{name}.tar.{number:02d}").write_bytes(piece)
        whole.unlink()

    def figures(self) -> Iterator[Path]:
        """The small results of all parts: reports, metrics, sheets."""
        for pattern in ("*.json", "*/report.json", "*/config.json", "*/metrics.jsonl", "*.png", "*/samples/*.png"):
            yield from sorted(self.work.glob(pattern))


def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` (by default the program's own) and return the report."""
    argv = sys.argv[1:] if argv is None else argv
    # First of all: what reads the command line may be among them.
    for given, following in zip(argv, [*argv[1:], ""], strict=True):
        if given == "--wheels" or given.startswith("--wheels="):
            install(Path(given.partition("=")[2] or following))
    config, _ = parse(GpuConfig, argv, Path(__file__).parent, "gpu.py")
    if config.unpack_results is not None:
        return {"files": unpack_results(config.unpack_results)}
    check_device(config.device)
    trained = [part for part in config.parts if part not in ("tests", "speed")]
    if trained and config.pack is None:
        raise ValueError(
            "--pack names no packed clips to train on: make them with larp-mllm pack-clips, or choose --parts tests speed"
        )
    runner = Runner(config, time.monotonic() + 60 * config.minutes)
    runner.work.mkdir(parents=True, exist_ok=True)
    config.out.mkdir(parents=True, exist_ok=True)
    runner.report |= {"machine": machine(config.device), "options": to_dict(config)}
    tiny = ("--device", "cpu", "--rehearse") if config.rehearse else ()
    if "tests" in config.parts:
        if config.device == "cpu":
            os.environ["LARP_GPU_TESTS_ON"] = "cpu"
        # Their trainings take minutes on a CPU; a test of its own runs them there.
        chosen = ["tests/gpu/test_models.py", "tests/gpu/test_sampler.py"] if tiny else ["tests/gpu"]
        runner.run(LIMITS["tests"], tests=["-m", "pytest", "-m", "gpu", *chosen, "-q", "-rfE"])
    if "speed" in config.parts:
        out, minutes = runner.work / "speed.json", (LIMITS["speed"] - 20) / 60
        runner.run(LIMITS["speed"], speed=["eval/speed_gpu.py", "--out", out, "--minutes", minutes, *tiny])
    if trained:
        train(runner)
    runner.keep("logs", *(runner.log(name) for name in runner.report["parts"]), *runner.figures())
    print(f"report: {config.out / 'report.json'}")
    return runner.report


def install(wheels: Path) -> None:
    """Unpack wheels into a new folder that this program and its parts import from; no network is asked."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise ValueError(f"--wheels {wheels} holds no wheel: make them with `make wheelhouse PYTHON=3.12`")
    site = tempfile.mkdtemp(prefix="larp-wheels-")
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", site, *files], capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"--wheels {wheels} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    sys.path.insert(0, site)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))


def train(runner: Runner) -> None:
    """The trainings, one after the other where one needs the other's result."""
    config, work = runner.config, runner.work
    earlier = config.start_from or Path("nowhere")
    clips = work / "clips"
    if not runner.run(LIMITS["unpack"], unpack=["-m", "larp_mllm.cli", "unpack-clips", config.pack, "-o", clips]):
        return
    everything, labelled = f"jsonl:{clips / 'clips.jsonl'}", f"jsonl:{clips / 'labelled.jsonl'}"
    tokenizer, models = work / "tokenizer", [part for part in ("generator", "mllm") if part in config.parts]
    if "tokenizer" in config.parts:
        seconds = runner.left * (TOKENIZER_SHARE if models else 1.0)
        runner.run(
            seconds + 2 * AFTER,
            tokenizer=[
                "training/train_tokenizer.py", *recipe(config, "tokenizer"), "--data", everything, "--out", tokenizer,
                *lasting(seconds - BEFORE - AFTER), *going_on(earlier / "tokenizer"), *config.tokenizer_options.split(),
            ],
        )  # fmt: skip
    if not (tokenizer / "model").is_dir():
        if not (earlier / "tokenizer").is_dir():
            return
        shutil.copytree(earlier / "tokenizer", tokenizer / "model")
    best = smaller(tokenizer / "model", work / "weights" / "tokenizer")
    runner.keep("tokenizer", best)
    if not models:
        return
    codes = {split: work / f"tokens-{split}" for split in ("train", "validation", "test")}
    # Given frames as well, from which the language model learns to continue.
    given = ("--condition-frames", "5", "--workers", "8")
    windows = {"train": ("--windows", "8", "--flips"), "validation": ("--windows", "2"), "test": ()}
    if not runner.run(
        LIMITS["tokens"],
        **{
            f"tokens_{split}": [
                "training/extract_tokens.py", "--tokenizer", best, "--data", labelled, "--split", split, "--out", folder,
                *given, *windows[split],
            ]
            for split, folder in codes.items()
        },
        reconstruction=["eval/ucf_rfvd.py", "--tokenizer", best, "--data", labelled, "--split", "test",
                        "--out", work / "reconstruction.json", "--repeats", "2", "--device", config.device],
    ) and not all((folder / "index.json").exists() for folder in list(codes.values())[:2]):  # fmt: skip
        return
    lasts = lasting(runner.left - BEFORE - AFTER - SAMPLES)
    shared = ["--tokens", codes["train"], "--eval-tokens", codes["validation"], *lasts]
    options = {"generator": config.generator_options, "mllm": config.mllm_options}
    runner.run(
        runner.left - 5,
        **{
            name: [
                f"training/train_{name}.py", *recipe(config, name), *shared, "--out", work / name,
                *going_on(earlier / name), *options[name].split(),
            ]
            for name in models
        },
    )  # fmt: skip
    if (work / "generator" / "model").is_dir():
        runner.keep("generator", smaller(work / "generator" / "model", work / "weights" / "generator"))
    if (work / "mllm" / "model").is_dir():
        runner.keep("mllm", smaller_mllm(work / "mllm" / "model", work / "weights" / "mllm"))


def recipe(config: GpuConfig, model: str) -> list[str]:
    """The options that name a model's recipe, and make it tiny for a rehearsal."""
    options = ["--recipe", f"{model}-box-gpu"]
    if config.rehearse:
        options += TINY[model]
        if model == "tokenizer" and not lpips.available():
            options.append("--loss.lpips=0")
    return options


_SIDES = [f"--model.{side}-{what}={value}" for side in ("encoder", "decoder")
          for what, value in (("width", 32), ("depth", 1), ("heads", 2))]  # fmt: skip
TINY = {
    "tokenizer": [
        *_SIDES, "--model.patch-size", "8", "16", "16", "--model.num-tokens=16", "--model.codebook-size=64", "--batch-size=8",
        "--model.prior.depth=1", "--model.prior.width=16", "--model.prior.heads=2", "--adversary.hidden=16", "--adversary.depth=1",
        "--adversary.heads=2", "--log-every=5", "--eval-clips=4", "--engine.no-compile",
    ],
    "generator": ["--batch-size=8", "--size=tiny", "--log-every=5", "--sampling.clips=2"],
    "mllm": ["--batch-size=8", "--tiny.layers=1", "--tiny.width=32", "--tiny.heads=2", "--log-every=5", "--eval-videos=4"],
}  # fmt: skip


def lasting(seconds: float) -> list[str]:
    """The option that gives a training so much time, six seconds at least."""
    return ["--minutes", f"{max(6.0, seconds) / 60:.3f}"]


def going_on(model: Path) -> list[str]:
    """The option that begins with earlier weights, where there are some."""
    return ["--start-from", str(model)] if model.is_dir() else []


def smaller(model: Path, target: Path) -> Path:
    """Write the averaged weights of a model of larp, or else its weights, in 16 bits; return the folder."""
    from larp.generator import LarpGenerator
    from larp.tokenizer import LarpTokenizer

    kind = LarpGenerator if "generator" in target.name else LarpTokenizer
    variant = EMA if (model / weights_file(EMA)).exists() else None
    return kind.from_pretrained(model, variant=variant).save_pretrained(target, dtype=torch.bfloat16)


def smaller_mllm(model: Path, target: Path) -> Path:
    """Write a language model in 16 bits and without the video tokenizer, which is a result of its own; return the folder."""
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("video_tokenizer", WEIGHTS), dirs_exist_ok=True)
    tensors = load_file(model / WEIGHTS)
    short = {
        k: v.to(torch.bfloat16) if v.dtype == torch.float32 and k != "adapter.codebook" else v
        for k, v in tensors.items()
    }
    save_file(short, target / WEIGHTS, metadata={"format": "pt"})
    return target


def end(process: subprocess.Popen) -> None:
    """Stop a part and all that it started: asked first, so that a training saves, then made to."""
    for number, patience in ((signal.SIGTERM, 8), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def last_lines(path: Path) -> str:
    """The last lines of a log, without what progress bars wrote over."""
    lines = path.read_text(errors="replace").replace("\r", "\n").splitlines()
    return "\n".join([line for line in lines if line.strip()][-LINES:])


def machine(device: str) -> dict[str, str | int]:
    """What the report says of the machine."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count() or 1}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    return found


def unpack_results(folder: Path) -> list[str]:
    """Put the pieces of a run's results together below `folder`, and return the names of what was in them."""
    names = sorted({path.name.split(".tar.")[0] for path in folder.glob("*.tar.*")})
    if not names:
        raise ValueError(f"{folder} holds no results (NAME.tar.00, ...) of eval/gpu.py: give the folder that it wrote")
    found = []
    for name in names:
        whole = folder / f".{name}.tar"
        with open(whole, "wb") as file:
            for piece in sorted(folder.glob(f"{name}.tar.*")):
                file.write(piece.read_bytes())
        with tarfile.open(whole) as archive:
            archive.extractall(folder, filter="data")
            found += archive.getnames()
        whole.unlink()
    complete_mllm(folder / "weights" / "mllm", folder / "weights" / "tokenizer")
    print("\n".join(found))
    return found


def complete_mllm(folder: Path, tokenizer: Path) -> None:
    """Make of what `smaller_mllm` left a model that loads: float32 again, its video tokenizer beside it."""
    inside = folder / "video_tokenizer"
    if not folder.is_dir() or not tokenizer.is_dir() or inside.is_dir():
        return
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    shutil.copytree(tokenizer, inside)


if __name__ == "__main__":
    run_script("gpu.py", main)
