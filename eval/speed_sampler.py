"""Speed of the generator's sampler beside reading its weights once and beside a naive sampler, in one command:

    python eval/speed_sampler.py --size B --out sampler.json

The candidates alternate in one process, with random weights, at several positions of a clip. The figures are ratios of their
medians, in wall time and, on a CPU, in CPU time, which other work on the machine hardly changes. All must sample the same codes
before anything is timed.

Shapes: B clips, R rows (2 B: conditional and unconditional), N codes, K codebook size, P positions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Literal

from bench.machine import machine
from bench.timing import MIN_PAIRS, Lap, alternate
from larp.config import parse, to_dict
from larp.engine.signals import run_script
from larp.files import write_json
from larp.hub import check_device
from larp.kernels.packed_linear import PackedLinear, Weights
from larp.kernels.threads import threads
from larp.metrics.protocols import check_record_path, versions
from larp.models.generator import SIZES, GeneratorConfig, LarpGenerator
from larp.sampling.decoder import BlockWeights, Decoder
from larp.sampling.guidance import apply_guidance
from larp.sampling.options import SamplingOptions, check_guidance_scale
from larp.sampling.sample import row_uniforms, sample_logits

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class SamplerSpeedConfig:
    """Time the sampler of the AR generator beside reading its weights, a naive sampler, and a batch of one."""

    size: str = "B"
    """A size of larp.models.generator.SIZES."""
    num_tokens: int = 1024
    """Codes of a clip."""
    codebook_size: int = 8192
    guidance: float = 1.25
    """Guidance scale; with 1 only the conditional rows run."""
    batch_size: int = 8
    """Clips of the batch that is compared with one clip."""
    positions: int = 4
    """Positions of a clip at which codes are timed: the middles of this many equal parts."""
    steps: int = 4
    """Codes of each lap."""
    repeats: int = 5
    """Laps of each candidate at each position, of which the median counts."""
    check: int = 8
    """Codes that all samplers must agree on first."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the fast sampler's weights and cache; the naive one uses float32, and only float32 must agree with it."""
    weights: Weights = "auto"
    """Layout of the fast sampler's weights, see larp.kernels.packed_linear."""
    out: Path = Path("sampler.json")
    """Where the record goes."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the models run."""

    def __post_init__(self):
        check_device(self.device)
        check_guidance_scale("guidance", self.guidance)
        for name in ("num_tokens", "batch_size", "positions", "steps", "repeats", "check"):
            if getattr(self, name) < (least := MIN_PAIRS if name == "repeats" else 1):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.num_tokens // self.positions < 2 * self.steps or self.check >= self.num_tokens:
            raise ValueError(
                f"num_tokens {self.num_tokens} is too short for {self.positions} positions of {self.steps} steps, "
                f"and {self.check} codes to check: give fewer of them"
            )


