"""Train the autoregressive generator on codes, and sample clips from it on the way and at the end.

    deepspeed training/train_generator.py --task class --tokens runs/tok/tokens-train --eval-tokens runs/tok/tokens-test
    deepspeed training/train_generator.py --task class --tokenizer runs/tok/model --data shapes:   # extracts them first

Shapes: B batch, N codes of a clip, K codebook size.
"""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from larp.config import parse, to_dict
from larp.data.listing import skipped_lines
from larp.data.token_cache import TokenCache
from larp.engine import backend
from larp.engine.backend import Engine, Ranks, make_engine
from larp.engine.clock import Clock
from larp.engine.code_batches import CachedCodes, LiveCodes, open_data
from larp.engine.distributed import gathered_copy, gathered_weights
from larp.engine.generator_settings import TrainGeneratorConfig
from larp.engine.launch import spread
from larp.engine.log import RunLog
from larp.engine.optimizer import build_optimizer
from larp.engine.run import (
    check_run,
    open_log,
    open_training,
    save_training,
    skipped_before,
    skipped_videos,
    step_metrics,
    stopped,
)
from larp.engine.samples import GUIDANCE, Samples, tokenizer_of
from larp.engine.signals import run_script
from larp.engine.trained_weights import take_weights
from larp.engine.untrusted import naming_damaged
from larp.files import write_json
from larp.hub import EMA
from larp.metrics.code_prediction import predict_codes
from larp.models.generator import GeneratorConfig, LarpGenerator, code_loss
from larp.models.noise import BatchNoise
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.locate import set_default_model

import torch
from torch import Tensor

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class Trainer:
    """All that the loop needs."""

    config: TrainGeneratorConfig
    engine: Engine
    source: CachedCodes | LiveCodes
    held_out: TokenCache
    clock: Clock
    samples: Samples | None
    best: dict[str, float] = field(default_factory=dict)
    """Step and scores of the weights in model/, which go into the checkpoints."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of the videos that were skipped before the run was resumed."""

    @property
    def engines(self) -> dict[str, Engine]:
        """By the name of their checkpoints."""
        return {"generator": self.engine}

    @property
    def identity(self) -> dict:
        """What must be the same when a run is resumed, as plain values.

        The model; the data, seed and batch size, which say what a step trains on; and the clips that `best` is measured on.
        """
        return {
            "model": to_dict(self.engine.module.config),
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
            "tokens": self.source.key | {"clips": len(self.source)},
            "eval_tokens": self.held_out.key | {"clips": len(self.held_out)},
        }


