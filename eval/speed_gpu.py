"""Speed of tokenizers, sampler and the language model's loss on a GPU, beside the bandwidth and matmul rate that it reaches:

    python eval/speed_gpu.py --out speed.json --minutes 2
    python eval/speed_gpu.py --only sampler loss                # the ceilings of copy and matmul, and these
    python eval/speed_gpu.py --device cpu --rehearse            # the same code on tiny sizes

Each measurement fails or succeeds by itself, and the record is written after each. Data are random, and times are medians of CUDA
events.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from bench.gpu_sampler import fused_sampler, samplers
from bench.gpu_tokenizer import NOMINAL, engine_training, inference, training
from bench.lm_head import HeadCase, HeadSize, reference_loss
from bench.machine import machine
from bench.measurements import Measurements, copy_rate, matmul_rate, seconds_of
from larp.config import parse, to_dict
from larp.engine.signals import run_script
from larp.models.generator import GeneratorConfig
from larp.models.prior import PriorConfig
from larp.models.tokenizer_config import TokenizerConfig

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Group = Literal["attention", "larp-l", "box", "sampler", "loss", "fused", "compiled", "engine"]


def box_tokenizer() -> TokenizerConfig:
    """Return the tokenizer of the recipes `tokenizer-box-*`: 64x64, 256 codes of 8192."""
    prior = PriorConfig(depth=4, heads=3, width=192, positions=256)
    sides = dict(
        encoder_width=256, encoder_depth=6, encoder_heads=4, decoder_width=256, decoder_depth=8, decoder_heads=4
    )
    return TokenizerConfig(height=64, width=64, num_tokens=256, code_dim=8, prior=prior, **sides)


@dataclass(frozen=True)
class Sizes:
    """Models and batch sizes that are measured."""

    copy_bytes: int = 2 * 10**9
    matmul: int = 8192
    large: TokenizerConfig = field(default_factory=TokenizerConfig)
    large_inference: tuple[int, ...] = (1, 32)
    large_batches: tuple[int, ...] = (8, 16, 32, 64)
    large_compiled: tuple[int, ...] = (32,)
    box: TokenizerConfig = field(default_factory=box_tokenizer)
    box_batches: tuple[int, ...] = (64, 128, 256, 512)
    box_compiled: tuple[int, ...] = (256, 128, 512)
    generator: GeneratorConfig = field(default_factory=lambda: GeneratorConfig.of_size("LP"))
    sampler_clips: tuple[int, ...] = (1, 8, 64)
    head: HeadSize = field(default_factory=HeadSize)
    seconds: float = 1.0
    """Time budget of one measurement."""

    @classmethod
    def tiny(cls) -> Sizes:
        """Return sizes that take a few seconds on a CPU."""
        sides = {f"{side}_{name}": value for side in ("encoder", "decoder")
                 for name, value in (("width", 16), ("depth", 2), ("heads", 2))}  # fmt: skip
        prior = PriorConfig(depth=1, heads=2, width=16, positions=8)
        model = TokenizerConfig(4, 16, 16, (2, 8, 8), num_tokens=8, codebook_size=16, code_dim=4, prior=prior, **sides)
        generator = GeneratorConfig(num_tokens=64, codebook_size=16, depth=2, heads=2, width=16, ffn_multiple=8)
        head = HeadSize(hidden=16, vocab_size=64, codebook_size=8, positions=32, chunk=16)
        return cls(1 << 16, 32, model, (1,), (2, 4), (2,), model, (2,), (2,), generator, (1, 2), head, 0.1)


@dataclass(frozen=True)
class SpeedGpuConfig:
    """Measure a GPU, and tokenizers, sampler and the language model's loss on it."""

    out: Path = Path("speed.json")
    """Where the record goes, written again after each measurement."""
    minutes: float = 2.0
    """Time limit; the record names the measurements that it skips."""
    only: tuple[Group, ...] = get_args(Group)
    """What is measured beside copy and matmul, the ceilings of the others."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    rehearse: bool = False
    """Tiny sizes, to run the same code without a GPU."""

    def __post_init__(self):
        if not self.minutes > 0:
            raise ValueError(f"minutes is {self.minutes}; it must be positive")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(
                f"--device {self.device}: there is no GPU that torch can use; take --device cpu --rehearse"
            )


# ------------------------------------------------------------------------------------------------------------- ceilings


def attention_rate(sizes: Sizes, backend: SDPBackend, device: torch.device) -> dict[str, Any]:
    """Measure the operations per second of LARP-L's attention, forward and backward, with one of torch's backends."""
    c, batch = sizes.large, sizes.large_batches[0]
    length = c.num_tokens + math.prod(c.grid(c.patch_size))
    shape = (3, batch, c.encoder_heads, length, c.encoder_width // c.encoder_heads)
    inputs = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(shape[1:], device=device, dtype=torch.bfloat16)
    with sdpa_kernel(backend):
        seconds = seconds_of(
            lambda: F.scaled_dot_product_attention(*inputs).backward(upstream), device, sizes.seconds / 2
        )
    # Two matmuls forward, and five backward, which include the first again.
    return {"milliseconds": 1000 * seconds, "operations_a_second": 7 * 2 * math.prod(shape[1:]) * length / seconds}


# ----------------------------------------------------------------------------------------------------------- tokenizers


def sweep(
    take: Measurements, name: str, config: TokenizerConfig, batches: tuple[int, ...], rate: float, budget: float
) -> None:
    """Measure training steps at increasing batch sizes until one fails, and the kernels of the fastest."""
    best = batches[0], 0.0
    for batch in batches:
        figures = take.take(f"{name} step, batch {batch}", partial(training, config, batch, rate, budget, take.device))
        if "milliseconds" not in figures:
            break
        best = max(best, (batch, figures["clips_a_second"]), key=lambda one: one[1])
    work = partial(training, config, best[0], rate, 0.2, take.device, kernels=True)
    take.take(f"{name} step, batch {best[0]}, kernels", work)


def compiled(take: Measurements, sizes: Sizes, rate: float, needs: float) -> None:
    """Measure training steps with compiled blocks, and the seconds of the first step of each."""
    cases = [("box", sizes.box, batch) for batch in sizes.box_compiled]
    cases += [("LARP-L", sizes.large, batch) for batch in sizes.large_compiled]
    for name, size, batch in cases:
        work = partial(training, size, batch, rate, sizes.seconds, take.device, compiled=True, kernels=True)
        take.take(f"{name} step, batch {batch}, compiled", work, needs=needs)
        # Without this the next shape would compile in less time.
        torch.compiler.reset()


# ----------------------------------------------------------------------------------------------- loss of language model


def head_loss(sizes: Sizes, batch: str, trained: bool, chunked: bool, device: torch.device) -> dict[str, Any]:
    """Measure forward and backward of the language model's loss in bf16; `memory` is the peak above what was in use before."""
    case = HeadCase(sizes.head, batch, trained, str(device), "bf16")
    model = case.build()
    hidden, labels = case.inputs(model)

    def work() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            if chunked:
                loss = model(inputs_embeds=hidden, labels=labels, head_chunk=sizes.head.chunk).loss
            else:
                loss = reference_loss(model, hidden, labels)
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
    """Measure the loss of a mixed batch and of text only, the base frozen and trained, in chunks and by the reference."""
    for batch in ("mixed", "text only"):
        for trained in (False, True):
            for chunked in (True, False):
                name = f"loss, {batch}, {'trained' if trained else 'frozen'}, {'in chunks' if chunked else 'reference'}"
                take.take(name, partial(head_loss, sizes, batch, trained, chunked, take.device))


