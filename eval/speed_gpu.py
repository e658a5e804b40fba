"""What a GPU makes of this project in two minutes: what it could do at best, then tokenizers, sampler and language-model loss.

    python eval/speed_gpu.py --out speed.json --minutes 2
    python eval/speed_gpu.py --only sampler loss                # the ceilings of copy and product, and these
    python eval/speed_gpu.py --device cpu --rehearse            # the same code on tiny sizes

Every measurement stands alone and is written down at once. Random data; medians by the GPU's own clock.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from bench import flops
from bench.head_speed import HeadCase, plain_loss
from bench.measurements import Measurements, between, busiest, copy_rate, finish, mark, matmul_rate, seconds_of
from bench.sampler_speed import fused_sampler, samplers
from bench.speed_sizes import Sizes
from bench.timing import machine
from larp.config import parse, to_dict
from larp.engine.optimizer import OptimizerConfig, build_optimizer
from larp.engine.signals import run_script
from larp.models.layers import compile_blocks
from larp.models.noise import BatchNoise
from larp.models.objective import LossConfig, tokenizer_loss
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Dense bf16 of an H100 SXM, as its maker states it.
NOMINAL = 989e12
# Of the prior's inputs in round 2: its value after the ramp.
_MIX = 0.5
_LOSS = LossConfig(lpips=0, gan=0)

Group = Literal["attention", "larp-l", "box", "sampler", "loss", "fused", "compiled", "engine"]


@dataclass(frozen=True)
class SpeedGpuConfig:
    """Measure a GPU, and what tokenizers, sampler and the language model's loss reach of it."""

    out: Path = Path("speed.json")
    """Where the figures go, after each measurement."""
    minutes: float = 2.0
    """What does not fit into this time is skipped, and noted."""
    only: tuple[Group, ...] = get_args(Group)
    """What is measured beside copy and product, of which the rest are shares."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    rehearse: bool = False
    """Tiny sizes: the same code where no GPU is."""

    def __post_init__(self):
        if not self.minutes > 0:
            raise ValueError(f"minutes is {self.minutes}; it must be positive")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(
                f"--device {self.device}: there is no GPU that torch can use; take --device cpu --rehearse"
            )


# ------------------------------------------------------------------------------------------------------------- ceilings


def attention_rate(sizes: Sizes, backend: SDPBackend, device: torch.device) -> dict[str, Any]:
    """Operations a second of LARP-L's attention, forward and backward, by one of torch's kernels for it."""
    c, batch = sizes.large, sizes.large_batches[0]
    length = c.num_tokens + math.prod(c.grid(c.patch_size))
    shape = (3, batch, c.encoder_heads, length, c.encoder_width // c.encoder_heads)
    inputs = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(shape[1:], device=device, dtype=torch.bfloat16)
    with sdpa_kernel(backend):
        seconds = seconds_of(
            lambda: F.scaled_dot_product_attention(*inputs).backward(upstream), device, sizes.seconds / 2
        )
    # Two products forward, and five backward, one of which is the first again.
    return {"milliseconds": 1000 * seconds, "operations_a_second": 7 * 2 * math.prod(shape[1:]) * length / seconds}


# ----------------------------------------------------------------------------------------------------------- tokenizers


def build(config: TokenizerConfig, device: torch.device) -> LarpTokenizer:
    """A tokenizer with random weights, whose head is not zero."""
    torch.manual_seed(0)
    with device:
        model = LarpTokenizer(config)
        torch.nn.init.normal_(model.head.weight, std=0.02)
    return model


def clips_of(config: TokenizerConfig, batch: int, device: torch.device) -> Tensor:
    """Random clips (B, 3, T, H, W)."""
    return torch.rand(batch, 3, *config.clip_shape, device=device)


def inference(config: TokenizerConfig, batch: int, rate: float, budget: float, device: torch.device) -> dict[str, Any]:
    """Encode and decode in bf16."""
    model, clips = build(config, device).eval(), clips_of(config, batch, device)
    figures: dict[str, Any] = {"batch": batch}
    with torch.autocast(device.type, torch.bfloat16):
        codes = model.encode(clips)
        works = {"encode": (lambda: model.encode(clips), flops.encode_products)}
        works["decode"] = lambda: model.decode(codes), flops.decode_products
        for name, (work, products) in works.items():
            seconds = seconds_of(work, device, budget / 2)
            figures[name] = shares(flops.forward_flops(products(config, batch)), seconds, batch, rate)
    return figures


def shares(operations: int, seconds: float, batch: int, rate: float) -> dict[str, float]:
    """Clips a second, and operations a second as shares of the measured and of the stated rate of products."""
    used = operations / seconds
    rates = {"clips_a_second": batch / seconds, "mfu": used / rate, "mfu_of_nominal": used / NOMINAL}
    return {"milliseconds": 1000 * seconds, **rates}


class Trainer:
    """Training steps of a tokenizer as training/train_tokenizer.py makes them, without the engine: bf16 autocast, AdamW."""

    def __init__(self, config: TokenizerConfig, batch: int, device: torch.device, compiled: bool):
        self.config, self.batch, self.device = config, batch, device
        self.model, self.clips = build(config, device), clips_of(config, batch, device)
        self.optimizer = build_optimizer(self.model, OptimizerConfig())
        self.steps, self.marks, self.marking = 0, {}, False
        if compiled:
            compile_blocks(self.model, device)
        for name in ("quantizer", "prior"):
            part = getattr(self.model, name)
            part.register_forward_pre_hook(lambda *_, name=name: self._mark(name))
            part.register_forward_hook(lambda *_, name=name: self._mark(f"{name} end"))

    def _mark(self, name: str) -> None:
        if self.marking:
            self.marks[name] = mark(self.device)

    def step(self) -> None:
        """One step: forward, backward, optimizer."""
        self._mark("forward")
        self.steps += 1
        noise = BatchNoise(0, self.steps, self.batch, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            out = self.model(self.clips, noise, _MIX)
        loss, _ = tokenizer_loss(_LOSS, self.clips, out)
        self._mark("backward")
        loss.backward()
        self._mark("optimizer")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._mark("end")

    def parts(self) -> dict[str, float]:
        """Shares of the time of one step: forward but for quantizer and prior, these two, backward, optimizer."""
        self.marking = True
        self.step()
        finish(self.device)
        self.marking = False
        at = self.marks
        parts = {name: between(at[name], at[f"{name} end"]) for name in ("quantizer", "prior")}
        parts["forward"] = between(at["forward"], at["backward"]) - sum(parts.values())
        parts["backward"] = between(at["backward"], at["optimizer"])
        parts["optimizer"] = between(at["optimizer"], at["end"])
        return {name: round(seconds / between(at["forward"], at["end"]), 4) for name, seconds in parts.items()}


def training(
    config: TokenizerConfig,
    batch: int,
    rate: float,
    budget: float,
    device: torch.device,
    compiled: bool = False,
    kernels: bool = False,
) -> dict[str, Any]:
    """A training step; with the shares of its parts, and with its busiest kernels if so asked."""
    trainer = Trainer(config, batch, device, compiled)
    figures: dict[str, Any] = {"batch": batch, "compiled": compiled}
    if compiled:
        began = time.monotonic()
        trainer.step()
        finish(device)
        figures["seconds_to_compile"] = time.monotonic() - began
    seconds = seconds_of(trainer.step, device, budget)
    figures |= shares(flops.step_flops(config, clips=batch), seconds, batch, rate)
    figures["parts"] = trainer.parts()
    if kernels:
        figures["kernels"] = busiest(trainer.step, device)
    return figures


def engine_training(config: TokenizerConfig, batch: int, rate: float, budget: float) -> dict[str, Any]:
    """The same step through larp.engine, as trainings run: DeepSpeed, clipping, the check for finite gradients."""
    from larp.engine.backend import EngineConfig, make_engine, start
    from larp.engine.backend import finish as leave

    ranks = start(seed=0)
    try:
        model = build(config, ranks.device)
        optimizer = build_optimizer(model, OptimizerConfig())
        engine = make_engine(model, optimizer, lambda step: 1.0, EngineConfig(precision="bf16"), batch, ranks)
        clips, steps = clips_of(config, batch, ranks.device), iter(range(1 << 30))

        def step() -> None:
            out = engine(clips, BatchNoise(0, next(steps), batch, device=ranks.device), _MIX)
            engine.backward(tokenizer_loss(_LOSS, clips, out)[0])
            engine.step()

        seconds = seconds_of(step, ranks.device, budget)
    finally:
        leave()
    return {"batch": batch, **shares(flops.step_flops(config, clips=batch), seconds, batch, rate)}


def sweep(
    take: Measurements, name: str, config: TokenizerConfig, batches: tuple[int, ...], rate: float, budget: float
) -> None:
    """Training steps at rising batches until memory ends, and the kernels of the fastest."""
    best = batches[0], 0.0
    for batch in batches:
        figures = take.take(f"{name} step, batch {batch}", partial(training, config, batch, rate, budget, take.device))
        if "milliseconds" not in figures:
            break
        best = max(best, (batch, figures["clips_a_second"]), key=lambda one: one[1])
    work = partial(training, config, best[0], rate, 0.2, take.device, kernels=True)
    take.take(f"{name} step, batch {best[0]}, kernels", work)


def compiled(take: Measurements, sizes: Sizes, rate: float, needs: float) -> None:
    """Training steps with compiled blocks, each with the seconds that its first step took."""
    cases = [("box", sizes.box, batch) for batch in sizes.box_compiled]
    cases += [("LARP-L", sizes.large, batch) for batch in sizes.large_compiled]
    for name, size, batch in cases:
        work = partial(training, size, batch, rate, sizes.seconds, take.device, compiled=True, kernels=True)
        take.take(f"{name} step, batch {batch}, compiled", work, needs=needs)
        # What one shape has compiled says nothing of the next one's time.
        torch.compiler.reset()


# ----------------------------------------------------------------------------------------------- loss of language model


def head_loss(sizes: Sizes, batch: str, trained: bool, plain: bool, device: torch.device) -> dict[str, Any]:
    """Forward and backward of the language model's loss, in bf16; `memory` beyond what was held before."""
    case = HeadCase(sizes.head, batch, trained, str(device), "bf16")
    model = case.build()
    hidden, labels = case.inputs(model)

    def work() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            if plain:
                loss = plain_loss(model, hidden, labels)
            else:
                loss = model(inputs_embeds=hidden, labels=labels, head_chunk=sizes.head.chunk).loss
        loss.backward()
        for tensor in (hidden, *model.parameters()):
            tensor.grad = None

    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    seconds = seconds_of(work, device, sizes.seconds)
    figures: dict[str, Any] = {"milliseconds": 1000 * seconds}
    if device.type == "cuda":
        figures["memory"] = torch.cuda.max_memory_allocated(device) - held
    return figures


