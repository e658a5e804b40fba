"""The tiny runs that tests/faults/killed.py kills: how each is started, and what it leaves.

A job runs in a process that is forked for it; `record` notes what every step trained on, which no file of the run holds.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from larp.data.datasets import open_videos
from larp.metrics.fetching import fetch
from larp.metrics.weights import Source, WeightFile
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig
from tests.larp_mllm.tiny import tiny_cache, tiny_mllm
from training import extract_tokens, train_generator, train_mllm, train_tokenizer

import torch
from safetensors.torch import load_file

SAVE_EVERY = 7
"""Steps between checkpoints: no divisor of an epoch, of a validation or of the run."""
# What a resumed run may have of its own: times, its folder, that it was resumed, and the sizes of pickled files, whose content counts.
_OWN = {
    "time",
    "elapsed",
    "seconds",
    "minutes",
    "cpu_seconds",
    "peak_memory_gib",
    "out",
    "model",
    "samples",
    "resumed",
    "files",
}
_SIDES = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("width", 16), ("depth", 1), ("heads", 2))
}
_SHAPE = dict(num_frames=16, height=16, width=16, patch_size=(8, 8, 8), num_tokens=4, codebook_size=16, code_dim=4)
TOKENIZER = f"""
data = "shapes:count=24,size=16"
steps = 60
batch_size = 4
continuous = 0.1
reset_codes_every = 9
workers = 2
flip = true
log_every = 1
eval_every = 20
eval_clips = 8
save_every = {SAVE_EVERY}
ema = 0.9
keep_best = true
model = {{ {", ".join(f"{k} = {list(v) if isinstance(v, tuple) else v}" for k, v in (_SHAPE | _SIDES).items())}, prior = {{ depth = 1, heads = 2, width = 16, positions = 4 }} }}
loss = {{ gan_start = 6, gan_every = 2, lpips = 0.0 }}
adversary = {{ hidden = 16, depth = 1, heads = 2 }}
optimizer = {{ name = "muon", lr = 1e-3, warmup = 5 }}
"""


_PUBLISHED = bytes(range(256)) * (1 << 15)  # 8 MiB


@dataclass(frozen=True)
class Job:
    """A program to kill: its command line without the run folder, and the functions that a process of it calls."""

    name: str
    main: Callable[[list[str]], Any]
    options: tuple[str, ...]
    record: Callable[[Callable[[int, Any], None]], None] = lambda note: None
    """Wraps a function of the training so that `note(step, data)` is called for what each step trains on."""
    ranks: int = 1
    save_every: int = 0
    """Steps between checkpoints; 0: it has none, and its files are compared alone."""
    share: int = 1
    """Number of jobs that the kills of a program are divided among."""

    def arguments(self, out: Path) -> list[str]:
        """Return the command line; a run that was begun goes on."""
        begun = self.save_every and (out / "config.json").is_file()
        return [*self.options, "--out", str(out), *(["--resume"] if begun else [])]


def prepare(folder: Path) -> None:
    """Write what the jobs read: a recipe, a tokenizer, a token cache and a base language model."""
    (folder / "tokenizer.toml").write_text(TOKENIZER)
    torch.manual_seed(0)
    shape = TokenizerConfig(**_SHAPE, **_SIDES, init="balanced", prior=PriorConfig(enabled=False))
    LarpTokenizer(shape).save_pretrained(folder / "video-tokenizer")
    tiny_cache(folder / "tokens")
    mllm = tiny_mllm()
    mllm.model.base.save_pretrained(folder / "base")
    mllm.processor.tokenizer.save_pretrained(folder / "base")
    (folder / "published").mkdir()
    (folder / "published/weights.bin").write_bytes(_PUBLISHED)
    write_videos(folder)
    (folder / "prose.txt").write_text("The kettle was on the stove, and the rain kept falling.")


def write_videos(folder: Path) -> None:
    """Write built-in videos as WebDataset shards, `web`, one of them broken, and as a saved data set, `disk`; and records in `chats`."""
    from datasets import Dataset, DatasetDict, Features, Value, Video  # of the extra [text]

    videos = open_videos("shapes:count=30,size=16", "all")
    movies = [item.path.read_bytes() for item in videos.items[:30]]
    movies[13] = b"<html>404</html>"
    for name in ("web", "chats"):
        (folder / name).mkdir()
    for number, item in enumerate(videos.items[:30]):
        key = f"{number:09d}"
        texts = {"txt": item.caption, "cls": videos.classes[item.label], "json": json.dumps({"url": "none"})}
        add_members(folder / f"web/{number // 10:05d}.tar", key, {"mp4": movies[number], **texts})
        if number < 10:
            record = json.dumps({"text": f"{item.caption} <video>", "videos": [f"{key}.mp4"]})
            add_members(folder / f"chats/{number // 5}.tar", key, {"mp4": movies[number], "json": record})
    kinds = {"video": Video(), "caption": Value("string")}
    rows = [
        {"video": {"bytes": m, "path": None}, "caption": i.caption} for m, i in zip(movies, videos.items, strict=False)
    ]
    table = Dataset.from_list(rows, features=Features(kinds))
    DatasetDict({"train": table.select(range(24)), "test": table.select(range(24, 30))}).save_to_disk(folder / "disk")


def add_members(path: Path, key: str, members: dict[str, bytes | str]) -> None:
    """Add KEY.NAME for each member to a tar file."""
    with tarfile.open(path, "a") as tar:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def jobs(folder: Path, url: str) -> dict[str, Job]:
    """Return the jobs by name, for what `prepare` wrote; `url` serves its folder `published`."""
    codec = ("--tokenizer", str(folder / "video-tokenizer"))
    shards = ("--data", f"wds:{folder / 'web'}/{{00000..00002}}.tar")
    tokenizer = ("--recipe", str(folder / "tokenizer.toml"))
    generator = (
        "--task", "class", "--live", *codec, "--steps", "60", "--batch-size", "4", "--workers", "2", "--flips", "--ema", "0.9",
        "--eval-every", "20", "--log-every", "1", "--save-every", str(SAVE_EVERY), "--sampling.clips", "0",
        "--optimizer.warmup", "5", "--optimizer.lr", "1e-3",
    )  # fmt: skip
    mllm = (
        "--base", str(folder / "base"), "--tokens", str(folder / "tokens/cache"), "--eval-text", f"txt:{folder / 'prose.txt'}",
        "--batch-size", "8", "--align.steps", "20", "--joint.steps", "40", "--joint.method", "lora", "--joint.lora-rank", "2",
        "--log-every", "1", "--save-every", str(SAVE_EVERY), "--sampling.videos", "0", "--tasks.own-answers", "0",
    )  # fmt: skip
    rows = [
        Job("tokenizer", train_tokenizer.main, tokenizer, _clips, 1, SAVE_EVERY, 2),
        Job(
            "tokenizer-2-ranks",
            train_tokenizer.main,
            (*tokenizer, "--data", f"hf-disk:{folder / 'disk'}"),
            _clips,
            2,
            SAVE_EVERY,
            2,
        ),
        Job(
            "generator",
            train_generator.main,
            (*generator, "--data", "shapes:count=24,size=16"),
            _codes,
            1,
            SAVE_EVERY,
            2,
        ),
        Job("generator-2-ranks", train_generator.main, (*generator, *shards), _codes, 2, SAVE_EVERY, 2),
        Job("language-model", train_mllm.main, mllm, _sequences, 1, SAVE_EVERY, 2),
        Job(
            "language-model-2-ranks",
            train_mllm.main,
            (*mllm, "--records", f"wds:{folder / 'chats'}"),
            _sequences,
            2,
            SAVE_EVERY,
            2,
        ),
        Job(
            "extraction",
            extract_tokens.main,
            (*codec, *shards, "--split", "train", "--workers", "2", "--batch-size", "1"),
        ),
        Job("fetch", _fetch, ("--url", f"{url}/weights.bin")),
    ]
    return {job.name: job for job in rows}


def _fetch(argv: list[str]) -> None:
    url, out = argv[1], argv[3]
    os.environ["LARP_CACHE"] = out
    file = WeightFile("weights.bin", "LARP_NO_SUCH", url, hashlib.sha256(_PUBLISHED).hexdigest(), "some weights")
    fetch(Source("toy", "a toy", "BSD", (file,), None))


# ------------------------------------------------------------------------------------------------ what a step trains on


def _digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def _clips(note: Callable[[int, Any], None]) -> None:
    own = train_tokenizer.train_micro_batch

    def noted(trainer, batch, quantize):
        note(trainer.clock.step, [_digest(batch["clip"]), batch["index"].tolist()])
        return own(trainer, batch, quantize)

    train_tokenizer.train_micro_batch = noted


def _codes(note: Callable[[int, Any], None]) -> None:
    own = train_generator.micro_batches

    def noted(source, engine, config):
        for codes, condition in own(source, engine, config):
            note(engine.step_count, _digest(codes, condition))
            yield codes, condition

    train_generator.micro_batches = noted


def _sequences(note: Callable[[int, Any], None]) -> None:
    own, steps = train_mllm.loop, []

    def loop(run, log):
        steps[:] = [run]
        return own(run, log)

    train = train_mllm.train_step

    def noted(engine, sequences, *others):
        note(steps[0].step, hashlib.sha256(repr([list(s.ids) for s in sequences]).encode()).hexdigest()[:16])
        return train(engine, sequences, *others)

    train_mllm.loop, train_mllm.train_step = loop, noted


# -------------------------------------------------------------------------------------------------------- what a run leaves


def contents(out: Path) -> dict[str, Any]:
    """Return what a finished run left, by file: tensors, and plain values without times; and what its steps trained on."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_dir() or name.startswith(("tensorboard", "samples", ".lock", "config")) or path.suffix == ".tmp":
            continue
        if path.suffix == ".pt":
            found[name] = torch.load(path, map_location="cpu", weights_only=False)
        elif path.suffix == ".safetensors":
            found[name] = load_file(path)
        elif path.suffix == ".json":
            found[name] = json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            found[name] = [json.loads(line) for line in path.read_text().splitlines()]
        else:
            found[name] = path.read_bytes()
    return found


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """Return the place of the first difference, bit for bit, between two results of `contents`; None without one."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        same = same and one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()
        return None if same else where
    if type(one) is not type(other):
        return f"{where}: {type(one).__name__} and {type(other).__name__}"
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return f"{where}: {sorted(map(str, one.keys() ^ other.keys()))}"
        names = [name for name in one if name not in _OWN]
        return next((text for name in names if (text := difference(one[name], other[name], f"{where}/{name}"))), None)
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return f"{where}: {len(one)} and {len(other)} entries"
        pairs = enumerate(zip(one, other, strict=True))
        return next((text for i, (a, b) in pairs if (text := difference(a, b, f"{where}[{i}]"))), None)
    if hasattr(one, "__dict__") and not isinstance(one, type):
        return difference(vars(one), vars(other), where)
    return None if one == other or (one != one and other != other) else f"{where}: {one!r} and {other!r}"
