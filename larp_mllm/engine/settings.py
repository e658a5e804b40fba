"""The options of training/train_mllm.py; the docstring under a field is its text in `--help`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from larp.config import check_count
from larp.engine.clock import check_minutes
from larp.engine.settings import EngineConfig
from larp.engine.shorter_runs import shorten, typed_number, without_minutes
from larp_mllm.data.dataset import Tasks
from larp_mllm.engine.samples import SamplingConfig
from larp_mllm.engine.stages import AlignConfig, JointConfig, stages
from larp_mllm.model.base_models import is_tiny

TOKENS = Path("runs/tokens")


@dataclass(frozen=True)
class TinyConfig:
    """The size of the bases tiny-qwen2 and tiny-llama."""

    layers: int = 4
    width: int = 192
    heads: int = 4

    def __post_init__(self):
        for name in ("layers", "width", "heads"):
            check_count(f"tiny.{name}", getattr(self, name))


@dataclass(frozen=True)
class TrainMllmConfig:
    """Train a language model with video vocabulary: stage align, then stage joint."""

    base: str = "Qwen2-0.5B"
    """Hub name, alias (Qwen2-0.5B, Llama-3.2-1B, ...), folder, or tiny-qwen2 / tiny-llama (random, no network)."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a base; only for authors you trust."""
    tokens: Path | None = None
    """Token cache to train on, from training/extract_tokens.py; by default runs/tokens, unless records or text are given.
    If that is missing, it is made of the built-in captioned videos."""
    more_tokens: tuple[Path, ...] = ()
    """Further token caches of the same tokenizer to train on; nothing of them is held out."""
    eval_tokens: Path | None = None
    """Token cache to evaluate on; by default every 20th video of `tokens`, which is held out."""
    records: tuple[str, ...] = ()
    """JSONL files of interleaved text and videos: chats ({"messages": [...]}) or {"text": "... <video> ...", "videos": [...]}. Or
    wds:PATTERN, WebDataset shards whose .json are such records, or hf-disk:FOLDER, a saved data set of such rows."""
    data_root: Path | None = None
    """Folder of the records' videos; by default that of each file of records."""
    allow_outside: bool = False
    """Allow records to name videos outside of their data root."""
    stride: int | None = None
    """Every n-th frame of the records' videos; by default as in the token cache, else 1."""
    text: tuple[str, ...] = ()
    """Plain text to mix in, so that the language model keeps what it knows: txt:FILE, jsonl:FILE or hf:NAME (package datasets)."""
    eval_text: tuple[str, ...] = ()
    """Text whose perplexity is reported before and after; by default a held-out part of `text`, else a text of this package."""
    tokenizer: str | None = None
    """Folder or hub name of the LARP tokenizer; by default the one that the token cache names."""
    out: Path = Path("runs/mllm")
    """Run folder."""
    minutes: float | None = None
    """Length of the run in minutes, divided among the stages in proportion to their steps. The steps are then the scale of the
    schedules: what a recipe does at half of them is done after half of the time. Not counted: the start and the first step of each
    stage, the evaluation, and what is written at the end."""
    start_from: str | None = None
    """Folder or hub name of a trained model of the same shape and vocabulary to begin with. A tiny base takes its text tokenizer."""
    adapter: Literal["codebook", "free"] = "codebook"
    """Embeddings of video ids: computed from the codebook, or free parameters (the baseline)."""
    batch_size: int = 64
    """Records per optimizer step, all ranks together."""
    sequence_length: int | None = None
    """Ids of a row into which records are packed, which changes only the speed, and of a piece of text, at least 16. By default rows are
    as long as is cheapest for the records of a step, and pieces have 512 ids."""
    weight_decay: float = 0.01
    """Weight decay of matrices; norms, biases and embeddings have none."""
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    """Schedule of the learning rates within each stage."""
    final_lr: float = 0.02
    """The last learning rate of a stage as a fraction of the peak."""
    text_weight: float = 1.0
    """Weight of a text target in the loss; a video target has weight 1."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator, which keeps logits from drifting; 1e-4 is usual, 0 is off."""
    head_chunk: int = 1024
    """Positions whose logits are computed at a time; fewer take less memory."""
    fps: float | None = None
    """Frames per second of the generated videos; by default those of the token cache, else 8."""
    eval_videos: int = 256
    """Most held-out videos, records and pieces of text that are evaluated, each; they are evenly spaced."""
    log_every: int = 10
    save_every: int = 500
    seed: int = 0
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""
    wandb: str | None = None
    """Project of Weights & Biases to log to (pip install 'larp-mllm[wandb]')."""
    align: AlignConfig = field(default_factory=AlignConfig)
    joint: JointConfig = field(default_factory=JointConfig)
    tasks: Tasks = field(default_factory=Tasks)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    tiny: TinyConfig = field(default_factory=TinyConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self):
        check_minutes(self.minutes)
        plan = stages(self.align, self.joint)
        if is_tiny(self.base) and self.start_from is None and plan[-1].trained != "full":
            raise ValueError(
                f"--base {self.base} has random weights, which the last stage does not train ({plan[-1].trained}): give "
                "--joint.method full and --joint.steps"
            )
        for name in ("log_every", "save_every", "eval_videos", "head_chunk", "stride", "sequence_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("z_loss", "text_weight", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be a positive number, got {self.fps}")

    def adjusted(self, typed: Mapping[str, str]) -> "TrainMllmConfig":
        """Return this recipe for the lengths of stages that were `typed`: in a shorter stage, the warm-up is shorter in proportion."""
        config = without_minutes(self, ("align.steps", "joint.steps"), typed)
        config = shorten(config, ("align.warmup",), typed_number(typed, "align.steps"), self.align.steps, typed)
        return shorten(config, ("joint.warmup",), typed_number(typed, "joint.steps"), self.joint.steps, typed)

    @property
    def token_folder(self) -> Path | None:
        """The token cache to train on; None for a run on records and text alone."""
        return TOKENS if self.tokens is None and not self.records and not self.text else self.tokens
