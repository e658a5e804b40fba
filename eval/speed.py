"""Speed and memory of the tokenizer, and of the language model's head, beside straightforward implementations of the
same mathematics, in one run:

    python eval/speed.py --out speed.json                          # the paper's size
    python eval/speed.py --size small --what inference             # a recipe's, encode and decode only
    python eval/speed.py --what head                               # the loss of the language model, see eval/bench/head_speed.py
    python eval/speed.py --device cuda --precision bf16 --compile --batch-size 16

The two are checked to give the same codes, clips and losses before anything is timed, and then take turns. The floor is the operations
that the result needs over the machine's own rate for products of these shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench import flops
from bench.head_speed import HeadSize, describe_heads, measure_heads
from bench.reference import ReferenceTokenizer, judge
from bench.timing import (
    Lap,
    in_fresh_process,
    in_turn,
    lap,
    machine,
    multiply_rates,
    peak_memory,
    ratio,
    summary,
)
from larp.config import from_dict, load_recipe, parse, to_dict
from larp.engine.adversary import AdversaryConfig
from larp.engine.signals import run_script
from larp.files import write_json
from larp.metrics.protocols import check_record_path
from larp.models.discriminator import Discriminator
from larp.models.layers import compile_blocks
from larp.models.losses import discriminator_loss, generator_loss
from larp.models.noise import BatchNoise
from larp.models.objective import LossConfig, tokenizer_loss
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig

import torch
from torch import Tensor

RECIPES = Path(__file__).resolve().parents[1] / "training" / "recipes"
SIZES = {"paper": "larp-l-long", "small": "tokenizer-ucf64"}
WAYS = ("ours", "straightforward")
# Of the prior's inputs in round 2: its value after the ramp.
_MIX = 0.5


@dataclass(frozen=True)
class SpeedConfig:
    """Measure how fast a tokenizer encodes, decodes and trains, and the memory that it takes."""

    size: str = "paper"
    """paper (LARP-L), small (64x64), or a recipe of training/train_tokenizer.py, by name or path."""
    what: tuple[Literal["inference", "training", "adversarial", "head"], ...] = ("inference", "training", "adversarial")
    """inference: encode and decode; training: a step of tokenizer and prior; adversarial: one with the discriminator, which learns; head: the loss of the language model."""
    out: Path = Path("speed.json")
    """Where the figures go."""
    batch_size: int = 1
    """Clips at a time."""
    repeats: int = 5
    """Laps of encode and decode for each of the two, after one to warm up."""
    rounds: int = 2
    """Fresh processes for each kind of training step and each of the two, one step after one to warm up in each."""
    threads: int | None = None
    """Of torch on a CPU; by default as many as it takes."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the models run."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of what is timed (autocast); the check of equality is in fp32."""
    compile: bool = False
    """torch.compile our blocks; the straightforward implementation stays as it is."""
    head: HeadSize = field(default_factory=HeadSize)

    def __post_init__(self):
        for name in ("batch_size", "repeats", "rounds", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.what:
            raise ValueError("what is empty: name inference, training, adversarial or head")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device {self.device}: there is no GPU that torch can use here; take --device cpu")


@dataclass(frozen=True)
class Subject:
    """What is measured, and how: all that a fresh process needs to know."""

    model: TokenizerConfig
    adversary: AdversaryConfig
    loss: LossConfig
    config: SpeedConfig

    @property
    def device(self) -> torch.device:
        return torch.device(self.config.device)

    def autocast(self) -> torch.autocast:
        """The precision of what is timed."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def build(self) -> LarpTokenizer:
        """A tokenizer with random weights, the same each time, whose head is not zero."""
        torch.manual_seed(0)
        with self.device:
            model = LarpTokenizer(self.model)
            torch.nn.init.normal_(model.head.weight, std=0.02)
        return model

    def clips(self) -> Tensor:
        """Random clips (B, 3, T, H, W), the same each time."""
        generator = torch.Generator().manual_seed(1)
        return torch.rand(self.config.batch_size, 3, *self.model.clip_shape, generator=generator).to(self.device)


def subject_of(config: SpeedConfig) -> Subject:
    """Read the recipe that `config.size` names."""
    name = SIZES.get(config.size, config.size)
    recipe = load_recipe(name, RECIPES)
    groups = (("model", TokenizerConfig), ("adversary", AdversaryConfig), ("loss", LossConfig))
    return Subject(*(from_dict(kind, recipe.get(group, {}), str(name)) for group, kind in groups), config)


# ------------------------------------------------------------------------------------------------------------ inference


def check_equal(model: LarpTokenizer, clips: Tensor) -> dict[str, float]:
    """Raise ValueError unless both ways give the same codes and, from these, the same clips; return how near they are.

    Two codes may change places where their cosines differ by less than rounding does.
    """
    plain = ReferenceTokenizer(model)
    ours, theirs = model.encode(clips), plain.encode(clips)
    with torch.inference_mode():
        cosines = model.quantizer.similarities(plain.project(clips))
    gap = (cosines.gather(-1, ours[..., None]) - cosines.gather(-1, theirs[..., None])).abs().amax().item()
    error = (model.decode(theirs) - plain.decode(theirs)).abs().amax().item()
    if gap > 1e-5 or not error <= 1e-4:
        raise ValueError(
            f"the two implementations differ: codes by a cosine of {gap:.2g}, clips by {error:.2g}; nothing was timed"
        )
    return {"codes_that_differ": int((ours != theirs).sum()), "largest_difference_of_clips": error}