def losses(take: Measurements, sizes: Sizes) -> None:
    """The loss of a mixed batch and of text only, the base frozen and trained, in chunks and the plain way."""
    for batch in ("mixed", "text only"):
        for trained in (False, True):
            for plain in (False, True):
                name = f"loss, {batch}, {'trained' if trained else 'frozen'}, {'plain' if plain else 'in chunks'}"
                take.take(name, partial(head_loss, sizes, batch, trained, plain, take.device))


# --------------------------------------------------------------------------------------------------------------- report


def measure(config: SpeedGpuConfig) -> dict[str, Any]:
    """Take all measurements that fit into the time; returns the record."""
    device, only = torch.device(config.device), config.only
    sizes = Sizes.tiny() if config.rehearse else Sizes()
    about = {"config": to_dict(config), "sizes": to_dict(sizes), "machine": machine(device)}
    about["precision"] = "bf16 autocast with float32 weights; float32 products exact (no TF32), as in training"
    take = Measurements(config.out, device, 60 * config.minutes, about)
    copied = take.take("copy", partial(copy_rate, sizes.copy_bytes, sizes.seconds, device))
    multiplied = take.take("matmul", partial(matmul_rate, sizes.matmul, sizes.seconds, device))
    # Where a ceiling could not be measured, what the maker states stands for it.
    copy, rate = copied.get("bytes_a_second", 3.35e12), multiplied.get("operations_a_second", NOMINAL)
    if "attention" in only:
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            if device.type == "cuda" or name == "flash":
                take.take(f"attention, {name}", partial(attention_rate, sizes, backend, device))
    if "larp-l" in only:
        for batch in sizes.large_inference:
            work = partial(inference, sizes.large, batch, rate, sizes.seconds, device)
            take.take(f"LARP-L encode, decode, batch {batch}", work)
        sweep(take, "LARP-L", sizes.large, sizes.large_batches, rate, sizes.seconds)
    if "box" in only:
        sweep(take, "box", sizes.box, sizes.box_batches, rate, sizes.seconds)
    if "sampler" in only:
        samplers(take, sizes.generator, sizes.sampler_clips, copy, sizes.seconds)
    if "loss" in only:
        losses(take, sizes)
    if "fused" in only:
        fused_sampler(take, sizes.generator, copy, sizes.seconds)
    # What needs a compiler, and then DeepSpeed, comes last: nobody knows how long these take on a machine at first.
    if "compiled" in only:
        compiled(take, sizes, rate, 5 if config.rehearse else 30)
    if "engine" in only:
        batch = sizes.box_batches[-1]
        work = partial(engine_training, sizes.box, batch, rate, sizes.seconds)
        take.take(f"box step, batch {batch}, engine", work, needs=10)
    return take.record


