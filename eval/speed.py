"""Speed and memory of the tokenizer and of the language model's loss beside a reference implementation of each:

    python eval/speed.py --out speed.json                          # the paper's size
    python eval/speed.py --size small --what inference             # a recipe's, encode and decode only
    python eval/speed.py --what onnx --threads 1                   # beside onnxruntime (pip install 'larp-mllm[onnx]')
    python eval/speed.py --what head                               # the loss of the language model, see eval/bench/lm_head.py
    python eval/speed.py --device cuda --precision bf16 --compile --batch-size 16

Both implementations must return the same codes, clips and losses before anything is timed. Then they alternate, and each ratio rests
on at least three pairs of laps, in wall time and in CPU time. The floor is the operations that the result needs, divided by the
rate that the machine reaches on matmuls of these shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bench import flops
from bench.lm_head import HeadSize, describe_heads, measure_heads
from bench.machine import describe_machine, machine
from bench.onnx_models import describe_onnx, measure_onnx
from bench.reference import ReferenceTokenizer, reference_discriminator
from bench.timing import (
    MIN_PAIRS,
    Lap,
    alternate,
    describe_ratios,
    in_fresh_process,
    lap,
    matmul_rates,
    peak_memory,
    ratios,
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
WAYS = ("ours", "reference")
# Share of sampled inputs in the prior's second round, after its ramp.
_MIX = 0.5


@dataclass(frozen=True)
class SpeedConfig:
    """Measure how fast a tokenizer encodes, decodes and trains, and the memory that it takes."""

    size: str = "paper"
    """paper (LARP-L), small (64x64), or a recipe of training/train_tokenizer.py, by name or path."""
    what: tuple[Literal["inference", "training", "adversarial", "head", "onnx"], ...] = (
        "inference",
        "training",
        "adversarial",
    )
    """inference: encode and decode; training: a step of tokenizer and prior; adversarial: one of tokenizer, prior and discriminator; head: the loss of the language model; onnx: encode and decode by onnxruntime."""
    out: Path = Path("speed.json")
    """Where the record goes, written again after each kind of measurement."""
    batch_size: int = 1
    """Clips at a time."""
    pairs: int = MIN_PAIRS
    """Laps of each of the two implementations; a lap of training is a step in a fresh process, after one to warm up."""
    threads: int | None = None
    """Of torch on a CPU; by default as many as it takes."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the models run."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of what is timed (autocast); the check of equality is in fp32."""
    compile: bool = False
    """torch.compile our blocks; the reference implementation stays as it is."""
    head: HeadSize = field(default_factory=HeadSize)

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("pairs", MIN_PAIRS), ("threads", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not self.what:
            raise ValueError("what is empty: name inference, training, adversarial, head or onnx")
        if "onnx" in self.what and (self.device, self.precision) != ("cpu", "fp32"):
            raise ValueError("what names onnx, which is compared on a CPU in fp32: take --device cpu --precision fp32")
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
    """Raise ValueError unless both implementations return the same codes and, from these, the same clips; return their differences.

    Two codes may change places where their cosines differ by less than rounding does.
    """
    reference = ReferenceTokenizer(model)
    ours, theirs = model.encode(clips), reference.encode(clips)
    with torch.inference_mode():
        cosines = model.quantizer.similarities(reference.project(clips))
    gap = (cosines.gather(-1, ours[..., None]) - cosines.gather(-1, theirs[..., None])).abs().amax().item()
    error = (model.decode(theirs) - reference.decode(theirs)).abs().amax().item()
    if gap > 1e-5 or not error <= 1e-4:
        raise ValueError(
            f"the two implementations differ: codes by a cosine of {gap:.2g}, clips by {error:.2g}; nothing was timed"
        )
    return {"codes_that_differ": int((ours != theirs).sum()), "largest_difference_of_clips": error}


def inference(subject: Subject) -> dict[str, Any]:
    """Check that both implementations agree, and time encode and decode, alternating."""
    config, model, clips = subject.config, subject.build().eval(), subject.clips()
    agreement = check_equal(model, clips)
    reference = ReferenceTokenizer(model)
    codes = reference.encode(clips)
    if config.compile:
        compile_blocks(model, subject.device)
    works = [lambda: model.encode(clips), lambda: reference.encode(clips)]
    works += [lambda: model.decode(codes), lambda: reference.decode(codes)]
    with subject.autocast():
        alternate(works, 1, subject.device)
        laps = alternate(works, config.pairs, subject.device)
    both = [
        [Lap(*map(sum, zip(*pair, strict=True))) for pair in zip(laps[i], laps[i + 2], strict=True)] for i in (0, 1)
    ]
    counts = [
        [flops.forward_flops(count(subject.model, config.batch_size, pruned)) for pruned in (True, False)]
        for count in (flops.encode_matmuls, flops.decode_matmuls)
    ]
    kinds = {"encode": (laps[:2], counts[0]), "decode": (laps[2:], counts[1])}
    kinds["encode+decode"] = both, [sum(pair) for pair in zip(*counts, strict=True)]
    report: dict[str, Any] = {name: side_by_side(*figures) for name, figures in kinds.items()}
    for way in WAYS:
        report["encode+decode"][way]["peak_memory"] = in_fresh_process(inference_memory, subject, way)
    return {"agreement": agreement, **report}


def inference_memory(subject: Subject, way: str) -> int:
    """Peak memory in bytes of one encode and decode, in a process that does nothing else."""
    model, clips = subject.build().eval(), subject.clips()
    tokenizer = ReferenceTokenizer(model) if way == "reference" else model
    with subject.autocast():
        tokenizer.decode(tokenizer.encode(clips))
    return peak_memory(subject.device)


def side_by_side(laps: list[list[Lap]], counts: list[int]) -> dict[str, Any]:
    """Figures of our laps and those of the reference, with the operations of each, and the ratios of their times."""
    ways = {way: {**summary(own), "flops": count} for way, own, count in zip(WAYS, laps, counts, strict=True)}
    return {**ways, **ratios(*laps)}


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


def train(subject: Subject, adversarial: bool, way: str) -> dict[str, Any]:
    """Measure time and peak memory of a step in a process that does nothing else, after a step without dropout to warm up.

    The loss of the first step is returned as well: without dropout both implementations must give the same.
    """
    model, clips, score = subject.build(), subject.clips(), None
    optimizers = {model: torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.5, 0.9))}
    if adversarial:
        with subject.device:
            discriminator = Discriminator(subject.adversary.discriminator(subject.model))
        optimizers[discriminator] = torch.optim.Adam(discriminator.parameters(), lr=3e-5, betas=(0.5, 0.9))
        score = partial(reference_discriminator, discriminator) if way == "reference" else discriminator
    forward = ReferenceTokenizer(model) if way == "reference" else model
    if subject.config.compile and way == "ours":
        for module in optimizers:
            compile_blocks(module, subject.device)
    loss = step_once(subject, forward, score, {module.eval(): own for module, own in optimizers.items()}, clips)
    for module in optimizers:
        module.train()
    timed = lap(lambda: step_once(subject, forward, score, optimizers, clips), subject.device)
    return {"loss": loss, "lap": timed, "peak_memory": peak_memory(subject.device)}


def training(subject: Subject, adversarial: bool) -> dict[str, Any]:
    """Time training steps of both implementations, in fresh processes that alternate; ValueError if their losses differ."""
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(subject.config.pairs):
        for way in WAYS:
            runs[way].append(in_fresh_process(train, subject, adversarial, way))
        ours, theirs = (runs[way][-1]["loss"] for way in WAYS)
        # A sample at the edge between two codes may fall on either side; bf16 rounds more.
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
    report["memory_is"] = (
        "tensors on the GPU" if device.type == "cuda" else "resident memory of a process that does nothing else"
    )
    for figures in measurements(config, device):
        report |= figures
        report["machine"]["load_average_after"] = machine(device)["load_average"]
        write_json(config.out, report)
    return report


def measurements(config: SpeedConfig, device: torch.device) -> Iterator[dict[str, Any]]:
    """Take one kind of measurement after the other, and yield what each adds to the record."""
    if set(config.what) - {"head", "onnx"}:
        subject = subject_of(config)
        matmuls = [*flops.encode_matmuls(subject.model), *flops.decode_matmuls(subject.model)]
        rates = matmul_rates(matmuls, device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
        about, rate = {"matmul_rates": rates, "model": to_dict(subject.model)}, max(rates.values())
        if "inference" in config.what:
            yield about | with_floors(inference(subject), rate, config.batch_size)
        if "training" in config.what:
            yield about | with_floors({"training step": training(subject, adversarial=False)}, rate, config.batch_size)
        if "adversarial" in config.what:
            yield about | with_floors(
                {"adversarial step": training(subject, adversarial=True)}, rate, config.batch_size
            )
    if "onnx" in config.what:
        subject = subject_of(config)
        figures = measure_onnx(subject.build().eval(), subject.clips(), config.pairs)
        yield {"model": to_dict(subject.model), "onnx": figures}
    if "head" in config.what:
        yield {"head": measure_heads(config.head, config.device, config.precision, config.pairs)}


def with_floors(report: dict[str, Any], rate: float, clips: int) -> dict[str, Any]:
    """Add the floor of each kind, in seconds, and clips per second and share of the matmul rate of both implementations."""
    for kind in kinds_of(report):
        report[kind]["floor_seconds"] = report[kind]["ours"]["flops"] / rate
        for way in WAYS:
            own = report[kind][way]
            own["share_of_rate"] = own["flops"] / own.get("cpu_seconds", own["seconds"]) / rate
            own["clips_per_second"] = clips / own["seconds"]
            own["flops_per_clip"] = own.pop("flops") // clips
    return report


def kinds_of(report: dict[str, Any]) -> list[str]:
    """What a report has times of."""
    return [name for name, value in report.items() if isinstance(value, dict) and "time_ratio" in value]


def describe(report: dict[str, Any]) -> str:
    """Return the figures of a record as a table."""
    lines = [describe_machine(report["machine"])]
    if "matmul_rates" in report:
        torchs, larps = (report["matmul_rates"][name] / 1e9 for name in ("torch", "larp"))
        lines += [
            f"matmuls {torchs:.0f} GFLOP/s by torch, {larps:.0f} by larp",
            f"{'':17} {'':9} {'seconds':>8} {'CPU s':>8} {'clips/s':>8} {'GFLOP/clip':>10} {'of rate':>8} {'GiB':>6}",
        ]
    for kind in kinds_of(report):
        for way in WAYS:
            own = report[kind][way]
            memory = f"{own['peak_memory'] / 2**30:.2f}" if "peak_memory" in own else ""
            lines.append(
                f"{kind:17} {way:9} {own['seconds']:8.3f} {own.get('cpu_seconds', 0):8.3f} {own['clips_per_second']:8.3f} "
                f"{own['flops_per_clip'] / 1e9:10.1f} {own['share_of_rate']:8.1%} {memory:>6}"
            )
        lines.append(f"{'':17} {describe_ratios(report[kind])}, floor {report[kind]['floor_seconds']:.3f} s")
    if "onnx" in report:
        lines += describe_onnx(report["onnx"])
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
