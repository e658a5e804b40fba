"""Time and memory of the language model's loss, in chunks, beside a reference: all logits of all positions at once.

`python eval/speed.py --what head` runs it. Both must give the same loss and gradients. V rows of the text head, K codes, n positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.flops import Matmul
from bench.timing import describe_ratios, in_fresh_process, lap, peak_memory, ratios, summary
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.model.vocabulary import IGNORE

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

WAYS = ("ours", "reference")
BATCHES = ("mixed", "text only")


@dataclass(frozen=True)
class HeadSize:
    """The heads and the batch to measure; by default Qwen2-0.5B's, with 8192 codes, and one row of two videos."""

    hidden: int = 896
    vocab_size: int = 151_936
    codebook_size: int = 8192
    positions: int = 2304
    text_share: float = 0.1
    """Of the targets of the mixed batch."""
    chunk: int = 1024
    """Positions whose logits exist at a time, in ours."""

    def __post_init__(self):
        for name in ("hidden", "vocab_size", "codebook_size", "positions", "chunk"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")
        if not 0 < self.text_share < 1:
            raise ValueError(f"text_share must lie between 0 and 1, got {self.text_share}")

    def text_targets(self, batch: str) -> int:
        """How many of a batch's targets are text."""
        return self.positions if batch == "text only" else max(1, round(self.positions * self.text_share))


@dataclass(frozen=True)
class HeadCase:
    """One measurement: all that a fresh process needs to know."""

    size: HeadSize
    batch: str
    trained: bool
    device: str
    precision: str

    def build(self) -> LarpMllmForCausalLM:
        """A model without layers: its heads and a norm. The base is trained or frozen, the rows of codes are trained."""
        torch.manual_seed(0)
        shape = dict(hidden_size=self.size.hidden, vocab_size=self.size.vocab_size, num_hidden_layers=0)
        config = Qwen2Config(**shape, num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True)
        with torch.device(self.device):
            codebook = torch.zeros(self.size.codebook_size, 1)
            base = AutoModelForCausalLM.from_config(config).requires_grad_(self.trained)
        return LarpMllmForCausalLM.from_base(base, 0, codebook, 1, "free")

    def inputs(self, model: LarpMllmForCausalLM) -> tuple[Tensor, Tensor]:
        """Return hidden states (1, n + 1, H) that require a gradient, and labels (1, n + 1) of text and codes."""
        generator = torch.Generator().manual_seed(1)
        count, texts = self.size.positions, self.size.text_targets(self.batch)
        hidden = torch.randn(1, count + 1, self.size.hidden, generator=generator)
        codes = torch.randint(model.vocabulary.first_code, model.vocabulary.size, (count,), generator=generator)
        words = torch.randint(0, model.vocabulary.video_end, (count,), generator=generator)
        is_text = torch.zeros(count, dtype=torch.bool)
        is_text[torch.randperm(count, generator=generator)[:texts]] = True
        labels = F.pad(torch.where(is_text, words, codes), (1, 0), value=IGNORE)[None]
        return hidden.to(self.device).requires_grad_(), labels.to(self.device)

    def matmuls(self, way: str) -> list[Matmul]:
        """The matmuls of one forward and backward pass; frozen weights get no gradient."""
        texts = self.size.text_targets(self.batch)
        rows = [self.size.positions] * 3 if way == "reference" else [texts, texts, self.size.positions - texts]
        codes = self.size.codebook_size
        # The reference scores both controls with text, then masks.
        classes = (self.size.vocab_size, 2, codes) if way == "reference" else (self.size.vocab_size, 1, 1 + codes)
        return [
            Matmul(count, self.size.hidden, width, gradients=2 if self.trained or index else 1)
            for index, (count, width) in enumerate(zip(rows, classes, strict=True))
            if count
        ]


def reference_loss(model: LarpMllmForCausalLM, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of the model as one cross entropy over text, controls and codes, of all positions.

    Logits of text are minus infinity inside of a video, where the target is a code, and those of codes outside.
    """
    hidden = model.base.base_model(inputs_embeds=hidden).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    inside = targets >= model.vocabulary.video_end
    never = torch.zeros_like(targets, dtype=hidden.dtype).masked_fill(inside, -torch.inf)
    other = torch.zeros_like(never).masked_fill(~inside, -torch.inf)
    text = model.base.get_output_embeddings()(hidden).add_(never[..., None])
    controls = (hidden @ model.adapter.control_rows().T).add_(torch.stack([never, other], dim=-1))
    codes = (hidden @ model.adapter.code_rows().T).add_(other[..., None])
    logits = torch.cat([text, controls, codes], dim=-1)
    del text, controls, codes
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def one_pass(case: HeadCase, way: str) -> dict[str, Any]:
    """Measure time and memory of a forward and backward pass, in a process that does nothing else.

    The loss and the gradients are returned as well (of the head's weights a projection).
    """
    model, device = case.build(), torch.device(case.device)
    hidden, labels = case.inputs(model)

    def work(count: int) -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            if way == "reference":
                loss = reference_loss(model, hidden[:, :count], labels[:, :count])
            else:
                loss = model(inputs_embeds=hidden[:, :count], labels=labels[:, :count], head_chunk=case.size.chunk).loss
        loss.backward()
        return loss.item()

    work(3)
    for tensor in (hidden, *model.parameters()):
        tensor.grad = None
    rate = matmul_rate(case, model)
    reset_peak_memory(device)
    before, losses = peak_memory(device), []
    timed = lap(lambda: losses.append(work(hidden.shape[1])), device)
    memory = peak_memory(device)
    adapter, head = model.adapter, model.base.get_output_embeddings().weight
    gradients = [hidden.grad, adapter.control_output.weight.grad, adapter.code_output.rows.weight.grad]
    if case.trained:
        gradients.append(head.grad @ torch.linspace(-1, 1, case.size.hidden, device=device))
    return {
        "loss": losses[0],
        "gradients": [gradient.float().cpu().numpy() for gradient in gradients],
        "lap": timed,
        "rate": rate,
        "peak_memory": memory,
        "memory_of_the_pass": memory - before,
    }


@torch.no_grad()
def matmul_rate(case: HeadCase, model: LarpMllmForCausalLM) -> float:
    """Return the operations per second of the text head's matmul on a chunk of rows: the fastest of three laps."""
    device, head = torch.device(case.device), model.base.get_output_embeddings()
    rows = torch.randn(min(case.size.chunk, case.size.text_targets(case.batch)), case.size.hidden, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
        best = min(lap(lambda: head(rows), device).spent for _ in range(3))
    return 2 * rows.numel() * case.size.vocab_size / max(best, 1e-9)


def reset_peak_memory(device: torch.device) -> None:
    """Reset `peak_memory` to what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def measure_case(case: HeadCase, pairs: int) -> dict[str, Any]:
    """Time both in fresh processes that alternate; ValueError if their losses or gradients differ."""
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(pairs):
        for way in WAYS:
            runs[way].append(in_fresh_process(one_pass, case, way))
        error = difference(*(runs[way][-1] for way in WAYS))
        if not error <= (1e-4 if case.precision == "fp32" else 5e-2):
            raise ValueError(f"ours and the reference differ by {error:.2g} ({case.batch}): their times mean nothing")
    laps = [[run["lap"] for run in runs[way]] for way in WAYS]
    rate = max(run["rate"] for way in WAYS for run in runs[way])
    report: dict[str, Any] = {"largest_difference": error, "matmul_rate": rate, **ratios(*laps)}
    for way, own in zip(WAYS, laps, strict=True):
        operations = sum(one.flops * (1 + one.gradients) for one in case.matmuls(way))
        figures = summary(own) | {"operations": operations, "floor_seconds": operations / rate}
        for name in ("peak_memory", "memory_of_the_pass"):
            figures[name] = max(run[name] for run in runs[way])
        figures["share_of_rate"] = operations / rate / figures.get("cpu_seconds", figures["seconds"])
        report[way] = figures | {"loss": runs[way][0]["loss"]}
    for name in ("peak_memory", "memory_of_the_pass"):
        report[f"{name}_ratio"] = report["ours"][name] / max(1, report["reference"][name])
    return report


def difference(ours: dict[str, Any], reference: dict[str, Any]) -> float:
    """Return the largest difference of two runs in loss or a gradient, each relative to its largest value."""
    pairs = [
        (np.array([ours["loss"]]), np.array([reference["loss"]])),
        *zip(ours["gradients"], reference["gradients"], strict=True),
    ]
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs)


def measure_heads(size: HeadSize, device: str, precision: str, pairs: int) -> dict[str, Any]:
    """Measure all cases: a mixed batch and one of text only, the base frozen and trained."""
    report: dict[str, Any] = {}
    for batch in BATCHES:
        for trained in (False, True):
            case = HeadCase(size, batch, trained, device, precision)
            report[f"{batch}, {'trained' if trained else 'frozen'}"] = measure_case(case, pairs)
    return report


def describe_heads(report: dict[str, Any]) -> list[str]:
    """Return the figures as the lines of a table."""
    lines = [
        f"{'':20} {'':9} {'seconds':>9} {'CPU s':>8} {'floor':>8} {'of rate':>8} {'GiB':>6} {'of which the pass':>18}"
    ]
    for name, case in report.items():
        for way in WAYS:
            own = case[way]
            lines.append(
                f"{name:20} {way:9} {own['seconds']:9.3f} {own.get('cpu_seconds', 0):8.3f} {own['floor_seconds']:8.3f} {own['share_of_rate']:8.1%} "
                f"{own['peak_memory'] / 2**30:6.2f} {own['memory_of_the_pass'] / 2**30:18.2f}"
            )
        lines.append(
            f"{'':20} {describe_ratios(case)}, of the memory of the pass {case['memory_of_the_pass_ratio']:.3f}; "
            f"{case['matmul_rate'] / 1e9:.0f} GFLOP/s in the matmul alone"
        )
    return lines
