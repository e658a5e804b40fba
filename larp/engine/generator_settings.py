"""The options of training/train_generator.py; the docstring of a field is its text in `--help`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from larp.engine.clock import check_minutes
from larp.engine.optimizer import OptimizerConfig
from larp.engine.samples import SamplingConfig
from larp.engine.settings import EngineConfig
from larp.engine.shorter_runs import shorten, typed_number, warmup_in_steps, without_minutes
from larp.models.generator import Task

DEFAULT_STEPS = 1000


@dataclass(frozen=True)
class TrainGeneratorConfig:
    """Train the autoregressive generator on codes."""

    task: Task = "class"
    """class: clips of a class. frame-prediction: clips that continue given frames."""
    tokens: Path | None = None
    """Token cache to train on (training/extract_tokens.py); by default one is made in `out` from `tokenizer` and `data`."""
    eval_tokens: Path | None = None
    """Token cache to validate on; by default every 20th video of `tokens` is held out."""
    tokenizer: str | None = None
    """The tokenizer of the codes, for extraction and samples; by default the one that the cache names."""
    data: str | None = None
    """Data spec to extract tokens from."""
    eval_data: str | None = None
    """Data spec to validate on (its test split); by default `data`."""
    live: bool = False
    """Encode clips at random places of the videos of `data` at every step, in place of a token cache. Each epoch then has other clips, and
    each step also takes the time of the tokenizer. Held-out clips are extracted in either case."""
    crop: bool = False
    """Live: random crops, speeds and colours, as --crop cuts them for the tokenizer, but none reversed in time. All videos are kept in
    the memory of the device."""
    stride: int = 1
    """When extracting or live: a clip takes every n-th frame of a video."""
    windows: int = 1
    """When extracting: most clips of a video."""
    flips: bool = False
    """When extracting: add every clip mirrored. Live: mirror half of the clips."""
    condition_frames: int = 5
    """When extracting or live, for frame prediction: number of given frames."""
    workers: int = 2
    """When extracting or live: threads per process that decode videos."""
    out: Path = Path("runs/generator")
    """Run folder."""
    size: str = "tiny"
    """A row of larp.models.generator.SIZES: tiny, mini, S, B, L, LP, XL, XXL, XXXL."""
    codebook_rows: bool = False
    """Compute the rows of the codes, in input and output, from the tokenizer's codebook, in place of tables of codebook x width."""
    dropout: float = 0.1
    condition_dropout: float | None = None
    """Share of training clips without their class or given frames, which guidance needs. By default 0.1 for classes and, as in the
    paper, 0 for frame prediction, which then has no guidance."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, saved as model.ema.safetensors; 0 is off. It averages about the last
    1 / (1 - ema) steps."""
    steps: int | None = None
    """Optimizer steps; by default 1000, unless `epochs` is given."""
    epochs: float | None = None
    """Length of the run in passes over the clips of the cache (live: over the videos), in place of `steps`."""
    minutes: float | None = None
    """Length of the run in minutes. `steps` or `epochs` are then the scale of the schedules: what a recipe does at half of its steps is
    done after half of the time. Not counted: the start, the first step, the last validation, and what is written at the end."""
    start_from: str | None = None
    """Folder or hub name of a generator of the same shape to begin with: its averaged weights, where it has them."""
    batch_size: int = 64
    """Clips per step, over all processes."""
    eval_every: int = 100
    log_every: int = 10
    save_every: int = 500
    """Steps between checkpoints to resume from."""
    keep_best: bool = True
    """model/ holds the weights of the best validation rather than the last ones: by the bits of held-out codes, of the averaged weights
    with `ema`."""
    seed: int = 0
    resume: bool = False
    """Continue from the newest checkpoint in `out`."""
    wandb: str | None = None
    """Project of Weights & Biases to log to (pip install 'larp-mllm[wandb]')."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig("adamw", lr=6e-4, weight_decay=0.05, warmup=50)
    )
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self):
        check_minutes(self.minutes)
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
                "sampling.guidance_scale needs clips without a condition in training: give --condition-dropout 0.1, or leave it out"
            )
        if self.crop and not self.live:
            raise ValueError("crop is for --live, which cuts the clips at every step: add --live, or leave it out")
        if self.live and self.tokens is not None:
            raise ValueError(f"live encodes the clips of `data`, but tokens is {self.tokens}: leave one of them out")

    @property
    def dropped(self) -> float:
        """The share of clips without a condition: `condition_dropout`, or what the task has by default."""
        if self.condition_dropout is not None:
            return self.condition_dropout
        return 0.1 if self.task == "class" else 0.0

    @property
    def given_frames(self) -> int:
        """The number of given frames of a clip; 0 where the task has none."""
        return self.condition_frames if self.task == "frame-prediction" else 0

    def adjusted(self, typed: Mapping[str, str]) -> "TrainGeneratorConfig":
        """Return this recipe for the length that was `typed`: in a shorter run, the warm-up is shorter in proportion."""
        config = without_minutes(self, ("steps", "epochs"), typed)
        steps, epochs = typed_number(typed, "steps"), typed_number(typed, "epochs")
        if steps is not None and self.epochs is not None and "epochs" not in typed:
            optimizer = warmup_in_steps(self.optimizer, int(steps), self.epochs, typed)
            return replace(config, steps=int(steps), epochs=None, optimizer=optimizer)
        config = shorten(config, ("optimizer.warmup",), steps, self.steps or DEFAULT_STEPS, typed)
        return shorten(config, ("optimizer.warmup", "optimizer.warmup_epochs"), epochs, self.epochs, typed)

    def in_steps(self, clips: int) -> "TrainGeneratorConfig":
        """Return the config with the length of the run in steps, for epochs of so many clips."""
        if self.steps is not None:
            return self
        steps = DEFAULT_STEPS if self.epochs is None else max(1, round(self.epochs * clips / self.batch_size))
        return replace(self, steps=steps, epochs=None)
