"""Train a LARP tokenizer with its prior: `deepspeed training/train_tokenizer.py [--recipe NAME] [--data SPEC] ...`.

One CPU process and many GPUs take the same path: the batch is global, and the random numbers belong to its rows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from larp.config import parse, run_script, to_dict
from larp.data.clips import ClipShape
from larp.data.datasets import VideoSet, open_videos
from larp.data.loader import ClipLoader, iterate_once
from larp.discriminator import Discriminator, DiscriminatorConfig
from larp.engine import backend, state
from larp.engine.backend import Engine, EngineConfig, Ranks
from larp.engine.log import RunLog, write_json
from larp.engine.optimizer import OptimizerConfig, build_optimizer
from larp.engine.schedules import lr_factor, ramp
from larp.losses import LeCam, discriminator_loss, generator_loss
from larp.metrics import lpips
from larp.metrics.reconstruction import Reconstruction, reconstruct
from larp.noise import BatchNoise
from larp.quantizer import CodebookKeeper
from larp.tokenizer import LarpTokenizer, TokenizerConfig, TokenizerOutput

import torch
import torch.nn.functional as F
from torch import Tensor

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "tokenizer-shapes32"


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses; the defaults are the published ones."""

    l1: float = 1.0
    l2: float = 0.0
    lpips: float = 1.0
    """Used where its weights are at hand; a run without them says so."""
    quantizer: float = 0.1
    """On codebook loss + 0.25 commitment loss."""
    commitment: float = 0.25
    prior: float = 0.06
    gan: float = 0.3
    """0 trains without a discriminator."""
    gan_start: int = 0
    """First step with the discriminator."""
    gan_every: int = 5
    """The discriminator is updated every so many steps."""
    lecam: float = 1e-6


@dataclass(frozen=True)
class AdversaryConfig:
    """Size and learning rate of the discriminator."""

    hidden: int = 512
    depth: int = 12
    heads: int = 8
    lr: float = 3e-5


@dataclass(frozen=True)
class TrainTokenizerConfig:
    """Train a LARP tokenizer with its AR prior."""

    data: str = "shapes:"
    """Training videos: ucf101:ROOT, csv:FILE, jsonl:FILE, folder:DIR, shapes:, joined with +."""
    eval_data: str | None = None
    """Validation videos (their test split); by default those of `data`."""
    out: Path = Path("runs/tokenizer")
    """Run folder."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""
    steps: int = 150_000
    batch_size: int = 128
    """Clips of one step over all processes."""
    seed: int = 0
    continuous: float = 0.0
    """Share of the run that starts without quantisation (small budgets need it)."""
    reset_codes_every: int = 0
    """Give codes unused for so many steps new places among recent latents; 0 is off."""
    mix_peak: float = 0.5
    """Scheduled-sampling share of the prior after its ramp."""
    mix_ramp: float = 0.3
    """Share of the run over which it rises."""
    stride: int = 1
    """Take every so many frames of a video."""
    flip: bool = False
    """Mirror half of the clips."""
    in_memory: bool = False
    """Decode all videos once, at the clip's size, before training."""
    workers: int = 2
    """Threads that decode ahead; unused in memory."""
    log_every: int = 20
    eval_every: int = 1000
    eval_clips: int = 256
    """Clips of the validation set that are used."""
    save_every: int = 1000
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("adam", 1e-4, betas=(0.5, 0.9)))
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.continuous < 1:
            raise ValueError(f"continuous = {self.continuous} is a share of the run, 0 up to less than 1")
        if self.steps < 1 or min(self.log_every, self.eval_every, self.save_every, self.loss.gan_every) < 1:
            raise ValueError("steps, log_every, eval_every, save_every and loss.gan_every must be at least 1")
        if self.reset_codes_every and self.engine.zero_stage:
            raise ValueError("reset_codes_every writes into the codebook: use engine.zero_stage 0 with it")

    @property
    def quantized_from(self) -> int:
        """The first step with the quantizer."""
        return round(self.continuous * self.steps)


@dataclass
class Trainer:
    """All that a step needs."""

    config: TrainTokenizerConfig
    ranks: Ranks
    tokenizer: Engine
    adversary: Engine | None
    perceptual: lpips.Lpips | None
    lecam: LeCam = field(default_factory=LeCam)
    keeper: CodebookKeeper | None = None

    @property
    def engines(self) -> dict[str, Engine]:
        """In the order in which they are saved: the tokenizer is the commit."""
        return ({"discriminator": self.adversary} if self.adversary else {}) | {"tokenizer": self.tokenizer}