def inference(subject: Subject) -> dict[str, Any]:
    """Check that the two ways agree, and time encode and decode in turn."""
    config, model, clips = subject.config, subject.build().eval(), subject.clips()
    agreement = check_equal(model, clips)
    plain = ReferenceTokenizer(model)
    codes = plain.encode(clips)
    if config.compile:
        compile_blocks(model, subject.device)
    works = [lambda: model.encode(clips), lambda: plain.encode(clips)]
    works += [lambda: model.decode(codes), lambda: plain.decode(codes)]
    with subject.autocast():
        in_turn(works, 1, subject.device)
        laps = in_turn(works, config.repeats, subject.device)
    both = [
        [Lap(*map(sum, zip(*pair, strict=True))) for pair in zip(laps[i], laps[i + 2], strict=True)] for i in (0, 1)
    ]
    counts = [
        [flops.forward_flops(count(subject.model, config.batch_size, pruned)) for pruned in (True, False)]
        for count in (flops.encode_products, flops.decode_products)
    ]
    kinds = {"encode": (laps[:2], counts[0]), "decode": (laps[2:], counts[1])}
    kinds["encode+decode"] = both, [sum(pair) for pair in zip(*counts, strict=True)]
    report: dict[str, Any] = {name: side_by_side(*figures) for name, figures in kinds.items()}
    for index, way in enumerate(WAYS):
        report["encode+decode"][way]["peak_memory"] = in_fresh_process(inference_memory, subject, bool(index))
    return {"agreement": agreement, **report}


def inference_memory(subject: Subject, straightforward: bool) -> int:
    """Peak memory in bytes of one encode and decode, in a process that does nothing else."""
    model, clips = subject.build().eval(), subject.clips()
    way = ReferenceTokenizer(model) if straightforward else model
    with subject.autocast():
        way.decode(way.encode(clips))
    return peak_memory(subject.device)


def side_by_side(laps: list[list[Lap]], counts: list[int]) -> dict[str, Any]:
    """Figures of our laps and the straightforward ones, with the operations of each, and the ratio of their times."""
    ways = {way: {**summary(own), "flops": count} for way, own, count in zip(WAYS, laps, counts, strict=True)}
    return {**ways, "time_ratio": ratio(*laps)}


# ------------------------------------------------------------------------------------------------------------- training


def step_once(
    subject: Subject,
    forward: Callable[..., Any],
    score: Callable[[Tensor], Tensor] | None,
    optimizers: dict[torch.nn.Module, torch.optim.Optimizer],
    clips: Tensor,
) -> float:
    """One training step as training/train_tokenizer.py makes it, without the engine; return the tokenizer's loss.

    `forward` is of the tokenizer, `score` of the discriminator; `optimizers` of both modules, the tokenizer first.
    """
    model, *rest = optimizers
    noise = BatchNoise(0, 0, len(clips), device=subject.device)
    with subject.autocast():
        out = forward(clips, noise, _MIX)
    loss, _ = tokenizer_loss(subject.loss, clips, out)
    if score is not None:
        rest[0].requires_grad_(False)
        with subject.autocast():
            loss = loss + subject.loss.gan * generator_loss(score(out.reconstruction))
        rest[0].requires_grad_(True)
    loss.backward()
    _apply(optimizers[model])
    if score is not None:
        with subject.autocast():
            real, fake = score(torch.cat([clips, out.reconstruction.detach()])).chunk(2)
        discriminator_loss(real, fake, noise).backward()
        _apply(optimizers[rest[0]])
    return loss.item()


def train(subject: Subject, adversarial: bool, straightforward: bool) -> dict[str, Any]:
    """Time a step and its peak memory in a process that does nothing else, after one step without dropout to warm up.

    That one's loss is returned as well: without dropout it is a number to compare.
    """
    model, clips, score = subject.build(), subject.clips(), None
    optimizers = {model: torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.5, 0.9))}
    if adversarial:
        with subject.device:
            discriminator = Discriminator(subject.adversary.discriminator(subject.model))
        optimizers[discriminator] = torch.optim.Adam(discriminator.parameters(), lr=3e-5, betas=(0.5, 0.9))
        score = (lambda clip: judge(discriminator, clip)) if straightforward else discriminator
    forward = ReferenceTokenizer(model) if straightforward else model
    if subject.config.compile and not straightforward:
        for module in optimizers:
            compile_blocks(module, subject.device)
    loss = step_once(subject, forward, score, {module.eval(): own for module, own in optimizers.items()}, clips)
    for module in optimizers:
        module.train()
    timed = lap(lambda: step_once(subject, forward, score, optimizers, clips), subject.device)
    return {"loss": loss, "lap": timed, "peak_memory": peak_memory(subject.device)}


