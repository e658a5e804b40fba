"""Train the autoregressive generator on codes, and sample clips from it on the way and at the end.

    deepspeed training/train_generator.py --task class --tokens runs/tok/tokens-train --eval-tokens runs/tok/tokens-test
    deepspeed training/train_generator.py --task class --tokenizer runs/tok/model --data shapes:   # extracts them first

Shapes: B batch, N codes of a clip, K codebook size.
"""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from larp.config import parse, to_dict
from larp.data.datasets import VideoSet, open_videos
from larp.data.extraction import extract_tokens
from larp.data.token_cache import TokenCache
from larp.engine import backend
from larp.engine.backend import Engine, Ranks, make_engine
from larp.engine.checkpoint import check_folder, load_state, open_run, save_state, take_weights
from larp.engine.clock import Clock
from larp.engine.code_batches import CachedCodes, LiveCodes
from larp.engine.distributed import whole, whole_copy
from larp.engine.generator_settings import TrainGeneratorConfig
from larp.engine.log import RunLog, check_wandb
from larp.engine.optimizer import build_optimizer
from larp.engine.samples import GUIDANCE, Samples, tokenizer_of
from larp.engine.signals import run_script
from larp.files import write_json
from larp.hub import EMA
from larp.metrics.code_prediction import predict_codes
from larp.models.generator import GeneratorConfig, LarpGenerator, code_loss
from larp.models.noise import BatchNoise
from larp.models.tokenizer import LarpTokenizer

import torch
from torch import Tensor

RECIPES = Path(__file__).parent / "recipes"
# What of the training data's key the held-out clips must share.
SHARED = ("tokenizer", "num_tokens", "codebook_size", "frames", "stride", "condition_frames", "code_version")


def main(argv: list[str] | None = None) -> dict:
    """Run the command line `argv` (by default the program's own) and return the report; ValueError for mistakes of the user."""
    argv = sys.argv[1:] if argv is None else argv
    config, recipe = parse(TrainGeneratorConfig, argv, RECIPES, "train_generator.py")
    return train(config, recipe)


def train(config: TrainGeneratorConfig, recipe: str | None = None) -> dict:
    """Train, validate, save and sample as `config` says; return the report, which also lies in the run folder."""
    began = time.time()
    ranks = backend.start(config.seed)
    try:
        check_folder(config.out, config.resume)
        source, held_out, tokenizer = open_data(config, ranks)
        config = config.in_steps(len(source))
        clock = Clock(config.steps, config.minutes)
        model = build_model(config, source)
        parameters = model.num_parameters()  # before the engine may shard them
        samples = open_samples(config, held_out, tokenizer, model.config, ranks)
        engine = make_generator_engine(config, model, len(source), clock, ranks)
        check_wandb(config.wandb)
        # Last, so that a mistake in the options leaves no run folder behind.
        engines, model_id = {"generator": engine}, identity(engine, source, held_out, config)
        options = to_dict(config) | {"recipe": recipe}
        saved = open_run(config.out, options, config.resume, clock.total, engines, model_id)
        best: dict[str, float] = {}
        if saved is not None:
            load_state(engines, saved, model_id)
            best = saved.extra
        clock.start(engine.step_count, elapsed=0.0 if saved is None else saved.loader_state.get("elapsed", 0.0))
        finished = fit(engine, source, held_out, config, clock, best, samples)
        skipped = {tuple(entry) for entries in backend.gather_objects(source.skipped) for entry in entries}
        report = {
            "finished": finished,
            "task": config.task,
            "recipe": recipe,
            "size": config.size,
            "parameters": parameters,
            "steps": engine.step_count,
            "clips": len(source),
            "held_out_clips": len(held_out),
            "skipped_videos": len(skipped),
            **best,
            "uniform_bits_per_token": math.log2(model.config.codebook_size),
            "model": str(config.out / "model"),
        }
        if finished:
            # An average still lags behind where steps were few.
            variant = EMA if best.get("ema_bits_per_token", math.inf) < best["bits_per_token"] else None
            better = LarpGenerator.from_pretrained(config.out / "model", device=ranks.device, variant=variant)
            report["samples"] = samples and samples.write_gallery(better, config.out / "samples")
            report["seconds"] = round(time.time() - began, 1)
        if finished and ranks.is_main:
            write_json(config.out / "report.json", report)
            print(
                f"held out: {best['bits_per_token']:.3f} bits per token, {best['bits_per_clip']:.1f} per clip,"
                f" top-1 {best['top1']:.3f}, top-5 {best['top5']:.3f}"
            )
            print(f"report: {config.out / 'report.json'}")
        backend.barrier()
        return report
    finally:
        backend.finish()


# ----------------------------------------------------------------------------------------------------------------- data


