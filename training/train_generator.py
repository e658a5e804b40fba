"""Train the autoregressive generator on a token cache, and sample clips from it at the end.

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

from larp.config import parse, run_script, to_dict
from larp.data.clips import clip_to_frames, contact_sheet
from larp.data.datasets import open_videos
from larp.data.extraction import extract_tokens
from larp.data.tokens import TokenCache, batch_rows
from larp.data.video import write_video
from larp.engine import backend
from larp.engine.backend import Engine, EngineConfig, Ranks, make_engine
from larp.engine.log import RunLog, check_wandb, write_json
from larp.engine.optimizer import OptimizerConfig, build_optimizer
from larp.engine.state import load_state, open_run, save_state
from larp.generator import GeneratorConfig, LarpGenerator, Task, code_loss
from larp.noise import BatchNoise
from larp.sampling import check_sampling, generate
from larp.tokenizer import LarpTokenizer

import torch
from torch import Tensor
from tqdm import tqdm

RECIPES = Path(__file__).parent / "recipes"
SAMPLE_FPS = 12
SAMPLE_BATCH = 8


@dataclass(frozen=True)
class SamplingConfig:
    """The clips that are sampled when training ends."""

    clips: int = 16
    """How many; class-conditional runs go round the classes. 0 samples nothing."""
    guidance: float = 1.25
    """Guidance scale of class-conditional clips; 1 is off."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        check_sampling(self.temperature, self.top_k, self.top_p, self.guidance)


@dataclass(frozen=True)
class TrainGeneratorConfig:
    """Train the autoregressive generator on a token cache."""

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
    stride: int = 1
    """When extracting: every n-th frame of a video is a frame of the clip."""
    windows: int = 1
    """When extracting: clips of a video at most."""
    flips: bool = False
    """When extracting: every clip mirrored as well."""
    condition_frames: int = 5
    """When extracting for frame prediction: given frames."""
    out: Path = Path("runs/generator")
    """Run folder."""
    size: str = "tiny"
    """A row of larp.generator.SIZES: tiny, mini, S, B, L, LP, XL, XXL, XXXL."""
    dropout: float = 0.1
    class_dropout: float = 0.1
    """Share of training clips that are shown as of no class, which guidance needs."""
    steps: int = 1000
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
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.class_dropout < 1:
            raise ValueError(f"class_dropout is {self.class_dropout}; it must lie in [0, 1)")
        if self.engine.zero_stage == 3:
            raise ValueError(
                "engine.zero_stage 3 shards the weights that validation and saving need whole: use 0, 1 or 2"
            )


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
        cache, held_out = open_caches(config, ranks)
        engine = make_generator_engine(config, cache, ranks)
        check_wandb(config.wandb)
        # Last, so that a mistake in the options leaves no run folder behind.
        saved = open_run(config.out, to_dict(config) | {"recipe": recipe}, config.resume)
        best: dict[str, float] = {}
        if saved is not None:
            load_state({"generator": engine}, saved, identity(engine, cache, held_out, config))
            best = saved.extra
        finished = fit(engine, cache, held_out, config, best)
        report = {
            "finished": finished,
            "task": config.task,
            "recipe": recipe,
            "size": config.size,
            "parameters": engine.module.num_parameters(),
            "steps": engine.step_count,
            "clips": len(cache),
            "held_out_clips": len(held_out),
            "skipped_videos": len(cache.skipped),
            **best,
            "uniform_bits_per_token": math.log2(cache.codebook_size),
            "model": str(config.out / "model"),
        }
        if finished and ranks.is_main:
            report["samples"] = write_samples(config, held_out, ranks.device)
            report["seconds"] = round(time.time() - began, 1)
            write_json(config.out / "report.json", report)
            print(
                f"held out: {best['bits_per_token']:.3f} bits per token, top-1 {best['top1']:.3f},"
                f" top-5 {best['top5']:.3f}"
            )
            print(f"report: {config.out / 'report.json'}")
        backend.barrier()
        return report
    finally:
        backend.finish()