def training(subject: Subject, adversarial: bool) -> dict[str, Any]:
    """Time training steps of both ways, in fresh processes that take turns."""
    # Before any figure is taken, in fp32: a step of each must give the same loss.
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(subject.config.rounds):
        for way in WAYS:
            runs[way].append(in_fresh_process(train, subject, adversarial, way == WAYS[1]))
        ours, theirs = (runs[way][-1]["loss"] for way in WAYS)
        # A sample at the edge between two codes may fall on either side; 16 bits round more.
        if abs(ours / theirs - 1) > (1e-3 if subject.config.precision == "fp32" else 3e-2):
            raise ValueError(f"the two implementations differ: their training losses are {ours} and {theirs}")
    adversary = subject.adversary.discriminator(subject.model) if adversarial else None
    counts = [flops.step_flops(subject.model, adversary, subject.config.batch_size, pruned) for pruned in (True, False)]
    report = side_by_side([[run["lap"] for run in runs[way]] for way in WAYS], counts)
    for way in WAYS:
        report[way]["peak_memory"] = max(run["peak_memory"] for run in runs[way])
        report[way]["loss"] = runs[way][0]["loss"]
    report["memory_ratio"] = report[WAYS[0]]["peak_memory"] / report[WAYS[1]]["peak_memory"]
    return report


def _apply(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# --------------------------------------------------------------------------------------------------------------- report


def measure(config: SpeedConfig) -> dict[str, Any]:
    """Measure what `config` says, write the record, and return it."""
    check_record_path(config.out)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    report: dict[str, Any] = {"machine": machine(device), "config": to_dict(config)}
    if set(config.what) != {"head"}:
        report |= of_tokenizer(subject_of(config))
    if "head" in config.what:
        report["head"] = measure_heads(config.head, config.device, config.precision, config.rounds)
    report["machine"]["load_average_after"] = machine(device)["load_average"]
    report["memory_is"] = (
        "tensors on the GPU" if device.type == "cuda" else "resident memory of a process that does nothing else"
    )
    write_json(config.out, report)
    return report


def of_tokenizer(subject: Subject) -> dict[str, Any]:
    """The figures of encoding, decoding and training, with the floor of each."""
    config = subject.config
    products = [*flops.encode_products(subject.model), *flops.decode_products(subject.model)]
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    rates = multiply_rates(products, subject.device, dtype)
    report: dict[str, Any] = {"multiply_rates": rates, "model": to_dict(subject.model)}
    if "inference" in config.what:
        report |= inference(subject)
    if "training" in config.what:
        report["training step"] = training(subject, adversarial=False)
    if "adversarial" in config.what:
        report["adversarial step"] = training(subject, adversarial=True)
    for kind in kinds_of(report):
        floor = report[kind][WAYS[0]]["flops"] / max(rates.values())
        report[kind]["floor_seconds"] = floor
        for way in WAYS:
            own = report[kind][way]
            own["clips_per_second"] = config.batch_size / own["seconds"]
            own["flops_per_clip"] = own.pop("flops") // config.batch_size
            own["share_of_rate"] = own["flops_per_clip"] * own["clips_per_second"] / max(rates.values())
    return report


def kinds_of(report: dict[str, Any]) -> list[str]:
    """What a report has times of."""
    return [name for name, value in report.items() if isinstance(value, dict) and "time_ratio" in value]


def describe(report: dict[str, Any]) -> str:
    """The figures of a report as a table for a person."""
    on = report["machine"]
    lines = [
        f"{on['device']}, {on['threads']} threads, load average {on['load_average']} to {on['load_average_after']}"
    ]
    if "multiply_rates" in report:
        torchs, larps = (report["multiply_rates"][name] / 1e9 for name in ("torch", "larp"))
        lines += [
            f"products {torchs:.0f} GFLOP/s by torch's way, {larps:.0f} by larp's",
            f"{'':17} {'way':16} {'seconds':>9} {'clips/s':>8} {'GFLOP/clip':>10} {'of rate':>8} {'GiB':>6}",
        ]
    for kind in kinds_of(report):
        for way in WAYS:
            own = report[kind][way]
            memory = f"{own['peak_memory'] / 2**30:.2f}" if "peak_memory" in own else ""
            lines.append(
                f"{kind:17} {way:16} {own['seconds']:9.3f} {own['clips_per_second']:8.3f} {own['flops_per_clip'] / 1e9:10.1f} "
                f"{own['share_of_rate']:8.1%} {memory:>6}"
            )
        spread = report[kind]["time_ratio"]
        lines.append(
            f"{'':17} time ratio {spread['median']:.3f} ({spread['lowest']:.3f} to {spread['highest']:.3f}), "
            f"floor {report[kind]['floor_seconds']:.3f} s"
        )
    if "head" in report:
        lines += describe_heads(report["head"])
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the command line `argv` (by default the program's own) and return the record; ValueError for mistakes of the user."""
    config, _ = parse(SpeedConfig, sys.argv[1:] if argv is None else argv, RECIPES, "speed.py")
    report = measure(config)
    print(describe(report))
    print(config.out)
    return report


if __name__ == "__main__":
    run_script("speed.py", main)