def build(config: TrainTokenizerConfig, ranks: Ranks) -> Trainer:
    """Make the models, optimizers and engines of a run."""
    torch.manual_seed(config.seed)
    tokenizer = LarpTokenizer(config.model).to(ranks.device)
    c, o = config.model, config.optimizer
    factor = lr_factor(o.schedule, config.steps, o.warmup, o.final)
    optimizer = build_optimizer(tokenizer, o, config.engine.zero_stage)
    engine = backend.make_engine(
        tokenizer, optimizer, factor, config.engine, config.batch_size, ranks, name="tokenizer", max_zero_stage=2
    )
    adversary = None
    if config.loss.gan > 0:
        a = config.adversary
        model = Discriminator(
            DiscriminatorConfig(c.num_frames, c.height, c.width, c.patch_size, a.hidden, a.depth, a.heads)
        ).to(ranks.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=a.lr, betas=(0.5, 0.9))
        # Its learning rate follows the tokenizer's schedule, read at the tokenizer's steps.
        adversary = backend.make_engine(
            model, optimizer, lambda _: factor(engine.step_count), config.engine, config.batch_size, ranks,
            name="discriminator", max_zero_stage=2,
        )  # fmt: skip
    perceptual = lpips.Lpips.load().to(ranks.device) if config.loss.lpips > 0 and lpips.available() else None
    keeper = CodebookKeeper(c.codebook_size) if config.reset_codes_every or config.continuous else None
    return Trainer(config, ranks, engine, adversary, perceptual, keeper=keeper)


def reconstruction_loss(trainer: Trainer, clip: Tensor, out: TokenizerOutput) -> tuple[Tensor, dict[str, Tensor]]:
    """The tokenizer's loss but for the adversarial part, and its parts by name."""
    weights = trainer.config.loss
    error = out.reconstruction.float() - clip
    parts = {"l1": error.abs().mean(), "l2": error.square().mean()}
    total = weights.l1 * parts["l1"] + weights.l2 * parts["l2"]
    if trainer.perceptual is not None:
        parts["lpips"] = trainer.perceptual(out.reconstruction.float(), clip).mean()
        total = total + weights.lpips * parts["lpips"]
    if out.quantized is not None:
        parts["quantizer"] = out.quantized.codebook_loss + weights.commitment * out.quantized.commitment_loss
        total = total + weights.quantizer * parts["quantizer"]
    if out.prior is not None:
        parts |= {"prior": out.prior.loss, "prior_top1": out.prior.top1, "prior_top5": out.prior.top5}
        total = total + weights.prior * out.prior.loss
    return total, parts


def adversarial_loss(discriminator: Discriminator, reconstruction: Tensor) -> Tensor:
    """The tokenizer's adversarial loss, through the raw discriminator held fixed for this pass."""
    discriminator.requires_grad_(False)
    loss = generator_loss(discriminator(reconstruction))
    discriminator.requires_grad_(True)
    return loss


def train_step(trainer: Trainer, batches: Iterator[dict]) -> dict[str, Tensor]:
    """Run one step, of one global batch in micro batches, and return its losses by name (means over this process)."""
    config, step = trainer.config, trainer.tokenizer.step_count
    quantize = step >= config.quantized_from
    if quantize and step == config.quantized_from and config.continuous:
        place_codes(trainer, all_codes=True)
    adversary = trainer.adversary if step >= config.loss.gan_start else None
    judged = adversary is not None and step % config.loss.gan_every == 0
    mix = ramp(step, config.steps, config.mix_ramp, config.mix_peak)
    sums: dict[str, Tensor] = {}
    for _ in range(config.engine.accumulation):
        batch = next(batches)
        clip = batch["clip"].to(trainer.ranks.device)
        noise = BatchNoise(
            config.seed, step, config.batch_size, batch["sample_offset"], len(clip), trainer.ranks.device
        )
        out = trainer.tokenizer(clip, noise, mix, quantize)
        loss, parts = reconstruction_loss(trainer, clip, out)
        if adversary is not None:
            with adversary.autocast():
                parts["gan"] = adversarial_loss(adversary.module, out.reconstruction)
            loss = loss + config.loss.gan * parts["gan"]
        trainer.tokenizer.backward(loss)
        trainer.tokenizer.step()
        if judged:
            parts["discriminator"] = judge(trainer, adversary, clip, out.reconstruction.detach(), noise)
        if trainer.keeper is not None:
            observe(trainer.keeper, out)
        for name, value in {"loss": loss, **parts}.items():
            sums[name] = sums.get(name, 0.0) + value.detach() / config.engine.accumulation
    if quantize and config.reset_codes_every and step % config.reset_codes_every == 0 and step < 0.9 * config.steps:
        place_codes(trainer, all_codes=False)
    return sums