class NaiveSampler:
    """Decoding as it is often written: each step copies the cache, and attends to all of it under a mask.

    The published sampler does so too, and also stores the distribution of every code.
    """

    def __init__(self, model: LarpGenerator, rows: int):
        config, like = model.config, model.output.weight
        self.model, self.rows, self.filled = model, rows, 0
        shape = (config.depth, rows, config.heads, config.positions, config.width // config.heads)
        self.keys, self.values = (list(like.new_zeros(shape)) for _ in range(2))
        self.mask = torch.ones(config.positions, config.positions, dtype=torch.bool, device=like.device).tril()
        self.probabilities: list[Tensor] = []

    def prefill(self, condition: Tensor) -> Tensor:
        """Append the condition of each row; return the logits (R, K) of the first code."""
        return self._append(self.model.embed_condition(condition))

    def decode_one(self, codes: Tensor) -> Tensor:
        """Append one more code to each row (R,); return the logits (R, K) of the next."""
        return self._append(self.model.tok_embeddings(codes)[:, None])

    def _append(self, x: Tensor) -> Tensor:
        places = torch.arange(self.filled, self.filled + x.shape[1], device=x.device)
        x = x + self.model.abs_pe[:, places]
        mask = self.mask[places].repeat(self.rows, 1, 1, 1)
        for index, layer in enumerate(self.model.layers):
            rows, length, width = x.shape
            fused = F.linear(layer.attention_norm(x), layer.attention.wqkv.weight)
            query, key, value = fused.view(rows, length, 3, layer.attention.heads, -1).permute(2, 0, 3, 1, 4)
            self.keys[index] = self.keys[index].index_copy(2, places, key)
            self.values[index] = self.values[index].index_copy(2, places, value)
            mixed = F.scaled_dot_product_attention(query, self.keys[index], self.values[index], attn_mask=mask)
            x = x + F.linear(mixed.transpose(1, 2).reshape(rows, length, width), layer.attention.wo.weight)
            normed, inner = layer.ffn_norm(x), layer.feed_forward
            gate, up = F.silu(F.linear(normed, inner.w1.weight)), F.linear(normed, inner.w3.weight)
            x = x + F.linear(gate * up, inner.w2.weight)
        self.filled += length
        logits = F.linear(self.model.norm(x[:, -1]), self.model.output.weight)
        self.probabilities.append(logits.softmax(-1))
        return logits


def random_generator(config: SamplerSpeedConfig) -> LarpGenerator:
    """Return a class-conditional generator with random weights, those of the head included."""
    torch.manual_seed(0)
    shape = GeneratorConfig.of_size(config.size, num_tokens=config.num_tokens, codebook_size=config.codebook_size)
    with torch.device(config.device):
        model = LarpGenerator(shape).eval()
    torch.nn.init.normal_(model.output.weight, std=0.1)
    return model


def read_weights(model: LarpGenerator) -> Callable[[int], None]:
    """Return a function that reads every weight once per code, by a matrix-vector product each."""
    weights = [w for block in model.layers for w in BlockWeights.fused(block, torch.float32)] + [model.output.weight]
    vectors = {width: torch.ones(width, device=weights[0].device) for width in {w.shape[1] for w in weights}}

    def run(codes: int) -> None:
        for _ in range(codes):
            for weight in weights:
                torch.mv(weight, vectors[weight.shape[1]])

    return run


class Candidate:
    """A sampler of some clips that starts at any position."""

    def __init__(self, model: LarpGenerator, sampler: Decoder | NaiveSampler, clips: int, config: SamplerSpeedConfig):
        self.sampler, self.clips, self.guidance = sampler, clips, config.guidance
        labels = torch.arange(clips, device=config.device) % model.config.num_classes
        self.condition = labels
        if config.guidance != 1:
            self.condition = torch.cat([labels, model.unconditional(labels)])
        self.uniforms = row_uniforms(0, 0, clips, config.num_tokens).to(config.device)

    def choose(self, logits: Tensor, index: Tensor, greedy: bool = False) -> Tensor:
        """Sample the codes (B,) of an index (1,) from logits (R, K)."""
        logits = apply_guidance(logits, self.guidance) if self.guidance != 1 else logits
        sampling = SamplingOptions(temperature=float(not greedy))
        return sample_logits(logits, sampling, self.uniforms.index_select(1, index)[:, 0])

    def first_codes(self, count: int) -> Tensor:
        """Return the first `count` codes (B, count), the most probable at each step."""
        index = torch.zeros(1, dtype=torch.int64, device=self.uniforms.device)
        codes = [self.choose(self.sampler.prefill(self.condition), index, greedy=True)]
        copies = len(self.condition) // self.clips
        while len(codes) < count:
            logits = self.sampler.decode_one(codes[-1].repeat(copies))
            codes.append(self.choose(logits, index, greedy=True))
        return torch.stack(codes, dim=1)

    def sample(self, position: int, codes: int) -> None:
        """Sample `codes` codes of each clip from a position on; the cache before it is not computed."""
        self.sampler.filled = position
        if isinstance(self.sampler, Decoder):
            self.sampler.position.fill_(position)
            self.sampler.decode_n(torch.zeros_like(self.uniforms[:, : codes + 1], dtype=torch.int64), self.choose)
            return
        self.sampler.probabilities.clear()
        sampled, copies = self.uniforms.new_zeros(self.clips, dtype=torch.int64), len(self.condition) // self.clips
        for _ in range(codes):
            logits = self.sampler.decode_one(sampled.repeat(copies))
            sampled = self.choose(logits, torch.zeros(1, dtype=torch.int64, device=sampled.device))


def make_candidates(config: SamplerSpeedConfig, model: LarpGenerator) -> dict[str, Candidate]:
    """Return the fast sampler and the naive one, for one clip and for a batch."""
    copies = 1 if config.guidance == 1 else 2
    dtype, made = getattr(torch, config.precision), {}
    for name, clips in (("one", 1), ("batch", config.batch_size)):
        decoder = Decoder(model, copies * clips, weights=config.weights, dtype=dtype)
        # Memory that was never written maps to one page of zeros, which is read faster than a real cache.
        decoder.cache.keys.fill_(0.5)
        decoder.cache.values.fill_(0.5)
        made[name] = Candidate(model, decoder, clips, config)
        made[f"naive_{name}"] = Candidate(model, NaiveSampler(model, copies * clips), clips, config)
    return made


def check_agreement(config: SamplerSpeedConfig, candidates: dict[str, Candidate]) -> None:
    """Raise AssertionError unless all sample the same codes for the first clip."""
    codes = {name: candidate.first_codes(config.check)[:1] for name, candidate in candidates.items()}
    if config.precision == "float32":
        assert torch.equal(codes["one"], codes["naive_one"]), "naive and fast sampler sample different codes"
    assert torch.equal(codes["batch"], codes["one"]), "a clip alone and in a batch has different codes"


@torch.no_grad()
def measure(config: SamplerSpeedConfig) -> dict:
    """Time all candidates at all positions, alternating, and return the figures."""
    model, device = random_generator(config), torch.device(config.device)
    candidates = make_candidates(config, model)
    check_agreement(config, candidates)
    decoder = candidates["one"].sampler
    read, count = read_weights(model), decoder.best_threads()
    part = config.num_tokens // config.positions
    positions = [part * number + part // 2 for number in range(config.positions)]
    laps: dict[str, list[list[Lap]]] = {name: [] for name in ("read", *candidates)}
    with threads(count):
        for position in positions:
            works = [lambda: read(config.steps)]
            works += [
                lambda one=one, position=position: one.sample(position, config.steps) for one in candidates.values()
            ]
            # The first lap of each warms up.
            for own, timed in zip(laps.values(), alternate(works, config.repeats + 1, device), strict=True):
                own.append(timed[1:])
    record = figures(config, laps, "seconds")
    if device.type == "cpu":
        record["by_cpu_time"] = figures(config, laps, "cpu_seconds")
    return record | {
        "positions": positions,
        "threads": count,
        "weights": "packed" if isinstance(decoder.head, PackedLinear) else "plain",
    }


def figures(config: SamplerSpeedConfig, laps: dict[str, list[list[Lap]]], clock: str) -> dict:
    """Return the ratios of the candidates from their laps at each position, by a field of `Lap`."""
    at = {
        name: [1000 * median(getattr(lap, clock) for lap in timed) / config.steps for timed in places]
        for name, places in laps.items()
    }
    mean = {name: fmean(values) for name, values in at.items()}
    minute = {"one": 60_000 / mean["one"] / config.num_tokens}
    minute["batch"] = config.batch_size * 60_000 / mean["batch"] / config.num_tokens
    return {
        "one_over_reading": mean["one"] / mean["read"],
        "naive_over_one": mean["naive_one"] / mean["one"],
        "batch_clips_over_one": minute["batch"] / minute["one"],
        "naive_over_batch": mean["naive_batch"] / mean["batch"],
        "clips_per_minute": minute,
        "milliseconds": mean,
        "milliseconds_at_positions": at,
    }


def evaluate(config: SamplerSpeedConfig) -> dict:
    """Measure as `config` says, write the record, and return it."""
    if config.size not in SIZES:
        raise ValueError(f"--size {config.size} is unknown; the sizes are {', '.join(SIZES)}")
    check_record_path(config.out)
    about = {"machine": machine(torch.device(config.device)), "versions": versions(), "config": to_dict(config)}
    record = measure(config) | about
    write_json(config.out, record)
    return record


def report(record: dict) -> str:
    """Return the figures of a record as a table."""
    config, cpu = record["config"], record.get("by_cpu_time")
    lines = [
        f"size {config['size']}, {config['precision']}, {config['num_tokens']} codes of {config['codebook_size']}, guidance "
        f"{config['guidance']}, {record['threads']} threads, {record['weights']} weights; milliseconds per code",
        *_table(record, config["batch_size"]),
    ]
    if cpu is not None:
        lines += ["the same in CPU time", *_table(cpu, config["batch_size"])]
    for name, values in (cpu or record)["milliseconds_at_positions"].items():
        at = ", ".join(f"{place}: {value:.2f}" for place, value in zip(record["positions"], values, strict=True))
        lines.append(f"  {name} at position {at}")
    return "\n".join(lines)


def _table(record: dict, clips: int) -> list[str]:
    per = record["milliseconds"]
    return [
        f"  reading the weights once {per['read']:8.2f}",
        f"  one clip                 {per['one']:8.2f}  {record['one_over_reading']:.2f} times the reading",
        f"      naively              {per['naive_one']:8.2f}  {record['naive_over_one']:.2f} times that",
        f"  {clips} clips{' ' * (19 - len(str(clips)))}{per['batch']:8.2f}  {record['batch_clips_over_one']:.2f} times the clips "
        f"a minute: {record['clips_per_minute']['batch']:.2f}",
        f"      naively              {per['naive_batch']:8.2f}  {record['naive_over_batch']:.2f} times that",
    ]


def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` (by default the program's own) and return the record; ValueError for mistakes of the user."""
    recipes = Path(__file__).resolve().parent / "recipes"
    config, _ = parse(SamplerSpeedConfig, sys.argv[1:] if argv is None else argv, recipes, "speed_sampler.py")
    record = evaluate(config)
    print(report(record), config.out, sep="\n")
    return record


if __name__ == "__main__":
    run_script("speed_sampler.py", main)
