"""A run in stages: the data of the whole run, and the model of the current stage in its engine.

    run = StagedRun(config, ranks, plan, videos, corpus, mix, stage, clock)
    run.begin(build(config, videos, ranks))     # under DeepSpeed, for the stage
    ...                                         # train until run.stage_done
    run.next_stage()                            # the next stage, with the adapter as it is now

The adapter passes from one stage to the next as a file, see `larp_mllm.engine.stages`.
"""

import gc
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from larp.engine.backend import Engine, Ranks, barrier, make_engine
from larp.engine.clock import Clock
from larp.engine.schedules import lr_factor
from larp_mllm.data.corpus import Corpus, TokenCaches
from larp_mllm.data.dataset import TrainingMix
from larp_mllm.engine.lora import prepare_training, updated_layers
from larp_mllm.engine.settings import TrainMllmConfig
from larp_mllm.engine.stages import Stage, load_adapter, save_adapter
from larp_mllm.engine.trained_weights import load_start, make_optimizer, take_weights
from larp_mllm.model.base_models import check_positions, check_rows, is_tiny, load_base
from larp_mllm.model.cpu_attention import use_cpu_attention
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.pipeline import Mllm
from larp_mllm.processing.processor import LarpMllmProcessor, text_tokenizer_hash

import torch

DEFAULT_FPS = 8.0
"""Frames per second of videos whose token cache does not record them."""


def build(config: TrainMllmConfig, videos: TokenCaches, ranks: Ranks) -> Mllm:
    """Load the base, give it a fresh adapter and its processor; the weights are the same at every call."""
    tiny, trained = config.tiny, None if config.start_from is None else load_start(config.start_from)
    torch.manual_seed(config.seed)
    base, tokenizer = load_base(
        config.base, videos.captions, tiny.layers, tiny.width, tiny.heads, trust_remote_code=config.trust_remote_code,
        text_tokenizer=trained and trained.processor.tokenizer,
    )  # fmt: skip
    clips = videos.tokenizer
    check_positions(base, clips.num_tokens, config.base)
    check_rows(base, tokenizer, config.base)
    cache = videos.train if videos.train is not None else videos.held_out
    fps = config.fps or (DEFAULT_FPS if cache is None else cache.frame_rate(DEFAULT_FPS))
    stride = config.stride or (1 if cache is None else cache.key["stride"])
    model = LarpMllmForCausalLM.from_base(
        base, len(tokenizer), clips.codebook.cpu(), clips.num_tokens, config.adapter,
        video_tokenizer_hash=clips.weight_hash(), fps=fps, frame_stride=stride,
    )  # fmt: skip
    mllm = Mllm(model.to(ranks.device), LarpMllmProcessor(tokenizer, clips, model.vocabulary, stride))
    if trained is not None:
        take_weights(mllm, trained, config.start_from)
    return mllm


