"""One training process of the GPU tests: `python -m tests.gpu.worker steps 0 --out DIR`; its last line is RESULT and JSON.

Data are tensors, a function of the step: nothing is decoded. The device is what DeepSpeed finds.
"""

import argparse
import dataclasses
import json
import math
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from larp.engine import backend
from larp.engine.adversary import AdversaryConfig
from larp.engine.backend import EngineConfig, make_engine
from larp.engine.optimizer import OptimizerConfig, build_optimizer
from larp.engine.run import open_training, save_training
from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.models.layers import compile_blocks
from larp.models.noise import BatchNoise
from larp.models.objective import LossConfig
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig
from larp.sampling.options import GuidedSampling
from larp.sampling.sample import generate
from training import train_generator, train_mllm, train_tokenizer

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

BATCH, STEPS = 8, 3


def tokenizer_config(out: Path, engine: EngineConfig, **changes) -> train_tokenizer.TrainTokenizerConfig:
    """A tiny tokenizer with its prior, and a discriminator that takes part from the first step and learns at each other one."""
    sides = {f"{s}_{n}": v for s in ("encoder", "decoder") for n, v in dict(width=64, depth=1, heads=2).items()}
    prior = PriorConfig(depth=1, heads=2, width=32, positions=16, dropout=0.1)
    shape = dict(
        num_frames=8, height=32, width=32, patch_size=(4, 8, 8), num_tokens=16, codebook_size=256, init="balanced"
    )
    settings = dict(
        out=out, steps=8, batch_size=BATCH, ema=0.9, engine=engine, model=TokenizerConfig(**shape | sides, prior=prior),
        loss=LossConfig(lpips=0.0, gan_every=2, r1=0.1, r1_every=2), adversary=AdversaryConfig(hidden=32, depth=1, heads=2),
        optimizer=OptimizerConfig("adamw", 1e-3, betas=(0.5, 0.9)),
    )  # fmt: skip
    return train_tokenizer.TrainTokenizerConfig(**settings | changes)


def clip_of(step: int, device: torch.device | None = None) -> dict:
    """The batch of a step, as the loader gives it."""
    generator = torch.Generator().manual_seed(step)
    coarse = torch.rand(BATCH, 3, 2, 4, 4, generator=generator)
    clip = torch.nn.functional.interpolate(coarse, (8, 32, 32), mode="trilinear").clamp(0, 1)
    return {"clip": clip.to(device), "sample_offset": 0}


def moved(engine: backend.Engine, before: dict[str, torch.Tensor]) -> float:
    """How far the weights are from what they were, per weight; NaN if one is not finite."""
    now = {
        name: p.detach().float().cpu()
        for name, p in engine.module.named_parameters()
        if p.numel() == before[name].numel()
    }
    total = sum((now[name] - before[name]).abs().sum().item() for name in now)
    return total / max(1, sum(value.numel() for value in now.values()))


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().float().cpu().clone() for name, p in module.named_parameters()}


def summary(engine: backend.Engine, losses: list[float], before: dict[str, torch.Tensor]) -> dict:
    """What the tests look at."""
    average = engine.average
    return {
        "losses": losses,
        "moved": moved(engine, before) if engine.config.zero_stage < 3 else math.nan,
        "skipped": engine.skipped_count,
        "grad_norm": engine.grad_norm,
        "device": next(engine.module.parameters()).device.type,
        "average": average and next(average.module.parameters()).device.type,
    }


def waits(work: Callable[[], Any]) -> list[str]:
    """Where in the program a GPU was waited for."""
    if not torch.cuda.is_available():
        return []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sorted({f"{note.filename}:{note.lineno}" for note in told if "synchroniz" in str(note.message)})


def poison(engine: backend.Engine) -> dict:
    """What a gradient that is not finite does to an engine: nothing but being counted."""
    before, count = weights(engine.module), engine.skipped_count
    engine.backward(engine(clip_of(0)["clip"].to(engine.ranks.device)).reconstruction.mean() * math.nan)
    engine.step()
    now = weights(engine.module)
    kept = all(torch.equal(now[name], before[name]) for name in before)
    return {"kept": kept, "counted": engine.skipped_count - count, "grad_norm": engine.grad_norm == math.inf}