def judge(trainer: Trainer, adversary: Engine, clip: Tensor, reconstruction: Tensor, noise: BatchNoise) -> Tensor:
    """Train the discriminator on one micro batch and return its loss."""
    # One pass for both sides: an engine's forward runs once for each backward.
    real, fake = adversary(torch.cat([clip, reconstruction])).chunk(2)
    penalty = trainer.lecam(real, fake)
    loss = discriminator_loss(real, fake, noise) + trainer.config.loss.lecam * penalty
    adversary.backward(loss)
    adversary.step()
    means = backend.reduce_mean({"real": real.detach().mean(), "fake": fake.detach().mean()})
    trainer.lecam.update(means["real"], means["fake"])
    return loss


def observe(keeper: CodebookKeeper, out: TokenizerOutput) -> None:
    """Show the keeper the latents and codes of the global micro batch."""
    latents = backend.gather(F.normalize(out.latents.detach().float(), dim=-1))
    keeper.observe(latents, None if out.quantized is None else backend.gather(out.quantized.codes))


def place_codes(trainer: Trainer, all_codes: bool) -> None:
    """Put all codes where the latents are, or the idle ones on some of them; alike in every process."""
    quantizer, keeper = trainer.tokenizer.module.quantizer, trainer.keeper
    seed = trainer.config.seed + trainer.tokenizer.step_count
    renewed = keeper.cluster(seed=seed) if all_codes else keeper.redraw(quantizer.codebook(), keeper.idle(), seed)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(renewed)


def validate(trainer: Trainer, videos: VideoSet, shape: ClipShape) -> Reconstruction:
    """Reconstruct the first validation clips (centres of the videos), the same ones each time, with this process alone."""
    chosen = replace(videos, items=spread(videos.items, trainer.config.eval_clips))
    batches = iterate_once(chosen, shape, batch=16, workers=trainer.config.workers)
    with trainer.tokenizer.autocast():
        return reconstruct(trainer.tokenizer.module, batches, device=trainer.ranks.device)