def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` (by default the program's own) and return the report; ValueError for mistakes of the user."""
    options = sys.argv[1:] if argv is None else argv
    config, recipe = parse(
        TrainGeneratorConfig, options, RECIPES, "train_generator.py", adjust=TrainGeneratorConfig.adjusted
    )
    if argv is None:
        spread(config.engine, config.batch_size)
    return train(config, recipe)


def train(config: TrainGeneratorConfig, recipe: str | None = None) -> dict:
    """Train, validate, save and sample as `config` says; return the report, which also lies in the run folder."""
    began = time.time()
    ranks = backend.start(config.seed)
    try:
        check_run(config)
        source, held_out, tokenizer = open_data(config, ranks)
        config = config.in_steps(len(source))
        clock = Clock(config.steps, config.minutes)
        model = build_model(config, source, tokenizer)
        parameters = model.num_parameters()  # before the engine may shard them
        samples = open_samples(config, held_out, tokenizer, model.config, ranks)
        engine = make_generator_engine(config, model, len(source), clock, ranks)
        engine.clips_of = source.clips_of
        trainer = Trainer(config, engine, source, held_out, clock, samples)
        saved = open_training(config, to_dict(config) | {"recipe": recipe}, clock, trainer.engines, trainer.identity)
        if saved is not None:
            with naming_damaged(saved.folder):
                trainer.best = saved.extra
                trainer.skipped = skipped_before(saved)
                bits(trainer.best) < math.inf  # noqa: B015 - a damaged one cannot be compared
        with open_log(config, ranks, clock, ("loss", "bits_per_token", "top1", "top5")) as log:
            stop = {} if loop(trainer, log) else stopped(config, clock.step, log)
            skipped = skipped_videos(source.skipped, trainer.skipped)
            for line in skipped_lines(skipped) if config.live and not stop else ():
                log.say(line)
        report = {
            "finished": not stop,
            **stop,
            "task": config.task,
            "recipe": recipe,
            "size": config.size,
            "parameters": parameters,
            "steps": engine.step_count,
            "clips": len(source),
            "held_out_clips": len(held_out),
            "skipped_videos": len(skipped),
            "skipped_updates": engine.skipped_count,
            **trainer.best,
            "uniform_bits_per_token": math.log2(model.config.codebook_size),
            "model": str(config.out / "model"),
        }
        if not stop:
            finish(trainer, report, began)
        backend.barrier()
        return report
    finally:
        backend.finish()


# ------------------------------------------------------------------------------------------------------- data and model


def open_samples(
    config: TrainGeneratorConfig,
    held_out: TokenCache,
    tokenizer: LarpTokenizer | None,
    shape: GeneratorConfig,
    ranks: Ranks,
) -> Samples | None:
    """Make ready what is sampled on the way; None if nothing is, or its tokenizer is gone. Uses random numbers."""
    if config.sampling.clips == 0 or not (tokenizer := tokenizer or tokenizer_of(held_out, ranks)):
        return None
    sampling = config.sampling.resolve(GUIDANCE if config.dropped else 1.0)
    return Samples(config.sampling.clips, sampling, tokenizer, held_out, shape, config.seed, ranks)


def build_model(
    config: TrainGeneratorConfig, source: CachedCodes | LiveCodes, tokenizer: LarpTokenizer | None
) -> LarpGenerator:
    """Build the generator for the codes and classes of the training data."""
    # The same seed begins with the same weights, whatever was loaded or extracted before.
    torch.manual_seed(config.seed)
    classes = source.classes if config.task == "class" else ()
    codebook = (tokenizer or source.cache.load_tokenizer()).codebook if config.codebook_rows else None
    shape = GeneratorConfig.of_size(
        config.size, task=config.task, num_tokens=source.key["num_tokens"], codebook_size=source.key["codebook_size"],
        dropout=config.dropout, num_classes=max(1, len(classes)), class_names=classes,
        null_condition=config.task == "frame-prediction" and config.dropped > 0, tokenizer_hash=source.key["tokenizer"],
        code_dim=0 if codebook is None else codebook.shape[1],
    )  # fmt: skip
    model = LarpGenerator(shape)
    if codebook is not None:
        model.take_codebook(codebook)
    if config.start_from is not None:
        # A tokenizer that was trained further has another hash, but nearly the same codes.
        take_weights(model, config.start_from, free=("dropout", "tokenizer_hash"))
    return model


def make_generator_engine(
    config: TrainGeneratorConfig, model: LarpGenerator, clips: int, clock: Clock, ranks: Ranks
) -> Engine:
    """Put a generator and its optimizer under DeepSpeed, for epochs of so many clips."""
    optimizer = build_optimizer(model, config.optimizer, config.engine.zero_stage, config.engine.precision)
    factor = clock.on_schedule(config.optimizer.lr_factor(config.steps, clips / config.batch_size))
    engine = make_engine(
        model, optimizer, factor, config.engine, config.batch_size, ranks, name="generator", ema=config.ema
    )
    # From here on dropout differs between ranks; the weights above had to be the same.
    torch.manual_seed(config.seed * 1000 + ranks.rank)
    return engine


# ------------------------------------------------------------------------------------------------------------- training


def loop(trainer: Trainer, log: RunLog) -> bool:
    """Train to the end of the clock; False if the run was asked to stop before. Collective."""
    config, engine, clock = trainer.config, trainer.engine, trainer.clock
    values: list[dict[str, Tensor]] = []
    while not clock.done:
        values.append(train_step(engine, micro_batches(trainer.source, engine, config)))
        clock.advance()
        step, last, scores = clock.step, clock.done, {}
        if last or clock.due(config.eval_every):
            scores = validate(engine, trainer.held_out, config)
            if not config.keep_best or bits(scores) < bits(trainer.best):
                trainer.best |= scores | {"best_step": step}
                save_model(engine, config.out / "model")
        if trainer.samples and config.sampling.every and clock.due(config.sampling.every) and not last:
            trainer.samples.write_sheet(current_model(engine), config.out / "samples" / f"step-{step:08d}.png")
        if scores or step % config.log_every == 0:
            log.metrics(step, mean_of(values) | scores | step_metrics(engine, clock))
            values = []
        log.progress(step)
        stop = backend.stop_requested()
        # After the validation of the step, whose `best` belongs to model/.
        if stop or last or (clock.due(config.save_every) and not engine.is_skipping):
            skipped = {"skipped": skipped_videos(trainer.source.skipped, trainer.skipped)} if config.live else None
            save_training(config, clock, trainer.engines, trainer.identity, skipped, trainer.best)
        if stop and not last:
            return False
    return True


def micro_batches(
    source: CachedCodes | LiveCodes, engine: Engine, config: TrainGeneratorConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's (codes (b, N), condition) of the next step; some conditions are replaced by the unconditional one.

    Rows, and which conditions are dropped, depend only on the seed and the position in the global batch.
    """
    step = engine.step_count
    for offset, codes, condition in source.step(step):
        if config.dropped > 0:
            sampled = BatchNoise(config.seed, step, config.batch_size, offset, len(codes), codes.device).uniform()
            hidden = (sampled < config.dropped).view(-1, *[1] * (condition.dim() - 1))
            condition = torch.where(hidden, engine.module.unconditional(condition), condition)
        yield codes, condition


def train_step(engine: Engine, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Train on the micro batches (codes, condition) of one step; return mean loss (nats per code) and accuracy, on the device."""
    engine.module.train()
    losses, hits = [], []
    for codes, condition in batches:
        logits = engine(codes, condition)
        loss = code_loss(logits, codes)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
        hits.append((logits.detach().argmax(-1) == codes).float().mean())
    return {"loss": torch.stack(losses).mean(), "train_top1": torch.stack(hits).mean()}


def mean_of(steps: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return the means over steps and processes. Reading every loss at its step instead would make a GPU wait. Collective."""
    columns = {name: torch.stack([values[name] for values in steps]).tolist() for name in steps[0]}
    return backend.reduce_mean({name: sum(column) / len(column) for name, column in columns.items()})


# ---------------------------------------------------------------------------------------------------- validation, results


def validate(engine: Engine, cache: TokenCache, config: TrainGeneratorConfig) -> dict[str, float]:
    """Return the scores of `predict_codes` on held-out clips, and as ema_... those of averaged weights where there are any."""
    engine.module.eval()
    size = backend.micro_batch(config.batch_size, config.engine.accumulation, engine.ranks)
    scores = predict_codes(engine, cache, config.task, size, engine.ranks)
    if engine.average is None:
        return scores
    with engine.autocast():
        averaged = predict_codes(engine.average.module, cache, config.task, size, engine.ranks)
    return scores | {f"ema_{name}": value for name, value in averaged.items()}


def bits(scores: dict[str, float]) -> float:
    """Return bits per held-out code, of the averaged weights where there are any; infinity before a validation."""
    return scores.get("ema_bits_per_token", scores.get("bits_per_token", math.inf))


def current_model(engine: Engine) -> LarpGenerator:
    """Return the generator with all weights of this moment, to sample from. Collective."""
    module = engine.module
    return gathered_copy(module, lambda: LarpGenerator(module.config), engine.config.zero_stage)


def save_model(engine: Engine, folder: Path) -> None:
    """Write the weights of this moment, and their average where there is one. Collective."""
    with gathered_weights(engine.module, engine.config.zero_stage):
        if engine.ranks.is_main:
            engine.module.save_pretrained(folder, ema=engine.average and engine.average.module)


def finish(trainer: Trainer, report: dict, began: float) -> None:
    """Make the model that the run leaves the default, sample from it, and write and print its report. Collective.

    Raises FloatingPointError if its held-out bits per code are not finite.
    """
    config, best, ranks = trainer.config, trainer.best, trainer.engine.ranks
    if not math.isfinite(bits(best)):
        raise FloatingPointError(
            f"{config.out} holds no model of use: its held-out bits per code are not finite ({trainer.engine.skipped_count} of "
            f"{trainer.engine.step_count} updates were skipped). Train anew in another folder, with a lower learning rate or with "
            "--engine.precision fp32"
        )
    if ranks.is_main and config.task == "class":
        set_default_model(config.out / "model", "generator")
    # After few steps the average is still behind the weights.
    variant = EMA if best.get("ema_bits_per_token", math.inf) < best["bits_per_token"] else None
    model = LarpGenerator.from_pretrained(config.out / "model", device=ranks.device, variant=variant)
    report["samples"] = trainer.samples and trainer.samples.write_gallery(model, config.out / "samples")
    report["seconds"] = round(time.time() - began, 1)
    if ranks.is_main:
        write_json(config.out / "report.json", report)
        print(
            f"held out: {best['bits_per_token']:.3f} bits per token, {best['bits_per_clip']:.1f} per clip,"
            f" top-1 {best['top1']:.3f}, top-5 {best['top5']:.3f}"
        )
        print(f"report: {config.out / 'report.json'}")


if __name__ == "__main__":
    run_script("train_generator.py", main)
