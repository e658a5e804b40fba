"""Train a LARP tokenizer with its prior: `deepspeed training/train_tokenizer.py [--recipe NAME] [--data SPEC] ...`.

One CPU process and many GPUs take the same path: the batch is global, and the random numbers belong to its rows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from larp.config import parse, to_dict
from larp.data.clips import ClipShape
from larp.data.datasets import VideoSet, open_videos
from larp.data.listing import NoSplitError
from larp.data.loader import ClipLoader, iterate_once
from larp.data.resident import ResidentClips
from larp.engine import backend
from larp.engine import checkpoint as state
from larp.engine.adversary import Adversary
from larp.engine.backend import Engine, Ranks
from larp.engine.checkpoint import take_weights
from larp.engine.clock import Clock
from larp.engine.log import RunLog, check_wandb
from larp.engine.optimizer import build_optimizer
from larp.engine.schedules import ramp
from larp.engine.signals import run_script
from larp.engine.tokenizer_settings import TrainTokenizerConfig
from larp.files import write_json
from larp.metrics import lpips
from larp.metrics.reconstruction import Reconstruction, ValidationMetrics, reconstruct
from larp.metrics.weights import WeightsMissing
from larp.models.discriminator import Discriminator
from larp.models.noise import BatchNoise
from larp.models.objective import tokenizer_loss
from larp.models.quantizer import CodebookResetter, add_counts, usage_of_counts
from larp.models.tokenizer import LarpTokenizer, TokenizerOutput, sample_prefix_lengths

import torch
import torch.nn.functional as F
from torch import Tensor

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
    perceptual: lpips.Lpips | None
    watch: ValidationMetrics
    """LPIPS and rFVD of validation, where their weights are at hand."""
    resetter: CodebookResetter | None
    counts: Tensor
    """How often each code was sampled since the last line of the log, by this process."""
    quantizing: bool = False
    """Whether the last step had the quantizer."""
    best: dict[str, float] = field(default_factory=dict)
    """Figures of the weights in model/, where the best ones are kept."""

    @property
    def engines(self) -> dict[str, Engine]:
        """In the order in which they are saved: the tokenizer is the commit."""
        return ({"discriminator": self.adversary.engine} if self.adversary else {}) | {"tokenizer": self.tokenizer}


def build(config: TrainTokenizerConfig, ranks: Ranks, videos: int) -> Trainer:
    """Make the models, optimizers and engines of a run on so many training videos."""
    torch.manual_seed(config.seed)
    tokenizer = LarpTokenizer(config.model).to(ranks.device)
    if config.start_from is not None:
        take_weights(tokenizer, config.start_from)
    c, o = config.model, config.optimizer
    clock = Clock(config.steps, config.minutes)
    factor = clock.on_schedule(o.lr_factor(config.steps, steps_per_epoch=videos / config.batch_size))
    optimizer = build_optimizer(tokenizer, o, config.engine.zero_stage)
    engine = backend.make_engine(
        tokenizer, optimizer, factor, config.engine, config.batch_size, ranks,
        name="tokenizer", max_zero_stage=2, ema=config.ema,
    )  # fmt: skip
    adversary = None
    if config.loss.gan > 0:
        model = Discriminator(config.adversary.discriminator(c)).to(ranks.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.adversary.lr, betas=(0.5, 0.9))
        # Its learning rate follows the tokenizer's schedule, read at the tokenizer's steps.
        judge = backend.make_engine(
            model, optimizer, lambda _: factor(engine.step_count), config.engine, config.batch_size, ranks,
            name="discriminator", max_zero_stage=2,
        )  # fmt: skip
        adversary = Adversary(judge, config.loss)
    perceptual = load_lpips().to(ranks.device) if config.loss.lpips > 0 else None
    resetter = CodebookResetter(c.codebook_size) if config.resets_codes else None
    counts = torch.zeros(c.codebook_size, dtype=torch.int64, device=ranks.device)
    watch = ValidationMetrics.at_hand(c.clip_shape, ranks.device, perceptual) if ranks.is_main else ValidationMetrics()
    return Trainer(config, ranks, clock, engine, adversary, perceptual, watch, resetter, counts)


def load_lpips() -> lpips.Lpips:
    """LPIPS with its published weights; ValueError that names the files and the way out, since a run without is another run."""
    try:
        return lpips.Lpips.load()
    except WeightsMissing as error:
        raise WeightsMissing(f"{error}; or train without LPIPS: --loss.lpips 0") from error


def train_step(trainer: Trainer, batches: Iterator[dict]) -> dict[str, Tensor]:
    """Run one step, of one global batch in micro batches, and return its losses by name (means over this process)."""
    config, step, place = trainer.config, trainer.tokenizer.step_count, trainer.clock.position
    quantize = place >= config.quantized_from
    if quantize and config.quantized_from and not trainer.quantizing:
        reset_codes(trainer, all_codes=True)
    trainer.quantizing = quantize
    adversary = trainer.adversary if trainer.adversary is not None and trainer.adversary.takes_part(place) else None
    perceptual = trainer.perceptual if place >= config.loss.lpips_start else None
    mix = ramp(place, config.steps, config.mix_ramp, config.mix_peak)
    sums: dict[str, Tensor] = {}
    for _ in range(config.engine.accumulation):
        batch = next(batches)
        clip = batch["clip"].to(trainer.ranks.device)
        noise = BatchNoise(
            config.seed, step, config.batch_size, batch["sample_offset"], len(clip), trainer.ranks.device
        )
        keep = None
        if config.model.nested:
            keep = sample_prefix_lengths(noise, config.prefix_share, config.prefix_shortest, config.model.num_tokens)
        out = trainer.tokenizer(clip, noise, mix, quantize, keep, config.temperature(place))
        with trainer.tokenizer.autocast():
            loss, parts = tokenizer_loss(config.loss, clip, out, perceptual, noise)
        with nullcontext() if adversary is None else adversary.held():
            if adversary is not None:
                parts["gan"] = adversary.judge(out.reconstruction)
                loss = loss + config.loss.gan * parts["gan"]
            trainer.tokenizer.backward(loss)
        trainer.tokenizer.step()
        if adversary is not None and adversary.learns(place, step):
            parts["discriminator"] = adversary.learn(clip, out.reconstruction.detach(), noise)
        observe(trainer, out)
        for name, value in {"loss": loss, **parts}.items():
            sums[name] = sums.get(name, 0.0) + value.detach() / config.engine.accumulation
    if (
        quantize
        and config.reset_codes_every
        and trainer.clock.due(config.reset_codes_every)
        and place < 0.9 * config.steps
    ):
        reset_codes(trainer, all_codes=False)
    return sums


def observe(trainer: Trainer, out: TokenizerOutput) -> None:
    """Count the codes of a micro batch, and show the resetter the latents and codes of the global one."""
    codes = None if out.quantized is None else out.quantized.codes
    if codes is not None:
        add_counts(trainer.counts, codes)
    if trainer.resetter is not None:
        latents = backend.gather(F.normalize(out.latents.detach().float(), dim=-1))
        trainer.resetter.observe(latents, None if codes is None else backend.gather(codes))


def count_codes(trainer: Trainer) -> dict[str, float]:
    """Share of the codebook in use and perplexity of the codes of all processes since the last call; nothing before the quantizer."""
    counts = backend.reduce_sum(trainer.counts)
    trainer.counts.zero_()
    return usage_of_counts(counts) if counts.sum() else {}


def reset_codes(trainer: Trainer, all_codes: bool) -> None:
    """Put all codes where the latents are, or the idle ones on some of them; alike in every process."""
    quantizer, resetter = trainer.tokenizer.module.quantizer, trainer.resetter
    seed = trainer.config.seed + trainer.tokenizer.step_count
    moved = torch.arange(len(trainer.counts)) if all_codes else resetter.idle()
    renewed = resetter.cluster(seed=seed) if all_codes else resetter.resample(quantizer.codebook(), moved, seed)
    trainer.tokenizer.overwrite(quantizer.embedding.weight, renewed)
    if trainer.tokenizer.average is not None:
        # A code in a new place is another code: the average of the two places would be neither.
        table = trainer.tokenizer.average.module.quantizer.embedding.weight
        table[moved] = renewed[moved].to(table)


def open_validation(config: TrainTokenizerConfig) -> VideoSet:
    """The validation videos: the test split, but where the best weights are chosen by them the validation split, if the data have one."""
    data = config.eval_data or config.data
    if config.keep_best:
        with suppress(NoSplitError):
            return open_videos(data, "validation")
    return open_videos(data, "test")


def validate(trainer: Trainer, model: LarpTokenizer, videos: VideoSet, shape: ClipShape) -> Reconstruction:
    """Reconstruct the first validation clips (centres of the videos), the same ones each time, with this process alone."""
    chosen = replace(videos, items=spread(videos.items, trainer.config.eval_clips))
    batches = iterate_once(chosen, shape, batch=16, workers=trainer.config.workers)
    # Compiled blocks would be compiled again for each size of a validation batch.
    with trainer.tokenizer.autocast(), torch.compiler.set_stance("force_eager"):
        return reconstruct(model, batches, device=trainer.ranks.device, watch=trainer.watch)


def spread(items: tuple, count: int) -> tuple:
    """Choose `count` evenly spaced items, so that a validation set sorted by class shows every class."""
    return items if len(items) <= count else tuple(items[i * len(items) // count] for i in range(count))


def fit(trainer: Trainer, train: VideoSet, test: VideoSet) -> dict:
    """Train to the end (or until told to stop), validating and saving on the way; return the report."""
    config, c, ranks, clock = trainer.config, trainer.config.model, trainer.ranks, trainer.clock
    shape = ClipShape(c.num_frames, c.height, c.width, config.stride)
    micro = backend.micro_batch(config.batch_size, config.engine.accumulation, ranks)
    check_wandb(config.wandb)
    first_pass = iterate_once(test, shape, batch=1)
    if next(iter(first_pass), None) is None:
        name, reason = first_pass.skipped[0]
        raise ValueError(
            f"{test.spec}: none of its {len(test)} test videos can be read; give others with --eval-data ({name}: {reason})"
        )
    loader = open_loader(config, train, shape, micro, ranks)
    saved = state.open_run(config.out, to_dict(config), config.resume, clock.total, trainer.engines, identity(config))
    if saved is not None:
        state.load_state(trainer.engines, saved, identity(config))
        loader.load_state_dict(saved.loader_state)
        restore(trainer, saved.extra)
    began, first = time.monotonic(), trainer.tokenizer.step_count
    clock.start(first, elapsed=0.0 if saved is None else saved.extra.get("elapsed", 0.0))
    shown = ("loss", "psnr", "prior_top1")
    with RunLog(config.out, ranks, clock.total, first, shown, config.wandb, to_dict(config)) as log:
        log_setup(trainer, train, test, log)
        batches = iter(loader)
        trainer.tokenizer.module.train()
        while not clock.done:
            losses = train_step(trainer, batches)
            clock.advance()
            step, last = clock.step, clock.done
            if not step % config.log_every:
                values = backend.reduce_mean(losses) | count_codes(trainer)
                values |= {**trainer.tokenizer.learning_rates, "grad_norm": trainer.tokenizer.grad_norm or 0.0}
                if config.temperature_start is not None:
                    values["temperature"] = config.temperature(clock.before)
                log.metrics(step, values | clock.metrics)
            stop = backend.stop_requested() if not step % 10 else False
            if clock.due(config.save_every) or last or stop:
                state.save_state(
                    trainer.engines, config.out, step, loader.state_dict(), keep_extra(trainer), model=identity(config)
                )
            if clock.due(config.eval_every) and not last and not stop:
                check(trainer, test, shape, step, log)
            if stop and not last:
                log.say(f"stopped at step {step}, saved; go on with --resume --out {config.out}")
                return {"stopped_at": step}
        report = check(trainer, test, shape, clock.step, log)
        skipped = sorted({tuple(entry) for entries in backend.gather_objects(loader.skipped) for entry in entries})
        for name, reason in skipped:
            log.say(f"skipped {name}: {reason}")
        report |= {"steps": clock.step, "seconds": round(time.monotonic() - began, 1)}
        report |= {"cpu_seconds": round(time.process_time(), 1)}
        report |= {"skipped_videos": len(skipped), "skipped_updates": trainer.tokenizer.skipped_count}
    return report


def open_loader(
    config: TrainTokenizerConfig, train: VideoSet, shape: ClipShape, micro: int, ranks: Ranks
) -> ClipLoader:
    """The training clips of this process."""
    shared = (train, shape, config.batch_size, micro, config.seed, ranks.rank, ranks.world_size)
    if config.crop:
        return ResidentClips(*shared, flip=config.flip, device=ranks.device)
    workers = 0 if config.in_memory else config.workers
    return ClipLoader(*shared, flip=config.flip, workers=workers, in_memory=config.in_memory)


def check(trainer: Trainer, test: VideoSet, shape: ClipShape, step: int, log: RunLog) -> dict:
    """Validate on the main process, write pictures, and return the figures."""
    report: dict = {}
    if trainer.ranks.is_main:
        result = validate(trainer, trainer.tokenizer.module, test, shape)
        folder = trainer.config.out / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        result.write(str(folder / f"reconstruction-{step:06d}"), fps=8)
        report = result.metrics
        if trainer.tokenizer.average is not None:
            averaged = validate(trainer, trainer.tokenizer.average.module, test, shape)
            report |= {f"ema_{name}": averaged.metrics[name] for name in ("psnr", "lpips") if name in averaged.metrics}
        log.metrics(step, {f"test_{name}": value for name, value in report.items()})
        told = {name: round(report[name], 3) for name in SUMMARY if name in report}
        log.say(f"step {step}, {report['num_clips']} test clips: {told}")
        if trainer.config.keep_best and (not trainer.best or quality(report) > quality(trainer.best)):
            trainer.best = report | {"step": step}
            save_model(trainer)
    backend.barrier()
    return report


def quality(report: dict[str, float]) -> tuple[bool, float]:
    """How good the weights of a validation are, averaged ones where there are any; figures with LPIPS stand above those without."""
    name = "lpips" if "lpips" in report else "psnr"
    value = report.get(f"ema_{name}", report[name])
    return name == "lpips", -value if name == "lpips" else value


def save_model(trainer: Trainer) -> Path:
    """Write the weights of this moment, and their average where there is one, into OUT/model."""
    average = trainer.tokenizer.average
    return trainer.tokenizer.module.save_pretrained(trainer.config.out / "model", ema=average and average.module)


def identity(config: TrainTokenizerConfig) -> dict:
    """What must be the same when a run is resumed."""
    adversary = to_dict(config.adversary) if config.loss.gan > 0 else {}
    # The optimizer's parameter groups, and with them its state, are others where the prior has a rate of its own.
    own_rate = {"prior_lr": "the prior's own"} if config.optimizer.prior_lr is not None else {}
    return {
        "model": to_dict(config.model),
        "adversary": {k: v for k, v in adversary.items() if k != "lr"},
        "optimizer": {"name": config.optimizer.name, **own_rate},
        # What it has counted since the start cannot be made up for.
        "resets_codes": config.resets_codes,
    }


def keep_extra(trainer: Trainer) -> dict:
    """What a checkpoint holds beside the engines; every process calls it."""
    resetter = trainer.resetter.state_dict() if trainer.resetter else {}
    adversary = trainer.adversary.state_dict() if trainer.adversary else {}
    kept = {"elapsed": trainer.clock.elapsed, "best": trainer.best, "quantizing": trainer.quantizing}
    return {"adversary": adversary, "resetter": resetter, "counts": backend.reduce_sum(trainer.counts).cpu(), **kept}


def restore(trainer: Trainer, extra: dict) -> None:
    """Take up `keep_extra`."""
    # Runs of earlier versions kept neither.
    trainer.quantizing = extra.get("quantizing", trainer.tokenizer.step_count > trainer.config.quantized_from)
    trainer.best = extra.get("best", {})
    if trainer.adversary is not None:
        trainer.adversary.load_state_dict(extra["adversary"])
    if trainer.ranks.is_main:
        trainer.counts.copy_(extra["counts"])
    if trainer.resetter is not None:
        trainer.resetter.load_state_dict(extra["resetter"])


def log_setup(trainer: Trainer, train: VideoSet, test: VideoSet, log: RunLog) -> None:
    """Say what is about to be trained, and on what."""
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
    for note in (*trainer.config.notes, *train.notes, *test.notes, *trainer.watch.notes):
        log.say(note)


def main(argv: list[str] | None = None) -> dict:
    """Parse the command line, train, save the model, and return the report."""
    arguments = sys.argv[1:] if argv is None else argv
    config, recipe = parse(TrainTokenizerConfig, arguments, RECIPES, "train_tokenizer.py", DEFAULT_RECIPE)
    ranks = backend.start(config.seed)
    state.check_folder(config.out, config.resume)  # before videos are rendered or listed
    if ranks.is_main and recipe == DEFAULT_RECIPE and config.data.startswith("shapes:"):
        print(
            f"recipe {recipe}: a tiny tokenizer on the built-in videos. For real data: "
            "--recipe tokenizer-ucf64 --data ucf101:/path/to/UCF101 (recipes: training/recipes)"
        )
    train = open_videos(config.data, "train")
    test = open_validation(config)
    config = config.in_steps(len(train))
    trainer = build(config, ranks, len(train))
    report = fit(trainer, train, test)
    if "stopped_at" not in report and ranks.is_main:
        folder = config.out / "model" if config.keep_best else save_model(trainer)
        if config.keep_best:
            report["best"] = trainer.best
        write_json(config.out / "report.json", report)
        print(f"wrote {folder}, {config.out / 'report.json'} and pictures in {config.out / 'samples'}")
    # Nobody leaves while another still works: a rank that closes its connections early can abort at its exit.
    backend.barrier()
    backend.finish()
    return report


if __name__ == "__main__":
    run_script("train_tokenizer.py", main)
