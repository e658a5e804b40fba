"""The stages of a training: `align` (the language model frozen, the adapter trained), then `joint` (LoRA or all).

    plan = stages(AlignConfig(), JointConfig())     # a stage of 0 steps is left out
    stage = stage_at(plan, step)                    # steps are counted over both stages

The weights of the adapter go from one stage to the next as a file, which is the same at every ZeRO stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from larp.engine.distributed import gathered_weights
from larp.files import replacing
from larp_mllm.engine.lora import Method, TrainedPart
from larp_mllm.model.modeling import LarpMllmForCausalLM

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

ADAPTER_FILE = Path("align", "adapter.safetensors")
_MOST_WARMUP = 50
_LLM_LR = {"partial-lora": 1e-3, "lora": 1e-4, "full": 2e-5}


@dataclass(frozen=True)
class AlignConfig:
    """The stage in which the language model is frozen and the adapter is trained."""

    steps: int = 500
    """0 leaves the stage out."""
    adapter_lr: float = 1e-3
    warmup: int | None = None
    """Steps over which the rate rises; by default a tenth of the stage, at most 50."""

    def __post_init__(self):
        _check(self, "align", "adapter_lr")


@dataclass(frozen=True)
class JointConfig:
    """The stage in which the language model is trained as well."""

    steps: int = 2000
    """0 leaves the stage out."""
    method: Method = "partial-lora"
    """What of the language model is trained: low-rank updates of its projections that act at the ids of videos alone, so that it
    stays what it is for text (partial-lora), such that act everywhere and are merged at the end (lora), or all weights (full)."""
    adapter_lr: float = 5e-4
    llm_lr: float | None = None
    """Learning rate of the language model; by default 1e-3 for partial LoRA, 1e-4 for LoRA and 2e-5 for all weights."""
    lora_rank: int = 32
    lora_alpha: int | None = None
    """With lora, the updates are scaled by lora_alpha / lora_rank, by default 2."""
    warmup: int | None = None
    """Steps over which the rates rise; by default a tenth of the stage, at most 50."""

    def __post_init__(self):
        _check(self, "joint", "adapter_lr", "llm_lr")
        for name in ("lora_rank", "lora_alpha"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"joint.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Stage:
    """One stage of a run: what it trains, from global step `first` on, for `steps` steps; of the schedule, in a run in minutes."""

    name: Literal["align", "joint"]
    first: int
    steps: int
    trained: TrainedPart
    adapter_lr: float
    llm_lr: float
    warmup: int
    lora_rank: int = 1
    lora_alpha: int | None = None

    @property
    def last(self) -> int:
        """The global step at which the stage is done."""
        return self.first + self.steps

    @property
    def identity(self) -> dict:
        """The plain values in which a checkpoint must agree to be resumed in this stage."""
        lora = {"lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha} if "lora" in self.trained else {}
        return {"stage": self.name, "first_step": self.first, "trained": self.trained, **lora}

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates of the trained parts, by name."""
        return {"adapter_lr": self.adapter_lr} | ({} if self.trained == "adapter" else {"llm_lr": self.llm_lr})

    @property
    def summary(self) -> dict:
        """The stage in a report, as plain values."""
        lora = {"lora_rank": self.lora_rank} if "lora" in self.trained else {}
        return {"name": self.name, "steps": self.steps, "trained": self.trained, **lora, **self.rates}


def stages(align: AlignConfig, joint: JointConfig) -> list[Stage]:
    """Return the stages that have steps, in order; ValueError if none has."""
    llm_lr = _LLM_LR[joint.method] if joint.llm_lr is None else joint.llm_lr
    both = [
        Stage("align", 0, align.steps, "adapter", align.adapter_lr, 0.0, _warmup(align)),
        Stage(
            "joint", align.steps, joint.steps, joint.method, joint.adapter_lr, llm_lr, _warmup(joint),
            joint.lora_rank, joint.lora_alpha,
        ),
    ]  # fmt: skip
    plan = [stage for stage in both if stage.steps]
    if not plan:
        raise ValueError("align.steps and joint.steps are both 0: there is nothing to train; give one of them steps")
    return plan


def stage_at(plan: Sequence[Stage], step: int, name: str | None = None) -> Stage:
    """Return the stage that wrote a checkpoint at this global step; the last step of a stage belongs to it.

    name: the stage that the checkpoint names, which decides in a run in minutes.
    """
    if name is not None:
        return next((stage for stage in plan if stage.name == name), plan[-1])
    return next((stage for stage in plan if step <= stage.last), plan[-1])


def save_adapter(model: LarpMllmForCausalLM, folder: Path, zero_stage: int, is_main: bool) -> None:
    """Write the unsharded weights of the adapter into a run folder; the file is whole or absent. Collective."""
    with gathered_weights(model.adapter, zero_stage):
        if is_main:
            with replacing(folder / ADAPTER_FILE, sync=True) as part:
                save_file({name: tensor.contiguous() for name, tensor in model.adapter.state_dict().items()}, part)


def load_adapter(model: LarpMllmForCausalLM, folder: Path) -> None:
    """Load what `save_adapter` wrote into a new model; ValueError if it is missing or does not fit."""
    path = folder / ADAPTER_FILE
    try:
        model.adapter.load_state_dict(load_file(path, device=str(model.device)))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path}, the adapter of the stage align, cannot be used ({str(error).splitlines()[0]}): train "
            "anew with another --out"
        ) from error


def _warmup(config: AlignConfig | JointConfig) -> int:
    return min(_MOST_WARMUP, config.steps // 10) if config.warmup is None else config.warmup


def _check(config: AlignConfig | JointConfig, name: str, *rates: str) -> None:
    if config.steps < 0:
        raise ValueError(f"{name}.steps must be 0 (the stage is left out) or more, got {config.steps}")
    for rate in rates:
        value = getattr(config, rate)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}.{rate} must be a positive number, got {value}")
    if config.steps and config.warmup is not None and not 0 <= config.warmup < config.steps:
        raise ValueError(
            f"{name}.warmup is {config.warmup} steps of a stage of {config.steps}: it must be 0 or more and shorter than the "
            "stage; lower it, leave it out, or train longer"
        )
