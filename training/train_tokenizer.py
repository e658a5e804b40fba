"""Train a LARP tokenizer with its prior: `deepspeed training/train_tokenizer.py [--recipe NAME] [--data SPEC] ...`.

One CPU process and many GPUs take the same path: the batch is global, and the random numbers belong to its rows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from larp.config import parse, to_dict
from larp.data.clips import ClipShape
from larp.data.datasets import VideoSet, open_videos
from larp.data.in_memory_clips import ResidentClips
from larp.data.listing import skipped_lines
from larp.data.loader import ClipLoader
from larp.engine import backend
from larp.engine.adversary import Adversary, open_adversary
from larp.engine.backend import Engine, Ranks
from larp.engine.clock import Clock
from larp.engine.codebook_reset import CodebookTracker
from larp.engine.distributed import main_first
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
from larp.engine.schedules import ramp
from larp.engine.signals import run_script
from larp.engine.tokenizer_settings import TrainTokenizerConfig
from larp.engine.trained_weights import take_weights
from larp.engine.untrusted import naming_damaged
from larp.files import write_json
from larp.metrics import lpips
from larp.metrics.reconstruction import ValidationMetrics
from larp.metrics.validation import TokenizerValidation, open_validation, quality
from larp.metrics.weights import WeightsMissing
from larp.models.growing import grown
from larp.models.noise import BatchNoise
from larp.models.objective import LpipsNet, tokenizer_loss
from larp.models.tokenizer import LarpTokenizer, sample_prefix_lengths

import torch
from torch import Tensor, nn

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "tokenizer-shapes32"
# What a validation prints of its figures.
SUMMARY = ("psnr", "ema_psnr", "mean_colour_psnr", "ssim", "lpips", "ema_lpips", "rfvd", "codes_used", "prior_top1")


@dataclass
class Trainer:
    """All that a step needs."""

    config: TrainTokenizerConfig
    ranks: Ranks
    clock: Clock
    tokenizer: Engine
    adversary: Adversary | None
    perceptual: nn.Module | None
    """Maps two clips to their LPIPS (B,)."""
    metrics: ValidationMetrics
    """LPIPS and rFVD of validation, where their weights are at hand."""
    codes: CodebookTracker
    quantizing: bool = False
    """Whether the last step had the quantizer."""
    best: dict[str, float] = field(default_factory=dict)
    """Figures of the weights in model/, with `keep_best`."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of the videos that were skipped before the run was resumed."""

    @property
    def engines(self) -> dict[str, Engine]:
        """By name, in the order in which they are saved: the tokenizer last."""
        return ({"discriminator": self.adversary.engine} if self.adversary else {}) | {"tokenizer": self.tokenizer}

    def state_dict(self) -> dict:
        """Return what a checkpoint holds beside the engines. Collective."""
        adversary = self.adversary.state_dict() if self.adversary else {}
        return {"adversary": adversary, "best": self.best, "quantizing": self.quantizing, **self.codes.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Load what `state_dict` returned, after the engines."""
        # Checkpoints of earlier versions hold neither.
        self.quantizing = state.get("quantizing", self.tokenizer.step_count > self.config.quantized_from)
        self.best = state.get("best", {})
        if self.adversary is not None:
            self.adversary.load_state_dict(state["adversary"])
        self.codes.load_state_dict(state)


def main(argv: list[str] | None = None) -> dict:
    """Parse the command line, train, save the model, and return the report; ValueError for mistakes of the user."""
    options = sys.argv[1:] if argv is None else argv
    config, recipe = parse(
        TrainTokenizerConfig, options, RECIPES, "train_tokenizer.py", DEFAULT_RECIPE, TrainTokenizerConfig.adjusted
    )
    # Not a matter of the recipe alone, which need not name the tokenizer.
    if config.train == "refiner" and config.start_from is None:
        raise ValueError("train = refiner is for a trained tokenizer: name it with --start-from")
    if argv is None:
        spread(config.engine, config.batch_size)
    ranks = backend.start(config.seed)
    try:
        check_run(config)  # before videos are rendered or listed
        if ranks.is_main and recipe == DEFAULT_RECIPE and config.data.startswith("shapes:"):
            print(
                f"recipe {recipe}: a tiny tokenizer on the built-in videos. For real data: "
                "--recipe tokenizer-ucf64 --data ucf101:/path/to/UCF101 (recipes: training/recipes)"
            )
        # The first process writes the indices of shards, which the others read.
        train = main_first(lambda: open_videos(config.data, "train"))
        test = main_first(lambda: open_validation(config.eval_data or config.data, config.keep_best))
        for note in dict.fromkeys((*train.notes, *test.notes)) if ranks.is_main else ():
            print(note)
        config = config.in_steps(len(train))
        report = fit(build(config, ranks, len(train)), train, test)
        # Nobody leaves while another still works: a rank that closes its connections early can abort at its exit.
        backend.barrier()
        return report
    finally:
        backend.finish()


# --------------------------------------------------------------------------------------------------------- data and model


def open_loader(config: TrainTokenizerConfig, train: VideoSet, shape: ClipShape, ranks: Ranks) -> ClipLoader:
    """Open the training clips of this process."""
    micro = backend.micro_batch(config.batch_size, config.engine.accumulation, ranks)
    shared = (train, shape, config.batch_size, micro, config.seed, ranks.rank, ranks.world_size)
    if config.crop:
        return ResidentClips(*shared, flip=config.flip, device=ranks.device)
    workers = 0 if config.in_memory else config.workers
    return ClipLoader(*shared, flip=config.flip, workers=workers, in_memory=config.in_memory)


def build(config: TrainTokenizerConfig, ranks: Ranks, videos: int) -> Trainer:
    """Build models, optimizers and engines for a run on so many training videos."""
    torch.manual_seed(config.seed)
    tokenizer = LarpTokenizer(config.model).to(ranks.device)
    if config.start_from is not None:
        take_weights(tokenizer, config.start_from, optional="prior", fit=lambda trained: grown(trained, config.model))
    if config.train == "refiner":
        tokenizer.requires_grad_(False)
        tokenizer.refiner.requires_grad_(True)
    clock = Clock(config.steps, config.minutes)
    factor = clock.on_schedule(config.optimizer.lr_factor(config.steps, steps_per_epoch=videos / config.batch_size))
    optimizer = build_optimizer(tokenizer, config.optimizer, config.engine.zero_stage, config.engine.precision)
    engine = backend.make_engine(
        tokenizer, optimizer, factor, config.engine, config.batch_size, ranks,
        name="tokenizer", max_zero_stage=2, ema=config.ema,
    )  # fmt: skip
    # The discriminator's learning rate follows the tokenizer's schedule, read at the tokenizer's steps.
    adversary = open_adversary(
        config.adversary, config.loss, config.model, lambda _: factor(engine.step_count), config.engine,
        config.batch_size, ranks,
    )  # fmt: skip
    perceptual = load_lpips(config.loss.lpips_net).to(ranks.device) if config.loss.lpips > 0 else None
    metrics = ValidationMetrics()
    if ranks.is_main:
        published = perceptual if config.loss.lpips_net == "vgg16" else None
        metrics = ValidationMetrics.with_available_weights(config.model.clip_shape, ranks.device, published)
    codes = CodebookTracker(engine, config.resets_codes, config.seed)
    return Trainer(config, ranks, clock, engine, adversary, perceptual, metrics, codes)


def load_lpips(net: LpipsNet) -> nn.Module:
    """Load LPIPS with its published weights. ValueError if they are missing: training without LPIPS must be asked for."""
    try:
        return lpips.MeanLpips.load() if net == "both" else lpips.Lpips.load(net=net)
    except WeightsMissing as error:
        raise WeightsMissing(f"{error}; or train without LPIPS: --loss.lpips 0") from error


# --------------------------------------------------------------------------------------------------------------- training


def fit(trainer: Trainer, train: VideoSet, test: VideoSet) -> dict:
    """Train, save the model, and return the report, which also lies in the run folder; of a stopped run, where it stopped."""
    config, clock = trainer.config, trainer.clock
    shape = ClipShape(*config.model.clip_shape, config.stride)
    validation = TokenizerValidation(test, shape, config.eval_clips, config.workers, trainer.metrics)
    validation.check_readable()
    loader = open_loader(config, train, shape, trainer.ranks)
    for engine in trainer.engines.values():
        engine.clips_of = loader.clips_of
    saved = open_training(config, to_dict(config), clock, trainer.engines, config.identity)
    if saved is not None:
        with naming_damaged(saved.folder):
            loader.load_state_dict(saved.loader_state)
            trainer.skipped = skipped_before(saved)
            trainer.load_state_dict(saved.extra)
    began = time.monotonic()
    with open_log(config, trainer.ranks, clock, ("loss", "psnr", "prior_top1")) as log:
        log_setup(trainer, train, test, log)
        report = loop(trainer, loader, validation, log)
        if report is None:
            return stopped(config, clock.step, log)
        skipped = skipped_videos(loader.skipped, trainer.skipped)
        for line in skipped_lines(skipped):
            log.say(line)
    report |= {
        "steps": clock.step,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "skipped_videos": len(skipped),
        "skipped_updates": trainer.tokenizer.skipped_count,
    }
    if trainer.adversary is not None:
        report["skipped_discriminator_updates"] = trainer.adversary.engine.skipped_count
    if config.keep_best:
        report["best"] = trainer.best
    if trainer.ranks.is_main:
        folder = config.out / "model" if config.keep_best else save_model(trainer)
        write_json(config.out / "report.json", report)
        print(f"wrote {folder}, {config.out / 'report.json'} and pictures in {config.out / 'samples'}")
    return report


def loop(trainer: Trainer, loader: ClipLoader, validation: TokenizerValidation, log: RunLog) -> dict | None:
    """Train to the end of the clock and return the figures of the last validation; None if the run was asked to stop before."""
    config, clock, report = trainer.config, trainer.clock, None
    batches = iter(loader)
    trainer.tokenizer.module.train()
    while not clock.done:
        losses = train_step(trainer, batches)
        clock.advance()
        step, last = clock.step, clock.done
        if step % config.log_every == 0:
            values = backend.reduce_mean(losses) | trainer.codes.usage() | step_metrics(trainer.tokenizer, clock)
            if config.temperature_start is not None:
                values["temperature"] = config.temperature(clock.before)
            log.metrics(step, values)
        stop = step % 10 == 0 and backend.stop_requested()
        if last or (clock.due(config.eval_every) and not stop):
            report = check(trainer, validation, log)
        # After the validation of the step, whose `best` belongs to model/.
        skipping = any(engine.is_skipping for engine in trainer.engines.values())
        if stop or last or (clock.due(config.save_every) and not skipping):
            place = loader.state_dict() | {"skipped": skipped_videos(loader.skipped, trainer.skipped)}
            save_training(config, clock, trainer.engines, config.identity, place, trainer.state_dict())
        if stop and not last:
            return None
    # A run that is resumed at its end trains nothing, and validates again for its report.
    return check(trainer, validation, log, logged=True) if report is None else report


def train_step(trainer: Trainer, batches: Iterator[dict]) -> dict[str, Tensor]:
    """Train one step, on one global batch in micro batches; return its losses by name, means over this process."""
    config, place = trainer.config, trainer.clock.position
    quantize = place >= config.quantized_from
    if quantize and config.quantized_from and not trainer.quantizing:
        trainer.codes.reset(all_codes=True)
    trainer.quantizing = quantize
    sums: dict[str, Tensor] = {}
    for _ in range(config.engine.accumulation):
        losses = train_micro_batch(trainer, next(batches), quantize)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach() / config.engine.accumulation
    due = config.resets_codes and config.reset_codes_every and trainer.clock.due(config.reset_codes_every)
    if quantize and due and place < 0.9 * config.steps:
        trainer.codes.reset(all_codes=False)
    return sums


def train_micro_batch(trainer: Trainer, batch: dict, quantize: bool) -> dict[str, Tensor]:
    """Train tokenizer and discriminator on one micro batch; return its losses by name. quantize: with the quantizer."""
    config, engine, place = trainer.config, trainer.tokenizer, trainer.clock.position
    step = engine.step_count
    adversary = trainer.adversary if trainer.adversary is not None and trainer.adversary.is_active(place) else None
    perceptual = trainer.perceptual if place >= config.loss.lpips_start else None
    clip = batch["clip"].to(trainer.ranks.device)
    noise = BatchNoise(config.seed, step, config.batch_size, batch["sample_offset"], len(clip), trainer.ranks.device)
    prefixes = None
    if config.model.nested:
        prefixes = sample_prefix_lengths(noise, config.prefix_share, config.prefix_shortest, config.model.num_tokens)
    if config.train == "refiner":
        # It sees the codes that are decoded later, the nearest ones; nothing is sampled, by the prior either.
        out = engine(clip, None, 0.0, quantize, prefixes)
    else:
        mix = ramp(place, config.steps, config.mix_ramp, config.mix_peak)
        out = engine(clip, noise, mix, quantize, prefixes, config.temperature(place))
    with engine.autocast():
        loss, parts = tokenizer_loss(config.loss, clip, out, perceptual, noise)
    with nullcontext() if adversary is None else adversary.frozen():
        if adversary is not None:
            parts["gan"] = adversary.generator_loss(out.reconstruction)
            loss = loss + config.loss.gan * parts["gan"]
        engine.backward(loss)
    engine.step()
    if adversary is not None and adversary.is_update_step(place, step):
        parts["discriminator"] = adversary.update(clip, out.reconstruction.detach(), noise, step)
    trainer.codes.observe(out)
    return {"loss": loss, **parts}


def check(trainer: Trainer, validation: TokenizerValidation, log: RunLog, logged: bool = False) -> dict[str, float]:
    """Validate on the main process, and with `keep_best` save the model if it is the best so far. Collective.

    logged: metrics.jsonl has these figures already.

    Returns the figures on the main process, and an empty dict on the others.
    """
    figures: dict[str, float] = {}
    if trainer.ranks.is_main:
        step = trainer.clock.step
        pictures = trainer.config.out / "samples" / f"reconstruction-{step:06d}"
        figures = validation.evaluate(trainer.tokenizer, pictures)
        if not logged:
            log.metrics(step, {f"test_{name}": value for name, value in figures.items()})
        shown = {name: round(figures[name], 3) for name in SUMMARY if name in figures}
        log.say(f"step {step}, {figures['num_clips']} test clips: {shown}")
        if trainer.config.keep_best and (not trainer.best or quality(figures) > quality(trainer.best)):
            trainer.best = figures | {"step": step}
            save_model(trainer)
    backend.barrier()
    return figures


def save_model(trainer: Trainer) -> Path:
    """Write the weights of this moment, and their average where there is one, into OUT/model."""
    average = trainer.tokenizer.average
    return trainer.tokenizer.module.save_pretrained(trainer.config.out / "model", ema=average and average.module)


def log_setup(trainer: Trainer, train: VideoSet, test: VideoSet, log: RunLog) -> None:
    """Log what is about to be trained, and on what."""
    model = trainer.tokenizer.module
    prior = sum(p.numel() for p in model.prior.parameters()) if model.prior is not None else 0
    epochs = trainer.config.steps * trainer.config.batch_size / len(train)
    minutes = trainer.config.minutes
    length = f"{trainer.config.steps} steps or {epochs:.1f} epochs" if minutes is None else f"{minutes:g} minutes"
    log.say(
        f"tokenizer of {(model.num_parameters() - prior) / 1e6:.1f} M parameters, prior {prior / 1e6:.1f} M, "
        f"on {len(train)} clips of {train.spec} ({len(test)} to test), {trainer.ranks.world_size} process(es), "
        f"{length}"
    )
    for note in dict.fromkeys((*trainer.config.notes, *trainer.metrics.notes)):
        log.say(note)


if __name__ == "__main__":
    run_script("train_tokenizer.py", main)
