"""Token caches of made-up codes, 10^5 to 10^7 rows: time to open, memory, samples a second.

    PYTHONPATH=. python eval/bench/token_scale.py --folder /tmp/scale --out scale.json

Each size is measured in processes of its own, first with none of its files in the memory of the system, as far as the system
lets a program say so. Rows have 64 codes, names and captions of their own; 10^7 of them take 3 GB of disk, and are deleted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # as for the scripts of eval/, which import eval/bench as `bench`

from bench.machine import machine
from bench.timing import in_fresh_process
from larp.data import token_cache as tokens
from larp.data.token_cache import TokenCache, batch_rows
from larp.files import write_json
from larp_mllm.data.dataset import CaptionedVideos, Tasks, TrainingMix
from larp_mllm.model.vocabulary import Vocabulary
from larp_mllm.processing.token_sequence import Layout

import torch

NUM_TOKENS, CODEBOOK, BATCH = 64, 8192, 64
KEY = {"tokenizer": "made up", "num_tokens": NUM_TOKENS, "codebook_size": CODEBOOK, "code_version": 1}
_WORDS = [
    "a",
    "red",
    "blue",
    "small",
    "large",
    "bird",
    "dog",
    "car",
    "runs",
    "flies",
    "turns",
    "near",
    "under",
    "over",
    "the",
    "river",
    "street",
    "house",
    "at",
    "night",
]


def make_cache(folder: Path, rows: int) -> None:
    """Write a cache of so many rows, one for each video, in the shards that an extraction makes."""
    generator = torch.Generator().manual_seed(0)
    tokens.begin_cache(folder, KEY)
    slices = tokens.shard_slices(rows)
    for shard, numbers in enumerate(slices):
        count = len(numbers)
        columns = {
            "codes": torch.randint(CODEBOOK, (count, NUM_TOKENS), generator=generator, dtype=torch.int16),
            "labels": torch.full((count,), -1),
            "videos": torch.arange(numbers.start, numbers.stop),
            "starts": torch.zeros(count, dtype=torch.int64),
            "flipped": torch.zeros(count, dtype=torch.bool),
            "fps": torch.full((count,), 25.0, dtype=torch.float64),
        }
        words = torch.randint(len(_WORDS), (count, 8), generator=generator).tolist()
        videos = [
            [number, f"{shard:05d}.tar/{number:09d}.mp4", f"{' '.join(_WORDS[k] for k in own)} {number}"]
            for number, own in zip(numbers, words, strict=True)
        ]
        path = tokens.shard_path(folder, shard)
        tokens.write_shard(path, columns, videos, [])
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    tokens.finish_cache(folder, KEY, (), "made up", len(slices))


def memory() -> dict[str, float]:
    """Return the memory of this process in MiB: its own, and mapped pages of files, which the system takes back at need."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.strip()}
    return {"own": int(fields["RssAnon"]) / 1024, "mapped": int(fields["RssFile"]) / 1024}


def measure_cache(folder: Path, seconds: float) -> dict[str, Any]:
    """Open a cache, and read batches of its rows in the order of a training for so many seconds, as the generator does."""
    before, report = memory(), {}
    began, used = time.perf_counter(), time.process_time()
    cache = TokenCache.open(folder)
    report["open_seconds"] = time.perf_counter() - began
    report["open_cpu_seconds"] = time.process_time() - used
    report["open_mib"] = _more(before)
    began = time.perf_counter()
    cache, _ = cache.hold_out()
    batch_rows(len(cache), 0, BATCH, 0)
    report["hold_out_and_order_seconds"] = time.perf_counter() - began
    marks, step, used = [time.perf_counter()], 0, time.process_time()
    while marks[-1] - marks[0] < seconds or step < 20:
        cache.take("codes", batch_rows(len(cache), step, BATCH, 0)).long()
        marks.append(time.perf_counter())
        step += 1
    each = sorted(after - at for at, after in pairwise(marks))
    report["first_batches_per_second"] = BATCH * 10 / (marks[10] - marks[0])
    report["samples_per_second"] = BATCH / each[len(each) // 2]
    report["samples_per_cpu_second"] = step * BATCH / (time.process_time() - used)
    report["samples"] = step * BATCH
    report["trained_mib"] = _more(before)
    return report


def measure_language_model(folder: Path, seconds: float) -> dict[str, Any]:
    """Open a cache as data of a language model, check all lengths, and make sequences for so many seconds."""
    before, began, used = memory(), time.perf_counter(), time.process_time()
    layout = Layout(Vocabulary(text_size=256, codebook_size=CODEBOOK, tokens_per_video=NUM_TOKENS), None, 0)
    videos = CaptionedVideos(TokenCache.open(folder), layout, lambda text: list(text.encode()), positions=4096)
    tasks = Tasks(chat=0, continuation=0)
    videos.check_lengths(videos.training_candidates(tasks, 4096))
    report = {"start_seconds": time.perf_counter() - began, "start_cpu_seconds": time.process_time() - used}
    mix, step = TrainingMix(tasks, videos), 0
    mix.batch(0, BATCH, 0)
    began, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds or step < 5:
        step += 1
        mix.batch(step, BATCH, 0)
    report["sequences_per_second"] = step * BATCH / (time.perf_counter() - began)
    report["sequences_per_cpu_second"] = step * BATCH / (time.process_time() - used)
    return report | {"trained_mib": _more(before)}


def _more(before: dict[str, float]) -> dict[str, float]:
    return {name: round(value - before[name], 1) for name, value in memory().items()}


def measure(folder: Path, rows: list[int], seconds: float) -> dict[str, Any]:
    """Make, measure and delete a cache of each number of rows."""
    report: dict[str, Any] = {"machine": machine("cpu"), "num_tokens": NUM_TOKENS, "batch": BATCH, "sizes": {}}
    for count in rows:
        own = folder / str(count)
        try:
            make_cache(own, count)
            found = {
                "shards": len(list(own.glob("shard-*"))),
                "bytes": sum(path.stat().st_size for path in own.iterdir()),
            }
            found["generator"] = in_fresh_process(measure_cache, own, seconds)
            found["again"] = in_fresh_process(measure_cache, own, seconds)
            found["language_model"] = in_fresh_process(measure_language_model, own, seconds)
            report["sizes"][str(count)] = found
            print(count, found, flush=True)
        finally:
            shutil.rmtree(own, ignore_errors=True)
    report["machine"]["load_average_after"] = round(os.getloadavg()[0], 2)
    return report


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the command line and return the record."""
    parser = argparse.ArgumentParser(description="Token caches of many rows: time to open, memory, samples a second.")
    parser.add_argument("--rows", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--seconds", type=float, default=10.0, help="of reading, for each figure")
    parser.add_argument("--folder", type=Path, required=True, help="where the caches are made and deleted")
    parser.add_argument("--out", type=Path, required=True, help="the record")
    config = parser.parse_args(argv)
    report = measure(config.folder, config.rows, config.seconds)
    write_json(config.out, report)
    return report


if __name__ == "__main__":
    main()