def make_generator_engine(config: TrainGeneratorConfig, cache: TokenCache, ranks: Ranks) -> Engine:
    """Build the generator for the codes and classes of a cache, and its optimizer, under DeepSpeed."""
    classes = cache.classes if config.task == "class" else ()
    model = LarpGenerator(
        GeneratorConfig.of_size(
            config.size,
            task=config.task,
            num_tokens=cache.num_tokens,
            codebook_size=cache.codebook_size,
            dropout=config.dropout,
            num_classes=max(1, len(classes)),
            class_names=classes,
            tokenizer_hash=cache.key["tokenizer"],
        )
    )
    optimizer = build_optimizer(model, config.optimizer, config.engine.zero_stage)
    factor = config.optimizer.lr_factor(config.steps, steps_per_epoch=len(cache) / config.batch_size)
    engine = make_engine(model, optimizer, factor, config.engine, config.batch_size, ranks, name="generator")
    # From here on dropout differs between ranks; the weights above had to be the same.
    torch.manual_seed(config.seed * 1000 + ranks.rank)
    return engine


def open_caches(config: TrainGeneratorConfig, ranks: Ranks) -> tuple[TokenCache, TokenCache]:
    """Return the caches to train and to validate on, extracted first if need be; ValueError if they do not fit."""
    if config.tokens is None:
        if not (config.tokenizer and config.data):
            raise ValueError(
                "nothing to train on: give --tokens DIR (made by training/extract_tokens.py), or --tokenizer and --data"
                " to extract tokens first, for example --tokenizer runs/tokenizer/model --data shapes:"
            )
        cache = extract_split(config, ranks, config.data, "train")
        held_out = extract_split(config, ranks, config.eval_data or config.data, "test")
    else:
        cache = TokenCache.open(config.tokens)
        if config.tokenizer:
            cache.load_tokenizer(config.tokenizer)
        if config.eval_tokens is None:
            cache, held_out = cache.hold_out()
        else:
            same = ("tokenizer", "num_tokens", "codebook_size", "frames", "stride", "condition_frames", "code_version")
            held_out = TokenCache.open(config.eval_tokens, {name: cache.key[name] for name in same})
    cache.require(config.task, str(config.tokens or config.data))
    held_out.require(config.task, str(config.eval_tokens or config.eval_data or config.data), cache.classes)
    return cache, held_out


def extract_split(config: TrainGeneratorConfig, ranks: Ranks, data: str, split: str) -> TokenCache:
    """Extract the tokens of one split of a data spec into the run folder."""
    folder = config.out / f"tokens-{split}"
    if ranks.is_main:
        print(f"tokens of {data} ({split}) go to {folder}; give --tokens to use a cache that is there already")
    return extract_tokens(
        LarpTokenizer.from_pretrained(config.tokenizer, device=ranks.device),
        open_videos(data, split),
        split,
        folder,
        stride=config.stride,
        windows=config.windows if split == "train" else 1,
        flips=config.flips and split == "train",
        condition_frames=config.condition_frames if config.task == "frame-prediction" else 0,
        tokenizer_name=config.tokenizer,
        rank=ranks.rank,
        world_size=ranks.world_size,
        barrier=backend.barrier,
    )


def fit(
    engine: Engine, cache: TokenCache, held_out: TokenCache, config: TrainGeneratorConfig, best: dict[str, float]
) -> bool:
    """Train to `config.steps`; False if the run was asked to stop before.

    `best` takes the step and the scores of the weights that model/ holds, and goes into the checkpoints.
    """
    values: list[dict[str, float]] = []
    shown = ("loss", "bits_per_token", "top1", "top5")
    with RunLog(config.out, engine.ranks, config.steps, engine.step_count, shown, config.wandb, to_dict(config)) as log:
        while engine.step_count < config.steps:
            values.append(train_step(engine, micro_batches(cache, engine.step_count, config, engine.ranks)))
            step, scores = engine.step_count, {}
            if step % config.eval_every == 0 or step == config.steps:
                scores = validate(engine, held_out, config)
                if not config.keep_best or scores["bits_per_token"] < best.get("bits_per_token", math.inf):
                    best.update(scores, best_step=step)
                    if engine.ranks.is_main:
                        engine.module.save_pretrained(config.out / "model")
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
                same = identity(engine, cache, held_out, config)
                save_state({"generator": engine}, config.out, step, {}, best, model=same)
            if stop and step < config.steps:
                log.say(f"stopped at step {step}; go on with --resume")
                return False
    return True


def identity(engine: Engine, cache: TokenCache, held_out: TokenCache, config: TrainGeneratorConfig) -> dict:
    """Return what must be the same when a run is resumed, as plain values.

    The model; the data, seed and batch size, which say what a step trains on; and the clips that `best` is measured on.
    """
    return {
        "model": to_dict(engine.module.config),
        "seed": config.seed,
        "batch_size": config.batch_size,
        "tokens": cache.key | {"clips": len(cache)},
        "eval_tokens": held_out.key | {"clips": len(held_out)},
    }