def open_data(
    config: TrainGeneratorConfig, ranks: Ranks
) -> tuple[CachedCodes | LiveCodes, TokenCache, LarpTokenizer | None]:
    """Return what to train and to validate on, extracted first if need be, and the tokenizer where that needed it.

    Raises ValueError if the two do not fit together, or lack what the task needs.
    """
    micro = backend.micro_batch(config.batch_size, config.engine.accumulation, ranks)
    sizes = (config.task, config.batch_size, micro, config.seed, ranks)
    tokenizer, held_out = None, None
    if config.tokens is not None:
        if config.eval_tokens is not None and config.eval_tokens.resolve() == config.tokens.resolve():
            raise ValueError(
                f"eval_tokens {config.eval_tokens} is the same cache as tokens {config.tokens}, so nothing would be held out:"
                " give --eval-tokens another, or leave it out"
            )
        cache = TokenCache.open(config.tokens)
        if config.tokenizer:
            tokenizer = cache.load_tokenizer(config.tokenizer, ranks.device)
        if config.eval_tokens is None:
            cache, held_out = cache.hold_out()
        cache.require(config.task, str(config.tokens))
        source = CachedCodes(cache, *sizes)
    elif not (config.tokenizer and config.data):
        raise ValueError(
            "nothing to train on: give --tokens DIR (made by training/extract_tokens.py), or --tokenizer and --data"
            " to extract tokens first (or, with --live, at every step), for example --tokenizer runs/tokenizer/model"
            " --data shapes:"
        )
    else:
        tokenizer = LarpTokenizer.from_pretrained(config.tokenizer, device=ranks.device)
        if config.live:
            source = LiveCodes(
                tokenizer, open_split(config.data, "train", ranks), *sizes, stride=config.stride, flips=config.flips,
                condition_frames=config.given_frames, workers=config.workers,
            )  # fmt: skip
        else:
            cache = extract_split(config, tokenizer, config.data, "train", ranks)
            cache.require(config.task, config.data)
            source = CachedCodes(cache, *sizes)
        if config.eval_tokens is None:
            held_out = extract_split(config, tokenizer, config.eval_data or config.data, "test", ranks)
    if held_out is None:
        held_out = TokenCache.open(config.eval_tokens, {name: source.key[name] for name in SHARED})
    held_out.require(config.task, str(config.eval_tokens or config.eval_data or config.data), source.classes)
    return source, held_out, tokenizer


def open_split(data: str, split: str, ranks: Ranks) -> VideoSet:
    """List the videos of one split of a data spec, and say what is missing."""
    videos = open_videos(data, split)
    for note in videos.notes if ranks.is_main else ():
        print(note)
    return videos


def extract_split(
    config: TrainGeneratorConfig, tokenizer: LarpTokenizer, data: str, split: str, ranks: Ranks
) -> TokenCache:
    """Extract the tokens of one split of a data spec into the run folder."""
    folder = config.out / f"tokens-{split}"
    if ranks.is_main:
        print(f"tokens of {data} ({split}) go to {folder}; give --tokens to use a cache that is there already")
    train = split == "train"
    return extract_tokens(
        tokenizer, open_split(data, split, ranks), split, folder,
        stride=config.stride, windows=config.windows if train else 1, flips=config.flips and train,
        condition_frames=config.given_frames, workers=config.workers, tokenizer_name=config.tokenizer,
        rank=ranks.rank, world_size=ranks.world_size, barrier=backend.barrier,
    )  # fmt: skip


def open_samples(
    config: TrainGeneratorConfig,
    held_out: TokenCache,
    tokenizer: LarpTokenizer | None,
    shape: GeneratorConfig,
    ranks: Ranks,
) -> Samples | None:
    """Make ready what is sampled on the way; None if nothing is, or its tokenizer is gone. It samples random numbers."""
    if config.sampling.clips == 0 or not (tokenizer := tokenizer or tokenizer_of(held_out, ranks)):
        return None
    sampling = config.sampling.resolve(GUIDANCE if config.dropped else 1.0)
    return Samples(config.sampling.clips, sampling, tokenizer, held_out, shape, config.seed, ranks)


# ---------------------------------------------------------------------------------------------------------------- model


def build_model(config: TrainGeneratorConfig, source: CachedCodes | LiveCodes) -> LarpGenerator:
    """Build the generator for the codes and classes of the training data."""
    # Whatever was loaded and extracted before: the same seed begins with the same weights.
    torch.manual_seed(config.seed)
    classes = source.classes if config.task == "class" else ()
    shape = GeneratorConfig.of_size(
        config.size, task=config.task, num_tokens=source.key["num_tokens"], codebook_size=source.key["codebook_size"],
        dropout=config.dropout, num_classes=max(1, len(classes)), class_names=classes,
        null_condition=config.task == "frame-prediction" and config.dropped > 0, tokenizer_hash=source.key["tokenizer"],
    )  # fmt: skip
    model = LarpGenerator(shape)
    if config.start_from is not None:
        # Codes of a tokenizer that was trained on mean nearly the same.
        take_weights(model, config.start_from, free=("dropout", "tokenizer_hash"))
    return model


