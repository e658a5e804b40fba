"""The options of training/train_tokenizer.py; the docstring of a field is its text in `--help`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from larp.config import to_dict
from larp.engine.adversary import AdversaryConfig
from larp.engine.clock import check_minutes
from larp.engine.optimizer import OptimizerConfig
from larp.engine.schedules import ramp
from larp.engine.settings import EngineConfig
from larp.engine.shorter_runs import shorten, typed_number, warmup_in_steps, without_minutes
from larp.models.objective import LossConfig
from larp.models.tokenizer_config import TokenizerConfig

DEFAULT_STEPS = 150_000


@dataclass(frozen=True)
class TrainTokenizerConfig:
    """Train a LARP tokenizer with its AR prior."""

    data: str = "shapes:"
    """Data spec of the training videos."""
    eval_data: str | None = None
    """Data spec of the validation videos (their test split); by default `data`."""
    out: Path = Path("runs/tokenizer")
    """Run folder."""
    resume: bool = False
    """Continue from the newest checkpoint in `out`."""
    steps: int | None = None
    """Optimizer steps; by default 150,000, unless `epochs` is given."""
    epochs: float | None = None
    """Length of the run in passes over the training videos, in place of `steps`."""
    minutes: float | None = None
    """Length of the run in minutes. `steps` is then the scale of the schedules: what a recipe does at half of its steps is done after
    half of the time. Not counted: the start, the first step, the last validation, and what is written at the end."""
    start_from: str | None = None
    """Folder or hub name of a tokenizer of the same shape to begin with: its averaged weights, where it has them."""
    train: Literal["all", "refiner"] = "all"
    """`refiner`: only the convolutions after the decoder (model.refiner_width) of the tokenizer of `start_from`, whose codes stay as they
    are, and with them what was trained on them."""
    batch_size: int = 128
    """Clips per step, over all processes."""
    seed: int = 0
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, saved as model.ema.safetensors; 0 is off. It averages about the last
    1 / (1 - ema) steps, which should be much fewer than those of the run."""
    continuous: float = 0.0
    """Share of the run, at its start, that trains without quantisation; short trainings need it."""
    reset_codes_every: int = 0
    """Reset codes that were unused for so many steps to recent latents; 0 is off."""
    temperature_start: float | None = None
    """Temperature of the stochastic quantizer at its first step, from which it changes to model.temperature; None: always that."""
    temperature_ramp: float = 0.5
    """Share of the quantised steps over which the temperature changes, by a constant factor a step."""
    prefix_share: float = 0.5
    """Share of the clips that are decoded from a random prefix of their codes (model.nested only)."""
    prefix_shortest: int = 1
    """Shortest such prefix; lengths are uniform from it to num_tokens."""
    mix_peak: float = 0.5
    """Share of the prior's inputs that it samples itself (scheduled sampling), after a linear ramp."""
    mix_ramp: float = 0.3
    """Share of the run that the ramp takes."""
    stride: int = 1
    """Every n-th frame of a video is a frame of the clip."""
    flip: bool = False
    """Mirror half of the clips."""
    crop: bool = False
    """Augment the clips: random squares of 0.76 to 1 of the frame's side, strides 1 to 3, colours, some played backwards. All videos are
    decoded once and kept in the memory of the device."""
    in_memory: bool = False
    """Decode all videos once, at the size of a clip, before training."""
    workers: int = 2
    """Threads that decode videos ahead; with in_memory and crop only those of validation."""
    log_every: int = 20
    eval_every: int = 1000
    eval_clips: int = 256
    """Evenly spaced clips of the validation set that are used."""
    save_every: int = 1000
    keep_best: bool = False
    """model/ holds the weights of the best validation rather than the last ones: by LPIPS where its weights are there, else by PSNR;
    of the averaged weights with `ema`."""
    wandb: str | None = None
    """Project of Weights & Biases to log to (pip install 'larp-mllm[wandb]')."""
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("adam", 1e-4, betas=(0.5, 0.9)))
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        check_minutes(self.minutes)
        for name in ("steps", "batch_size", "log_every", "eval_every", "eval_clips", "save_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.workers < 0:
            raise ValueError(f"workers must be 0 or more, got {self.workers}")
        if not (0 <= self.mix_peak <= 1 and 0 < self.mix_ramp <= 1):
            raise ValueError(
                f"mix_peak = {self.mix_peak} is a share in [0, 1], mix_ramp = {self.mix_ramp} a share of the run in (0, 1]"
            )
        if not 0 <= self.continuous < 1:
            raise ValueError(f"continuous = {self.continuous} is a share of the run, 0 up to less than 1")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps = {self.steps} and epochs = {self.epochs} are both given: set one of them to None, such as --steps None"
            )
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs = {self.epochs} must be positive and finite")
        if not 0 < self.prefix_share <= 1 or not 1 <= self.prefix_shortest <= self.model.num_tokens:
            raise ValueError(
                f"prefix_share = {self.prefix_share} must lie in (0, 1], and prefix_shortest = {self.prefix_shortest} in "
                f"1..{self.model.num_tokens} (model.num_tokens)"
            )
        if self.loss.lpips and self.loss.lpips_frames > self.model.num_frames:
            raise ValueError(
                f"loss.lpips_frames = {self.loss.lpips_frames} is more than the {self.model.num_frames} frames of a clip "
                "(model.num_frames): set it to fewer, or to 0 for all"
            )
        if self.temperature_start is not None and not self.model.stochastic:
            raise ValueError("temperature_start is of stochastic codes: leave it out with --model.no-stochastic")
        if self.train == "refiner" and not self.model.refiner_width:
            raise ValueError("train = refiner needs the width of one: --model.refiner-width 64")
        start = self.temperature_start
        if start is not None and not (0 < start < math.inf and 0 < self.temperature_ramp <= 1):
            raise ValueError("temperature_start must be positive, and temperature_ramp a share of the run in (0, 1]")

    def adjusted(self, typed: Mapping[str, str]) -> "TrainTokenizerConfig":
        """Return this recipe for the length that was `typed`: in a shorter run, warm-up and starts of losses are earlier in proportion."""
        config = without_minutes(self, ("steps", "epochs"), typed)
        steps, epochs = typed_number(typed, "steps"), typed_number(typed, "epochs")
        if steps is not None and self.epochs is not None and "epochs" not in typed:
            optimizer = warmup_in_steps(self.optimizer, int(steps), self.epochs, typed)
            return replace(config, steps=int(steps), epochs=None, optimizer=optimizer)
        counts = ("optimizer.warmup", "loss.lpips_start", "loss.gan_start")
        config = shorten(config, counts, steps, self.steps or DEFAULT_STEPS, typed)
        return shorten(config, (*counts, "optimizer.warmup_epochs"), epochs, self.epochs, typed)

    def in_steps(self, videos: int) -> "TrainTokenizerConfig":
        """Return the config with the length of the run in steps, for a training set of so many videos; ValueError if it is too short."""
        steps = self.steps
        if steps is None:
            steps = DEFAULT_STEPS if self.epochs is None else max(1, round(self.epochs * videos / self.batch_size))
        if self.continuous and self.start_from is None and not round(self.continuous * steps):
            raise ValueError(
                f"continuous = {self.continuous} of {steps} steps is less than one: train longer, or set it to 0"
            )
        return replace(self, steps=steps, epochs=None)

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each loss that has a weight but starts after the end of the run; of a config `in_steps`."""
        return tuple(
            f"note: loss.{name}_start = {start} is not reached in {self.steps} steps: the run trains without loss.{name}"
            for name, start in (("lpips", self.loss.lpips_start), ("gan", self.loss.gan_start))
            if getattr(self.loss, name) and start >= self.steps
        )

    @property
    def resets_codes(self) -> bool:
        """Whether codes are ever reset."""
        return self.train == "all" and bool(self.reset_codes_every or self.continuous)

    @property
    def identity(self) -> dict:
        """What must be the same when a run is resumed, as plain values."""
        adversary = to_dict(self.adversary) if self.loss.gan > 0 else {}
        # The optimizer's parameter groups, and with them its state, are others where the prior has a rate of its own.
        own_rate = {"prior_lr": "the prior's own"} if self.optimizer.prior_lr is not None else {}
        return {
            "model": to_dict(self.model),
            **({"train": self.train} if self.train != "all" else {}),
            "adversary": {name: value for name, value in adversary.items() if name != "lr"},
            "optimizer": {"name": self.optimizer.name, **own_rate},
            # A checkpoint without the resetter's counts cannot supply them.
            "resets_codes": self.resets_codes,
        }

    @property
    def quantized_from(self) -> int:
        """The first step with the quantizer: 0 with `start_from`, since trained weights need no continuous start."""
        return 0 if self.start_from is not None else round(self.continuous * self.steps)

    def temperature(self, step: float) -> float:
        """Return the temperature of the quantizer at a place on the schedule, in steps."""
        start, end = self.temperature_start or self.model.temperature, self.model.temperature
        done = ramp(max(0, step - self.quantized_from), self.steps - self.quantized_from, self.temperature_ramp, 1.0)
        return start * (end / start) ** done
