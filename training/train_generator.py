"""Train the autoregressive generator on codes, and sample clips from it on the way and at the end.

    deepspeed training/train_generator.py --task class --tokens runs/tok/tokens-train --eval-tokens runs/tok/tokens-test
    deepspeed training/train_generator.py --task class --tokenizer runs/tok/model --data shapes:   # extracts them first

Shapes: B batch, N codes of a clip, K codebook size.
"""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from larp.config import parse, run_script, to_dict
from larp.data.batches import CachedCodes, LiveCodes
from larp.data.datasets import VideoSet, open_videos
from larp.data.extraction import extract_tokens
from larp.data.tokens import TokenCache
from larp.engine import backend
from larp.engine.backend import Engine, EngineConfig, Ranks, make_engine
from larp.engine.log import RunLog, check_wandb, write_json
from larp.engine.optimizer import OptimizerConfig, build_optimizer
from larp.engine.sharding import whole, whole_copy
from larp.engine.state import check_folder, load_state, open_run, save_state
from larp.generator import GeneratorConfig, LarpGenerator, Task, code_loss
from larp.metrics.prediction import predict_codes
from larp.noise import BatchNoise
from larp.samples import GUIDANCE, Samples, SamplingConfig, tokenizer_of
from larp.tokenizer import LarpTokenizer

import torch
from torch import Tensor

RECIPES = Path(__file__).parent / "recipes"
# What of the training data's key the held-out clips must share.
SHARED = ("tokenizer", "num_tokens", "codebook_size", "frames", "stride", "condition_frames", "code_version")