def train_tokenizer_steps(config: EngineConfig, out: Path, ranks: backend.Ranks) -> dict[str, dict]:
    trainer = train_tokenizer.build(tokenizer_config(out, config), ranks, 64)
    engines = trainer.engines
    before = {name: weights(engine.module) for name, engine in engines.items()}
    trainer.clock.start()
    found = []
    for step in range(STEPS):
        found.append(train_tokenizer.train_step(trainer, iter([clip_of(step)])))
        trainer.clock.advance()
    losses = [{name: value.item() for name, value in step.items()} for step in found]
    results = {
        "tokenizer": summary(engines["tokenizer"], [step["loss"] for step in losses], before["tokenizer"]),
        "discriminator": summary(
            engines["discriminator"], [step["discriminator"] for step in losses if "discriminator" in step],
            before["discriminator"],
        ),
    }  # fmt: skip
    batch = clip_of(STEPS, ranks.device)
    results["tokenizer"]["waits"] = waits(lambda: train_tokenizer.train_step(trainer, iter([batch])))
    results["tokenizer"]["poisoned"] = poison(trainer.tokenizer)
    model = trainer.tokenizer.module.eval()
    codes = model.encode(clip_of(0)["clip"].to(ranks.device))
    results["tokenizer"]["decoded"] = list(model.decode(codes).shape)
    for engine in engines.values():
        engine.close()
    return results


def train_generator_steps(config: EngineConfig, _: Path, ranks: backend.Ranks) -> dict[str, dict]:
    torch.manual_seed(0)
    model = LarpGenerator(GeneratorConfig(num_tokens=16, codebook_size=256, depth=2, heads=2, width=64, num_classes=4))
    before = weights(model)
    optimizer = build_optimizer(model, OptimizerConfig("adamw", lr=1e-3, weight_decay=0.05), config.zero_stage)
    ema = 0.0 if config.zero_stage == 3 else 0.9
    engine = make_engine(model, optimizer, lambda step: 1.0, config, BATCH, ranks, name="generator", ema=ema)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        codes = torch.randint(256, (BATCH, 16), generator=generator).to(ranks.device)
        condition = torch.randint(4, (BATCH,), generator=generator).to(ranks.device)
        losses.append(float(train_generator.train_step(engine, [(codes, condition)])["loss"]))
    result = summary(engine, losses, before)
    codes = generate(train_generator.current_model(engine), torch.arange(2), GuidedSampling(guidance_scale=1.5), seed=1)
    result["sampled"] = list(codes.shape)
    engine.close()
    return {"generator": result}


def train_mllm_steps(config: EngineConfig, out: Path, ranks: backend.Ranks) -> dict[str, dict]:
    from larp_mllm.engine.lora import prepare_training
    from larp_mllm.engine.stages import JointConfig
    from larp_mllm.engine.trained_weights import make_optimizer
    from larp_mllm.processing.token_sequence import encode, text_to_video, video_to_text
    from tests.larp_mllm.tiny import CAPTIONS, tiny_mllm

    mllm = tiny_mllm("tiny-qwen2")
    model, processor = mllm.model.to(ranks.device), mllm.processor
    prepare_training(model, "full")
    before = weights(model)
    updates = make_optimizer(model, 1e-2, 1e-3, 0.1)
    engine = make_engine(model, updates, lambda step: 1.0, config, BATCH, ranks)
    engine.module.train()
    tally = []
    # Several records in a row, which a mask keeps apart.
    joint = JointConfig(method="full", steps=STEPS)
    settings = train_mllm.TrainMllmConfig(
        base="tiny-qwen2", out=out, batch_size=BATCH, sequence_length=64, joint=joint, engine=config
    )
    sequences = []
    for row in range(BATCH):
        text = processor.encode_text(CAPTIONS[row % len(CAPTIONS)])
        make = text_to_video if row % 2 else video_to_text
        sequences.append(encode(make(text, [(row + i) % 16 for i in range(4)]), processor.layout))
    for _ in range(STEPS):
        tally.append(train_mllm.train_step(engine, sequences, settings, ranks))
    losses = [(sums[0].item() + sums[3].item()) / (sums[2].item() + sums[5].item()) for sums in tally]
    result = summary(engine, losses, before)
    engine.close()
    return {"language model": result}