# --------------------------------------------------------------------------------------------------------------- report


def measure(config: SpeedGpuConfig) -> dict[str, Any]:
    """Take the measurements that fit into the time limit, and return the record."""
    device, only = torch.device(config.device), config.only
    sizes = Sizes.tiny() if config.rehearse else Sizes()
    about = {"config": to_dict(config), "sizes": to_dict(sizes), "machine": machine(device)}
    about["precision"] = "bf16 autocast with float32 weights; float32 matmuls exact (no TF32), as in training"
    take = Measurements(config.out, device, 60 * config.minutes, about)
    copied = take.take("copy", partial(copy_rate, sizes.copy_bytes, sizes.seconds, device))
    multiplied = take.take("matmul", partial(matmul_rate, sizes.matmul, sizes.seconds, device))
    # A ceiling that could not be measured is replaced by the maker's figure for an H100.
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
    # Compilation and DeepSpeed come last, because the time that they take on a new machine is not known.
    if "compiled" in only:
        compiled(take, sizes, rate, 5 if config.rehearse else 30)
    if "engine" in only:
        batch = sizes.box_batches[-1]
        work = partial(engine_training, sizes.box, batch, rate, sizes.seconds)
        take.take(f"box step, batch {batch}, engine", work, needs=10)
    return take.record


def table(record: dict[str, Any]) -> list[str]:
    """Return the figures, one line for each measurement."""
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
    # A rehearsal runs the blocks without compiling them, to save time.
    with torch.compiler.set_stance("force_eager" if config.rehearse else "default"):
        record = measure(config)
    print(*table(record), sep="\n")
    return record


if __name__ == "__main__":
    run_script("speed_gpu.py", main)