def table(record: dict[str, Any]) -> list[str]:
    """The figures as short lines for a person."""
    return [f"{name:42} {_line(figures)}" for name, figures in record["measurements"].items()]


def _line(figures: dict[str, Any]) -> str:
    for name in ("error", "skipped"):
        if name in figures:
            return f"{name}: {figures[name].splitlines()[0][:110]}"
    words = [text(figures[name]) for name, text in _WORDS.items() if name in figures]
    words += [f"{name}: {_line(figures[name])}" for name in ("encode", "decode") if name in figures]
    if "parts" in figures:
        words.append(" ".join(f"{name} {share:.0%}" for name, share in figures["parts"].items()))
    return ", ".join(words)


_WORDS: dict[str, Callable[[Any], str]] = {
    "bytes_a_second": lambda v: f"{v / 1e9:.0f} GB/s",
    "operations_a_second": lambda v: f"{v / 1e12:.1f} TFLOP/s",
    "milliseconds": lambda v: f"{v:.2f} ms",
    "clips_a_second": lambda v: f"{v:.0f} clips/s",
    "mfu": lambda v: f"MFU {v:.1%}",
    "mfu_of_nominal": lambda v: f"({v:.1%} of 989)",
    "milliseconds_a_code": lambda v: f"{v:.3f} ms a code",
    "seconds_a_clip": lambda v: f"{v:.2f} s a clip",
    "seconds_of_a_whole_clip": lambda v: f"({v:.2f} s measured whole)",
    "share_of_copy": lambda v: f"{v:.0%} of the copy's rate",
    "seconds_to_compile": lambda v: f"compiled in {v:.0f} s",
    "memory": lambda v: f"+{v / 2**30:.2f} GiB",
    "peak_memory": lambda v: f"{v / 2**30:.1f} GiB",
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the command line `argv` (by default the program's own) and return the record; ValueError for mistakes of the user."""
    recipes = Path(__file__).resolve().parent / "recipes"
    config, _ = parse(SpeedGpuConfig, sys.argv[1:] if argv is None else argv, recipes, "speed_gpu.py")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    # A rehearsal does not wait for a compiler: blocks that are to be compiled run as they are.
    with torch.compiler.set_stance("force_eager" if config.rehearse else "default"):
        record = measure(config)
    print(*table(record), sep="\n")
    return record


if __name__ == "__main__":
    run_script("speed_gpu.py", main)