def steps(stage: int, out: Path) -> dict:
    """A few steps of each training at a ZeRO stage, in bfloat16."""
    ranks = backend.start(0)
    config = EngineConfig(zero_stage=stage, precision="bf16")
    # Stage 3 cuts up the discriminator, through which the tokenizer's loss goes: refused (larp.engine.backend).
    works = (
        [train_generator_steps, train_mllm_steps]
        if stage == 3
        else [train_tokenizer_steps, train_generator_steps, train_mllm_steps]
    )
    results = {"backend": torch.distributed.get_backend(), "trained": {}}
    for work in works:
        results["trained"] |= work(config, out / work.__name__, ranks)
    backend.finish()
    return results


def resume(out: Path, kill_at: int | None, going_on: bool) -> dict:
    """Train a tokenizer against a discriminator for 6 steps, saved after the third, in float32 and the same order of sums each time."""
    # Of the attentions, only the plain one adds up its gradients in a fixed order whatever the version.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    ranks = backend.start(0)
    config = tokenizer_config(out, EngineConfig(), steps=6, reset_codes_every=2)
    trainer = train_tokenizer.build(config, ranks, 64)
    config = dataclasses.replace(config, resume=going_on)
    saved = open_training(config, {}, trainer.clock, trainer.engines, config.identity)
    if saved is not None:
        trainer.load_state_dict(saved.extra)
    trainer.tokenizer.module.train()
    began = trainer.clock.step
    with sdpa_kernel(SDPBackend.MATH):
        for step in range(began, config.steps):
            train_tokenizer.train_step(trainer, iter([clip_of(step)]))
            trainer.clock.advance()
            if step + 1 == 3:
                save_training(config, trainer.clock, trainer.engines, config.identity, extra=trainer.state_dict())
            if step + 1 == kill_at:
                torch.save({}, out / "reached")
                os.kill(os.getpid(), signal.SIGKILL)
    found = {
        "began": began,
        "reached": (out / "reached").exists(),
        "tokenizer": trainer.tokenizer.module.weight_hash(),
        "average": trainer.tokenizer.average.module.weight_hash(),
        "discriminator": trainer.adversary.discriminator.weight_hash(),
    }
    backend.finish()
    return found


def compile_models(out: Path) -> dict:
    """Losses and gradients of the tokenizer and the generator, plain and with compiled blocks."""
    found = {}
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    config = tokenizer_config(out, EngineConfig()).model
    clip = clip_of(0)["clip"].to(device)
    codes = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(0)).to(device)
    torch.manual_seed(0)
    shape = GeneratorConfig(num_tokens=16, codebook_size=256, depth=1, heads=2, width=64, num_classes=4, dropout=0.0)
    models = {"tokenizer": LarpTokenizer(config).to(device).eval(), "generator": LarpGenerator(shape).to(device).eval()}
    torch.nn.init.normal_(models["generator"].output.weight, std=0.1)
    torch.nn.init.normal_(models["tokenizer"].head.weight, std=0.02)

    def loss_of(name: str) -> torch.Tensor:
        if name == "generator":
            return train_generator.code_loss(models[name](codes, torch.arange(4, device=device)), codes)
        out = models[name](clip, BatchNoise(0, 0, len(clip), device=device), 0.5)
        return (out.reconstruction - clip).square().mean() + out.prior.loss + out.quantized.commitment_loss

    for name, model in models.items():
        taken = []
        for compiled in (False, True):
            if compiled:
                compile_blocks(model, device)
            model.zero_grad()
            loss = loss_of(name)
            loss.backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            taken.append((loss.item(), grads))
        (plain, grads), (again, grads_again) = taken
        scale = torch.stack([g.norm() for g in grads.values()]).norm().item()
        error = torch.stack([(g - grads_again[n]).norm() for n, g in grads.items()]).norm().item()
        found[name] = {"plain": plain, "compiled": again, "gradient_error": error / scale}
    return found


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=("steps", "resume", "compile"))
    parser.add_argument("stage", nargs="?", type=int)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    if options.work == "steps":
        found = steps(options.stage, options.out)
    elif options.work == "resume":
        found = resume(options.out, options.kill_at, options.resume)
    else:
        found = compile_models(options.out)
    print(f"RESULT {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