def make_generator_engine(
    config: TrainGeneratorConfig, model: LarpGenerator, clips: int, clock: Clock, ranks: Ranks
) -> Engine:
    """Put a generator and its optimizer under DeepSpeed, for epochs of so many clips."""
    optimizer = build_optimizer(model, config.optimizer, config.engine.zero_stage)
    factor = clock.on_schedule(config.optimizer.lr_factor(config.steps, clips / config.batch_size))
    engine = make_engine(
        model, optimizer, factor, config.engine, config.batch_size, ranks, name="generator", ema=config.ema
    )
    # From here on dropout differs between ranks; the weights above had to be the same.
    torch.manual_seed(config.seed * 1000 + ranks.rank)
    return engine


def current_model(engine: Engine) -> LarpGenerator:
    """Return the generator with all weights of this moment, to sample from. Collective."""
    module = engine.module
    return whole_copy(module, lambda: LarpGenerator(module.config), engine.config.zero_stage)


def save_model(engine: Engine, folder: Path) -> None:
    """Write the weights of this moment, and their average where there is one. Collective."""
    with whole(engine.module, engine.config.zero_stage):
        if engine.ranks.is_main:
            engine.module.save_pretrained(folder, ema=engine.average and engine.average.module)


def identity(
    engine: Engine, source: CachedCodes | LiveCodes, held_out: TokenCache, config: TrainGeneratorConfig
) -> dict:
    """Return what must be the same when a run is resumed, as plain values.

    The model; the data, seed and batch size, which say what a step trains on; and the clips that `best` is measured on.
    """
    return {
        "model": to_dict(engine.module.config),
        "seed": config.seed,
        "batch_size": config.batch_size,
        "tokens": source.key | {"clips": len(source)},
        "eval_tokens": held_out.key | {"clips": len(held_out)},
    }


# ------------------------------------------------------------------------------------------------------------- training


def fit(
    engine: Engine,
    source: CachedCodes | LiveCodes,
    held_out: TokenCache,
    config: TrainGeneratorConfig,
    clock: Clock,
    best: dict[str, float],
    samples: Samples | None = None,
) -> bool:
    """Train to the end of the clock; False if the run was asked to stop before.

    `best` takes the step and the scores of the weights that model/ holds, and goes into the checkpoints.
    """
    values: list[dict[str, Tensor]] = []
    shown = ("loss", "bits_per_token", "top1", "top5")
    with RunLog(config.out, engine.ranks, clock.total, clock.step, shown, config.wandb, to_dict(config)) as log:
        while not clock.done:
            values.append(train_step(engine, micro_batches(source, engine, config)))
            clock.advance()
            step, last, scores = clock.step, clock.done, {}
            if clock.due(config.eval_every) or last:
                scores = validate(engine, held_out, config)
                if not config.keep_best or bits(scores) < bits(best):
                    best.update(scores, best_step=step)
                    save_model(engine, config.out / "model")
            if samples and config.sampling.every and clock.due(config.sampling.every) and not last:
                samples.write_sheet(current_model(engine), config.out / "samples" / f"step-{step:08d}.png")
            if scores or step % config.log_every == 0:
                # Read here alone: a step that waits for its loss would keep a GPU idle.
                columns = {name: torch.stack([value[name] for value in values]).tolist() for name in values[0]}
                mean = backend.reduce_mean({name: sum(column) / len(column) for name, column in columns.items()})
                rates = {**engine.learning_rates, "grad_norm": engine.grad_norm or 0.0}
                log.metrics(step, mean | scores | rates | clock.metrics)
                values = []
            log.progress(step)
            stop = backend.stop_requested()
            if stop or clock.due(config.save_every) or last:
                same, loader = identity(engine, source, held_out, config), {"elapsed": clock.elapsed}
                save_state({"generator": engine}, config.out, step, loader, best, model=same)
            if stop and not last:
                log.say(f"stopped at step {step}; go on with --resume")
                return False
    return True


def micro_batches(
    source: CachedCodes | LiveCodes, engine: Engine, config: TrainGeneratorConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's (codes (b, N), condition) of the coming step, some of them without their condition.

    Rows, and the conditions that are dropped, depend on the seed and the position in the global batch only.
    """
    step = engine.step_count
    for offset, codes, condition in source.step(step):
        if config.dropped > 0:
            sampled = BatchNoise(config.seed, step, config.batch_size, offset, len(codes), codes.device).uniform()
            hidden = (sampled < config.dropped).view(-1, *[1] * (condition.dim() - 1))
            condition = torch.where(hidden, engine.module.unconditional(condition), condition)
        yield codes, condition


def bits(scores: dict[str, float]) -> float:
    """How bad weights are: bits per held-out code, of the averaged ones where there are any; infinite before a validation."""
    return scores.get("ema_bits_per_token", scores.get("bits_per_token", math.inf))


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


if __name__ == "__main__":
    run_script("train_generator.py", main)