def spread(items: tuple, count: int) -> tuple:
    """Choose `count` evenly spaced items, so that a validation set sorted by class shows every class."""
    return items if len(items) <= count else tuple(items[i * len(items) // count] for i in range(count))


def fit(trainer: Trainer, train: VideoSet, test: VideoSet) -> dict:
    """Train to the end (or until told to stop), validating and saving on the way; return the report."""
    config, c, ranks = trainer.config, trainer.config.model, trainer.ranks
    shape = ClipShape(c.num_frames, c.height, c.width, config.stride)
    micro = backend.micro_batch(config.batch_size, config.engine.accumulation, ranks)
    state.check_folder(config.out, config.resume)
    first_pass = iterate_once(test, shape, batch=1)
    if next(iter(first_pass), None) is None:
        name, reason = first_pass.skipped[0]
        raise ValueError(
            f"{test.spec}: none of its {len(test)} test videos can be read; give others with --eval-data ({name}: {reason})"
        )
    loader = ClipLoader(
        train, shape, config.batch_size, micro, config.seed, ranks.rank, ranks.world_size, flip=config.flip,
        workers=0 if config.in_memory else config.workers, in_memory=config.in_memory,
    )  # fmt: skip
    saved = state.open_run(config.out, to_dict(config), config.resume)
    if saved is not None:
        state.load_state(trainer.engines, saved, identity(config))
        loader.load_state_dict(saved.loader_state)
        restore(trainer, saved.extra)
    began, first = time.monotonic(), trainer.tokenizer.step_count
    with RunLog(config.out, ranks, config.steps, first, show=("loss", "psnr", "prior_top1")) as log:
        announce(trainer, train, test, log)
        batches = iter(loader)
        trainer.tokenizer.module.train()
        for step in range(first + 1, config.steps + 1):
            losses = train_step(trainer, batches)
            if not step % config.log_every:
                values = backend.reduce_mean(losses)
                log.metrics(
                    step, values | {"lr": trainer.tokenizer.lr, "grad_norm": trainer.tokenizer.grad_norm or 0.0}
                )
            last = step == config.steps
            stop = backend.stop_requested() if not step % 10 else False
            if not step % config.save_every or last or stop:
                state.save_state(
                    trainer.engines, config.out, step, loader.state_dict(), keep_extra(trainer), model=identity(config)
                )
            if not step % config.eval_every and not last and not stop:
                check(trainer, test, shape, step, log)
            if stop and not last:
                log.say(f"stopped at step {step}, saved; go on with --resume --out {config.out}")
                return {"stopped_at": step}
        report = check(trainer, test, shape, config.steps, log)
        skipped = sorted({tuple(entry) for entries in backend.gather_objects(loader.skipped) for entry in entries})
        for name, reason in skipped:
            log.say(f"skipped {name}: {reason}")
        report |= {"steps": config.steps, "seconds": round(time.monotonic() - began, 1)}
        report |= {"cpu_seconds": round(time.process_time(), 1)}
        report |= {"skipped_videos": len(skipped), "skipped_updates": trainer.tokenizer.skipped_count}
    return report


def check(trainer: Trainer, test: VideoSet, shape: ClipShape, step: int, log: RunLog) -> dict:
    """Validate on the main process, write pictures, and return the figures."""
    report: dict = {}
    if trainer.ranks.is_main:
        result = validate(trainer, test, shape)
        folder = trainer.config.out / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        result.write(str(folder / f"reconstruction-{step:06d}"), fps=8)
        report = result.metrics
        log.metrics(step, {f"test_{name}": value for name, value in report.items()})
        told = {
            k: round(v, 3)
            for k, v in report.items()
            if k in ("psnr", "mean_colour_psnr", "ssim", "codes_used", "prior_top1")
        }
        log.say(f"step {step}, {report['num_clips']} test clips: {told}")
    backend.barrier()
    return report


def identity(config: TrainTokenizerConfig) -> dict:
    """What must be the same when a run is resumed."""
    adversary = to_dict(config.adversary) if config.loss.gan > 0 else {}
    return {"model": to_dict(config.model), "adversary": {k: v for k, v in adversary.items() if k != "lr"}}


def keep_extra(trainer: Trainer) -> dict:
    """What a checkpoint holds beside the engines."""
    keeper = trainer.keeper.state_dict() if trainer.keeper else {}
    return {"lecam": [trainer.lecam.real, trainer.lecam.fake], "keeper": keeper}


def restore(trainer: Trainer, extra: dict) -> None:
    """Take up `keep_extra`."""
    trainer.lecam.real, trainer.lecam.fake = extra["lecam"]
    if trainer.keeper is not None:
        trainer.keeper.load_state_dict(extra["keeper"])


def announce(trainer: Trainer, train: VideoSet, test: VideoSet, log: RunLog) -> None:
    """Say what is about to be trained, and on what."""
    model = trainer.tokenizer.module
    prior = sum(p.numel() for p in model.prior.parameters()) if model.prior is not None else 0
    log.say(
        f"tokenizer of {(model.num_parameters() - prior) / 1e6:.1f} M parameters, prior {prior / 1e6:.1f} M, "
        f"on {len(train)} clips of {train.spec} ({len(test)} to test), {trainer.ranks.world_size} process(es)"
    )
    for note in (*train.notes, *test.notes):
        log.say(note)
    if trainer.config.loss.lpips > 0 and trainer.perceptual is None:
        log.say(
            "without LPIPS: its weights are not at hand (README, 'Weights of the metrics', says where to place them)"
        )


def main(argv: list[str] | None = None) -> dict:
    """Parse the command line, train, save the model, and return the report."""
    arguments = sys.argv[1:] if argv is None else argv
    config, recipe = parse(TrainTokenizerConfig, arguments, RECIPES, "train_tokenizer.py", DEFAULT_RECIPE)
    ranks = backend.start(config.seed)
    if ranks.is_main and recipe == DEFAULT_RECIPE and config.data.startswith("shapes:"):
        print(
            f"recipe {recipe}: a tiny tokenizer on the built-in videos. For real data: "
            "--recipe tokenizer-ucf64 --data ucf101:/path/to/UCF101 (recipes: training/recipes)"
        )
    train = open_videos(config.data, "train")
    test = open_videos(config.eval_data or config.data, "test")
    trainer = build(config, ranks)
    report = fit(trainer, train, test)
    if "stopped_at" not in report and ranks.is_main:
        folder = trainer.tokenizer.module.save_pretrained(config.out / "model")
        write_json(config.out / "report.json", report)
        print(f"wrote {folder}, {config.out / 'report.json'} and pictures in {config.out / 'samples'}")
    # Nobody leaves while another still works: a rank that closes its connections early can abort at its exit.
    backend.barrier()
    backend.finish()
    return report


if __name__ == "__main__":
    run_script("train_tokenizer.py", main)