@dataclass
class StagedRun:
    """Data for the whole run, and the model of the current stage in its engine."""

    config: TrainMllmConfig
    ranks: Ranks
    plan: list[Stage]
    videos: TokenCaches
    corpus: Corpus
    mix: TrainingMix
    stage: Stage
    clock: Clock
    mllm: Mllm | None = None
    engine: Engine | None = None
    skipped: int = 0
    """Updates that were skipped in earlier stages."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Duration of each stage, until `since`."""
    steps: dict[str, int] = field(default_factory=dict)
    """Steps done in each stage."""
    since: float = 0.0
    parameters: dict[str, int] = field(default_factory=dict)
    """Number of trained parameters of each stage."""
    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    """Peak learning rates of each stage."""
    layers: dict[str, list[str]] = field(default_factory=dict)
    """Names of the layers of the base that LoRA updates in each stage."""
    resumed: list[dict[str, Any]] = field(default_factory=list)
    """See `larp_mllm.engine.training_report.option_changes`."""

    @property
    def step(self) -> int:
        """Number of steps done in all stages."""
        return self.clock.step

    @property
    def stage_done(self) -> bool:
        """Whether the stage has reached its last step."""
        return self.clock.position >= self.stage.last

    @property
    def identity(self) -> dict:
        """The values in which a checkpoint must agree to be resumed: all that decides shapes or the meaning of ids."""
        config, model = self.config, self.mllm.model.config
        return {
            "base": config.base,
            **self.stage.identity,
            "adapter": config.adapter,
            "vocabulary": model.vocabulary.size,
            "video_tokenizer": model.video_tokenizer_hash[:16],
            "text_tokenizer": text_tokenizer_hash(self.mllm.processor.tokenizer)[:16],
            **({"tiny": asdict(config.tiny)} if is_tiny(config.base) else {}),
            # Checkpoints do not hold frozen weights.
            **({"start_from": config.start_from} if config.start_from is not None else {}),
        }

    def begin(self, mllm: Mllm) -> None:
        """Make the engine of the stage for a model of `build`."""
        config, stage = self.config, self.stage
        # LoRA gets the same initial weights whether the stage is reached by training or by --resume.
        torch.manual_seed(config.seed)
        prepare_training(mllm.model, stage.trained, stage.lora_rank, stage.lora_alpha)
        use_cpu_attention(mllm.model.base)
        # Counted before the engine may shard them.
        self.parameters[stage.name] = sum(p.numel() for p in mllm.model.parameters() if p.requires_grad)
        self.rates[stage.name] = stage.rates
        self.layers[stage.name] = updated_layers(mllm.model) if "lora" in stage.trained else []
        if "continuation" in self.mix.shares:
            mllm.model.config.given_frames = self.corpus.videos.cache.key["condition_frames"]
        schedule = lr_factor(config.schedule, stage.steps, stage.warmup, config.final_lr)
        factor = self.clock.on_schedule(schedule, stage.first)
        updates = make_optimizer(mllm.model, stage.adapter_lr, stage.llm_lr, config.weight_decay)
        self.mllm, self.since = mllm, time.monotonic()
        self.engine = make_engine(mllm.model, updates, factor, config.engine, config.batch_size, self.ranks)
        self.engine.first_step = self.step
        self.engine.clips_of = lambda step: self.mix.clips_of(step, config.batch_size, config.seed)

    def next_stage(self) -> None:
        """End a stage and begin the next. Collective.

        The base is loaded again: it was frozen, and an engine's changes to a module (hooks, shards) cannot be undone.
        """
        save_adapter(self.mllm.model, self.config.out, self.config.engine.zero_stage, self.ranks.is_main)
        barrier()
        elapsed = self.clock.elapsed
        self.skipped += self.engine.skipped_count
        self.engine.close()
        self.mllm = self.engine = None
        gc.collect()
        self.stage = self.plan[self.plan.index(self.stage) + 1]
        mllm = build(self.config, self.videos, self.ranks)
        load_adapter(mllm.model, self.config.out)
        self.begin(mllm)
        self.clock.start(self.step, elapsed)

    def state_dict(self) -> dict[str, Any]:
        """Return the plain values for a checkpoint; the time since the last call is added to the stage's duration."""
        now = time.monotonic()
        self.steps[self.stage.name] = self.engine.step_count
        self.seconds[self.stage.name] = self.seconds.get(self.stage.name, 0.0) + now - self.since
        self.since = now
        names = ("step", "steps", "skipped", "seconds", "parameters", "rates", "layers", "resumed")
        return {"stage": self.stage.name} | {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, after the engine."""
        self.engine.first_step = self.step - self.engine.step_count
        self.skipped, self.seconds = state["skipped"], state["seconds"]
        self.parameters = state["parameters"] | self.parameters
        self.rates |= state.get("rates", {})
        self.layers = state.get("layers", {}) | self.layers
        self.steps = state.get("steps", {})