def micro_batches(
    cache: TokenCache, step: int, config: TrainGeneratorConfig, ranks: Ranks
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's (codes (b, N), condition) of a step: a contiguous slice of the global batch, in equal parts.

    Rows, and the classes that are dropped, depend on the seed and the position in the global batch only.
    """
    rows = batch_rows(len(cache), step, config.batch_size, config.seed)
    size = backend.micro_batch(config.batch_size, config.engine.accumulation, ranks)
    first = ranks.rank * size * config.engine.accumulation
    for offset in range(first, first + size * config.engine.accumulation, size):
        codes, condition = cache.batch(rows[offset : offset + size], config.task, ranks.device)
        if config.task == "class":
            drawn = BatchNoise(config.seed, step, config.batch_size, offset, size, ranks.device).uniform()
            condition = torch.where(drawn < config.class_dropout, len(cache.classes), condition)
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


@torch.no_grad()
def validate(engine: Engine, cache: TokenCache, config: TrainGeneratorConfig) -> dict[str, float]:
    """Return bits_per_token, bits_per_clip, top1 and top5 over all rows of a cache, shared out over the ranks."""
    ranks, model = engine.ranks, engine.module.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    own = torch.arange(ranks.rank, len(cache), ranks.world_size)
    for rows in own.split(max(1, config.batch_size // (ranks.world_size * config.engine.accumulation))):
        codes, condition = cache.batch(rows, config.task, ranks.device)
        with engine.autocast():
            logits = model(codes, condition)
        likeliest = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == codes[..., None]
        nats = code_loss(logits, codes).item() * codes.numel()
        sums += torch.tensor(
            [nats, likeliest[..., 0].sum().item(), likeliest.sum().item(), codes.numel()], dtype=torch.float64
        )
    nats, top1, top5, count = backend.reduce_sum(sums).tolist()
    bits = nats / count / math.log(2)
    return {
        "bits_per_token": bits,
        "bits_per_clip": bits * cache.num_tokens,
        "top1": top1 / count,
        "top5": top5 / count,
    }


def write_samples(config: TrainGeneratorConfig, held_out: TokenCache, device: torch.device) -> str | None:
    """Sample clips from model/, write each as an MP4 and all into samples/sheet.png; return the sheet's path.

    A run whose tokenizer cannot be loaded says so and returns None: the model is worth more than its samples.
    """
    if config.sampling.clips == 0:
        return None
    model = LarpGenerator.from_pretrained(config.out / "model", device=device)
    try:
        tokenizer = held_out.load_tokenizer(config.tokenizer, device)
        model.check_tokenizer(tokenizer.num_tokens, tokenizer.codebook_size, tokenizer.weight_hash())
    except ValueError as error:
        print(f"no samples: {error}")
        return None
    names, condition = sample_conditions(config, model, held_out)
    sampling, videos = config.sampling, []
    for start in tqdm(range(0, len(names), SAMPLE_BATCH), desc="sampling clips"):
        codes = generate(
            model,
            condition[start : start + SAMPLE_BATCH],
            guidance=sampling.guidance if config.task == "class" else 1.0,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=config.seed,
            first_row=start,
            progress=True,
        )
        videos += [clip_to_frames(clip) for clip in tokenizer.decode(codes)]
    folder = config.out / "samples"
    for number, (name, video) in enumerate(zip(names, videos, strict=True)):
        write_video(folder / f"{number:03d}-{name.replace('/', '-').replace(' ', '-')}.mp4", video, SAMPLE_FPS)
    contact_sheet(videos, names, folder / "sheet.png")
    return str(folder / "sheet.png")


def sample_conditions(
    config: TrainGeneratorConfig, model: LarpGenerator, held_out: TokenCache
) -> tuple[list[str], Tensor]:
    """Return names and conditions of the clips to sample: the classes in turn, or given frames of held-out videos."""
    if config.task == "class":
        names = [model.config.class_names[number % model.config.num_classes] for number in range(config.sampling.clips)]
        return names, model.class_labels(names)
    rows = torch.arange(min(config.sampling.clips, len(held_out)))
    names = [held_out.names[row].rsplit(".", 1)[0] for row in rows.tolist()]
    return names, held_out.batch(rows, config.task, torch.device("cpu"))[1]


if __name__ == "__main__":
    run_script("train_generator.py", main)