@dataclass(frozen=True)
class TrainGeneratorConfig:
    """Train the autoregressive generator on codes."""

    task: Task = "class"
    """class: clips of a class. frame-prediction: clips that go on from given frames."""
    tokens: Path | None = None
    """Token cache to train on (training/extract_tokens.py); without it, `tokenizer` and `data` make one in `out`."""
    eval_tokens: Path | None = None
    """Token cache to validate on; without it, every 20th video of `tokens` is held out."""
    tokenizer: str | None = None
    """The tokenizer of the codes, for extraction and for the samples; by default the one that the cache names."""
    data: str | None = None
    """Data spec to extract tokens from."""
    eval_data: str | None = None
    """Data spec to validate on (its test split); by default that of `data`."""
    live: bool = False
    """Encode clips of `data` at every step, at random places of the videos, in place of a token cache: other clips in every epoch, for
    the tokenizer's time. Held-out clips are extracted all the same."""
    stride: int = 1
    """When extracting or live: every n-th frame of a video is a frame of the clip."""
    windows: int = 1
    """When extracting: clips of a video at most."""
    flips: bool = False
    """When extracting: every clip mirrored as well. Live: half of the clips mirrored."""
    condition_frames: int = 5
    """When extracting or live, for frame prediction: given frames."""
    workers: int = 2
    """When extracting or live: threads that decode videos, for each process."""
    out: Path = Path("runs/generator")
    """Run folder."""
    size: str = "tiny"
    """A row of larp.generator.SIZES: tiny, mini, S, B, L, LP, XL, XXL, XXXL."""
    dropout: float = 0.1
    condition_dropout: float | None = None
    """Share of training clips that are shown without their class or given frames, which guidance needs. By default 0.1 for classes and,
    as in the paper, 0 for frame prediction, which then has no guidance."""
    ema: float = 0.0
    """Decay of an average of the weights, saved beside them as model.ema.safetensors: about the last 1 / (1 - ema) steps count.
    0: none."""
    steps: int | None = None
    """Optimizer steps; 1000 where `epochs` does not say it."""
    epochs: float | None = None
    """The length of the run in passes over the clips of the cache (live: over the videos), in place of `steps`."""
    batch_size: int = 64
    """Clips in a step, over all processes."""
    eval_every: int = 100
    log_every: int = 10
    save_every: int = 500
    """Steps between checkpoints to resume from."""
    keep_best: bool = True
    """model/ holds the weights of the best validation rather than the last ones."""
    seed: int = 0
    resume: bool = False
    """Go on from the newest checkpoint of the run folder."""
    wandb: str | None = None
    """Project of Weights & Biases that gets the metrics as well (pip install 'larp-mllm[wandb]')."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig("adamw", lr=6e-4, weight_decay=0.05, warmup=50)
    )
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self):
        for name in ("steps", "eval_every", "log_every", "save_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps is {self.steps} and epochs is {self.epochs}: set one of them to None, such as --steps None"
            )
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"epochs is {self.epochs}; it must be positive")
        if not 0 <= self.dropped < 1:
            raise ValueError(f"condition_dropout is {self.condition_dropout}; it must lie in [0, 1)")
        if self.dropped == 0 and self.sampling.guided:
            raise ValueError(
                "sampling.guidance needs clips without a condition in training: give --condition-dropout 0.1, or leave it out"
            )
        if self.live and self.tokens is not None:
            raise ValueError(f"live encodes the clips of `data`, but tokens is {self.tokens}: leave one of them out")

    @property
    def dropped(self) -> float:
        """The share of clips without a condition, which may be left to the task."""
        if self.condition_dropout is not None:
            return self.condition_dropout
        return 0.1 if self.task == "class" else 0.0

    @property
    def given_frames(self) -> int:
        """The given frames of a clip; 0 where the task has none."""
        return self.condition_frames if self.task == "frame-prediction" else 0

    def in_steps(self, clips: int) -> "TrainGeneratorConfig":
        """The same config with the length of the run in steps, for epochs of so many clips."""
        if self.steps is not None:
            return self
        steps = 1000 if self.epochs is None else max(1, round(self.epochs * clips / self.batch_size))
        return replace(self, steps=steps, epochs=None)


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
        model = build_model(config, source)
        parameters = model.num_parameters()  # before the engine may shard them
        samples = open_samples(config, held_out, tokenizer, model.config, ranks)
        engine = make_generator_engine(config, model, len(source), ranks)
        check_wandb(config.wandb)
        # Last, so that a mistake in the options leaves no run folder behind.
        engines, model_id = {"generator": engine}, identity(engine, source, held_out, config)
        options = to_dict(config) | {"recipe": recipe}
        saved = open_run(config.out, options, config.resume, config.steps, engines, model_id)
        best: dict[str, float] = {}
        if saved is not None:
            load_state(engines, saved, model_id)
            best = saved.extra
        finished = fit(engine, source, held_out, config, best, samples)
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
            report["samples"] = samples and samples.write_gallery(
                LarpGenerator.from_pretrained(config.out / "model", device=ranks.device), config.out / "samples"
            )
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
    """Make ready what is sampled on the way; None if nothing is, or its tokenizer is gone. It draws random numbers."""
    if config.sampling.clips == 0 or not (tokenizer := tokenizer or tokenizer_of(held_out, ranks)):
        return None
    guidance = config.sampling.ramp(GUIDANCE if config.dropped else 1.0)
    return Samples(config.sampling, guidance, tokenizer, held_out, shape, config.seed, ranks)


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
    return LarpGenerator(shape)


def make_generator_engine(config: TrainGeneratorConfig, model: LarpGenerator, clips: int, ranks: Ranks) -> Engine:
    """Put a generator and its optimizer under DeepSpeed, for epochs of so many clips."""
    optimizer = build_optimizer(model, config.optimizer, config.engine.zero_stage)
    factor = config.optimizer.lr_factor(config.steps, steps_per_epoch=clips / config.batch_size)
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
    best: dict[str, float],
    samples: Samples | None = None,
) -> bool:
    """Train to `config.steps`; False if the run was asked to stop before.

    `best` takes the step and the scores of the weights that model/ holds, and goes into the checkpoints.
    """
    values: list[dict[str, float]] = []
    shown = ("loss", "bits_per_token", "top1", "top5")
    with RunLog(config.out, engine.ranks, config.steps, engine.step_count, shown, config.wandb, to_dict(config)) as log:
        while engine.step_count < config.steps:
            values.append(train_step(engine, micro_batches(source, engine, config)))
            step, scores = engine.step_count, {}
            if step % config.eval_every == 0 or step == config.steps:
                scores = validate(engine, held_out, config)
                if not config.keep_best or scores["bits_per_token"] < best.get("bits_per_token", math.inf):
                    best.update(scores, best_step=step)
                    save_model(engine, config.out / "model")
            if samples and config.sampling.every and step % config.sampling.every == 0 and step < config.steps:
                samples.write_sheet(current_model(engine), config.out / "samples" / f"step-{step:08d}.png")
            if scores or step % config.log_every == 0:
                mean = {name: sum(value[name] for value in values) / len(values) for name in values[0]}
                log.metrics(
                    step,
                    backend.reduce_mean(mean)
                    | scores
                    | {**engine.learning_rates, "grad_norm": engine.grad_norm or 0.0},
                )
                values = []
            log.progress(step)
            stop = backend.stop_requested()
            if stop or step % config.save_every == 0 or step == config.steps:
                same = identity(engine, source, held_out, config)
                save_state({"generator": engine}, config.out, step, {}, best, model=same)
            if stop and step < config.steps:
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
            drawn = BatchNoise(config.seed, step, config.batch_size, offset, len(codes), codes.device).uniform()
            hidden = (drawn < config.dropped).view(-1, *[1] * (condition.dim() - 1))
            condition = torch.where(hidden, engine.module.unconditional(condition), condition)
        yield codes, condition


def train_step(engine: Engine, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Train on the micro batches (codes, condition) of one step; return mean loss (nats per code) and accuracy."""
    engine.module.train()
    losses, hits = [], []
    for codes, condition in batches:
        logits = engine(codes, condition)
        loss = code_loss(logits, codes)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
        hits.append((logits.detach().argmax(-1) == codes).float().mean())
    return {"loss": torch.stack(losses).mean().item(), "train_top1": torch.stack(hits).mean().item()}


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
