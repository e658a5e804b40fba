"""The only module that imports DeepSpeed: starting and ending a session, and engines. One CPU process runs the same
code as many GPUs.

    ranks = start(seed=0)
    factor = lr_factor("cosine", steps, warmup, 0.01)
    engine = make_engine(model, optimizer, factor, config.engine, config.batch_size, ranks)
    for batch in loader:                        # micro batches
        engine.backward(engine(batch["clip"]).mean())
        if engine.step() is None:               # the global batch is not complete yet
            continue
        ...                                     # True: updated; False: skipped for a non-finite gradient
    finish()

DeepSpeed is imported on use, because the import can take 20 s. At stage 0 in fp32 it computes no gradient norm and does
not skip non-finite gradients, so `Engine` does both.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from larp.engine import signals
from larp.engine.device_steps import DeviceSteps, fuse, move_step_counters
from larp.engine.distributed import (
    Ranks,
    barrier,
    broadcast_object,
    current_ranks,
    fill_in_environment,
    free_port,
    gather,
    gather_objects,
    local_world_size,
    reduce_mean,
    reduce_sum,
    seed_everything,
    set_current_ranks,
)
from larp.engine.ema import WeightAverage
from larp.engine.optimizer import check_loaded
from larp.engine.settings import AUTOCAST_TYPES, EngineConfig, check_trainable, deepspeed_settings, micro_batch
from larp.engine.untrusted import only_data
from larp.kernels.allocator import keep_freed_memory
from larp.kernels.threads import cores
from larp.models.layers import checkpoint_activations, compile_blocks

import torch
from torch import Tensor, nn
from tqdm import tqdm

__all__ = [
    "Engine", "EngineConfig", "Ranks", "barrier", "broadcast_object", "current_ranks", "finish", "gather", "gather_objects",
    "make_engine", "micro_batch", "reduce_mean", "reduce_sum", "start", "stop_requested",
]  # fmt: skip


# Timeout of collectives: other ranks may encode videos or write samples for hours. The end of a rank is detected earlier,
# by its closed connection or the launcher.
_TIMEOUT = timedelta(hours=12)

# Environment variables that start() has set in the absence of a launcher; None while no session is open.
_own_variables: tuple[str, ...] | None = None


def start(seed: int) -> Ranks:
    """Join the process group and seed torch, numpy and random with `seed` (the same on all ranks).

    Works under `deepspeed`, `torchrun` and plain `python` (one process); a second call only seeds again. From here on
    SIGTERM and the end of the launcher set `stop_requested`. torch uses OMP_NUM_THREADS threads, by default the cores of
    the machine divided by its ranks. Raises ValueError if a launcher has set only a part of its variables.
    """
    global _own_variables
    seed_everything(seed)
    if _own_variables is not None:
        return current_ranks()
    own = fill_in_environment(os.environ)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // local_world_size()))
    device_name = _import_deepspeed()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu") if device_name == "cpu" else torch.device(device_name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    if not own:
        # Before joining the group, because a rank may wait there for ranks that will not start.
        signals.watch_launcher()
    _init_distributed()
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local_rank, device)
    set_current_ranks(ranks)
    _own_variables = own
    signals.install_handlers()
    return ranks


def finish() -> None:
    """Leave the process group and restore signal handlers and environment; `start` may follow."""
    global _own_variables
    if _own_variables is None:
        return
    import deepspeed.comm.comm as comm

    signals.restore_handlers()
    _sharding.clear()
    _restore_linear()
    if torch.distributed.is_initialized():
        comm.destroy_process_group()
    # Otherwise deepspeed considers itself initialised, and a second start() would not initialise it.
    comm.cdb = None
    for name in _own_variables:
        os.environ.pop(name, None)
    _own_variables = None
    set_current_ranks(None)


def stop_requested() -> bool:
    """Whether any rank got SIGTERM or Ctrl-C or lost its launcher; the same on all ranks. Collective."""
    return bool(reduce_sum(torch.tensor(float(signals.stop_flag()))).item())


def _import_deepspeed() -> str:
    """Import deepspeed without log output and compilation; return the name of the device type."""
    if not torch.accelerator.is_available():
        # Otherwise deepspeed warns on every rank that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    logger = logging.getLogger("DeepSpeed")
    for target in (logger, *logger.handlers):
        target.setLevel(logging.WARNING)
    # deepspeed calls deprecated functions of torch, which warn at each call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # Building this C++ extension takes a minute, and an interrupted build blocks all later runs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return get_accelerator().device_name()


def _init_distributed() -> None:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if os.environ["WORLD_SIZE"] == "1":
        # The launcher's default port is the same for every job on the machine; a single process can use any.
        os.environ["MASTER_PORT"] = str(free_port())
    try:
        deepspeed.init_distributed(get_accelerator().communication_backend_name(), verbose=False, timeout=_TIMEOUT)
    except torch.distributed.DistNetworkError as error:
        raise ValueError(
            f"the ranks cannot meet at port {os.environ['MASTER_PORT']}, perhaps because another job uses it: choose "
            f"another one with `deepspeed --master_port 29501 ...` ({str(error).splitlines()[0]})"
        ) from error


def make_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_factor: Callable[[int], float],
    config: EngineConfig,
    global_batch: int,
    ranks: Ranks,
    *,
    name: str = "model",
    max_zero_stage: int = 3,
    max_skipped: int = 10,
    ema: float = 0.0,
) -> Engine:
    """Make the engine of a module and its torch optimizer. Collective; a GAN has two engines.

    Args:
        module: with float32 weights.
        optimizer: the current rate of each parameter group is its peak rate.
        lr_factor: factor on all rates by step.
        config: options of the engine.
        global_batch: clips of a step over all ranks.
        ranks: this process among all.
        name: of the model, for messages.
        max_zero_stage: 2 for a model whose raw module contributes to another model's loss.
        max_skipped: consecutive skipped updates that end the run.
        ema: decay of an average of the weights, for zero_stage 0 to 2; 0 for none.

    Raises ValueError for a zero_stage that is too high, an optimizer without trainable parameters, weights that are not
    float32, and a batch that cannot be divided.
    """
    # From here on each rank has its own dropout masks; rank 0 has those of a single process.
    torch.manual_seed(torch.initial_seed() + ranks.rank)
    check_trainable(module, optimizer, config, name, max_zero_stage, ema)
    # Copied on the module's device, before checkpointing and compilation modify the module.
    average = WeightAverage(module.to(ranks.device), ema) if ema else None
    if config.activation_checkpointing:
        checkpoint_activations(module, name)
    if config.compile:
        compile_blocks(module, ranks.device)
    return Engine(module, optimizer, lr_factor, config, global_batch, ranks, name, max_skipped, average)


# The open engines of stage 3, for which DeepSpeed replaces torch's linear function.
_sharding: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine:
    """A module in training: forward, backward, step, save, load. Made by `make_engine`.

    Attributes:
        step_count: number of global batches, including skipped updates, so that it matches the position in the data.
        first_step: the step of the data that the first global batch was.
        clips_of: returns the names of the clips of a step of the data, for the message about a skipped update; or None.
        average: EMA of the weights, or None.
    """

    def __init__(self, module, optimizer, lr_factor, config, global_batch, ranks, name, max_skipped, average) -> None:
        import deepspeed

        self.name, self.config, self.ranks, self.average = name, config, ranks, average
        self._lr_factor, self._max_skipped = lr_factor, max_skipped
        self._partly_frozen = not all(p.requires_grad for p in module.parameters())
        settings = deepspeed_settings(module, config, global_batch, ranks)
        if config.zero_stage == 3:
            _sharding.add(self)
        on_gpu = ranks.device.type == "cuda" and config.zero_stage == 0 and config.precision != "fp16"
        fused = on_gpu and fuse(optimizer)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        groups = self._engine.basic_optimizer.param_groups
        self._initial_lrs = [group["lr"] for group in groups]
        self._hyperparameters = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
        self.step_count = self.first_step = 0
        self.clips_of: Callable[[int], Sequence[str]] | None = None
        self._skipped = self._skipped_in_a_row = 0
        self._data_step = 0
        self._grad_norm: float | None = None
        self._device_steps = DeviceSteps(self.module, optimizer, config.clip_grad, ranks.device) if fused else None
        self._apply_lr()

    @property
    def module(self) -> nn.Module:
        """The raw module, for uses other than the training pass; at stage 3 its parameters are sharded."""
        return self._engine.module

    @property
    def skipped_count(self) -> int:
        """Number of skipped updates; waits for the device."""
        return self._skipped if self._device_steps is None else self._device_steps.count()

    @property
    def is_skipping(self) -> bool:
        """Whether the last update was skipped (on a GPU the one before), so that the weights may not be worth saving."""
        return self._skipped_in_a_row > 0

    @property
    def grad_norm(self) -> float | None:
        """Global gradient norm before clipping at the last step; inf if skipped, None before the first step.

        Waits for the device.
        """
        if self._device_steps is None or self._device_steps.norm is None:
            return self._grad_norm
        norm = float(self._device_steps.norm)
        return norm if math.isfinite(norm) else math.inf

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group at the last step, or at the first step before it."""
        return self._engine.basic_optimizer.param_groups[0]["lr"]

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rates by the `lr_name` of the parameter groups: lr, prior_lr, ..."""
        groups = self._engine.basic_optimizer.param_groups
        return {group.get("lr_name", "lr"): group["lr"] for group in groups}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward pass under autocast."""
        return self._engine(*args, **kwargs)

    def autocast(self) -> torch.autocast:
        """Return the engine's autocast context, for forward passes of the raw module."""
        dtype = AUTOCAST_TYPES.get(self.config.precision)
        return torch.autocast(self.ranks.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro batch.

        `loss` is the mean over the micro batch; the engine divides by the accumulation and applies the loss scale. A loss that is
        not finite makes the gradient so, on all ranks.
        """
        self._engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))

    def step(self, data_step: int | None = None) -> bool | None:
        """Update the weights; to be called after `backward` of each micro batch.

        data_step: the step of the data, by default `first_step` + `step_count`.

        Returns None while the global batch is incomplete, True after an update, and False if loss or gradient was not finite
        and the update was skipped, on all ranks alike; the main rank then names its clips. At stage 0 on a GPU in fp32 or bf16 the result is True also for
        skipped updates, because the host does not wait for the device; `skipped_count` counts them, and the average is
        updated with the unchanged weights.

        Raises FloatingPointError after `max_skipped` consecutive skipped updates (on a GPU one step later).
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        self._apply_lr()
        before, self._data_step = self._data_step, self.first_step + self.step_count if data_step is None else data_step
        if self._device_steps is not None:
            applied = self._device_step()
            if self._skipped_in_a_row:
                self._name_clips(before)
        else:
            applied = self._host_step() if self.config.zero_stage == 0 else self._sharded_step()
            self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        self.step_count += 1
        if applied and self.average is not None:
            self.average.update(self.module)
        if not applied:
            self._skipped += 1
            self._grad_norm = math.inf
            self._name_clips(self._data_step)
        if self._skipped_in_a_row >= self._max_skipped:
            raise FloatingPointError(
                f"the gradient of the {self.name} was not finite in {self._skipped_in_a_row} steps in a row, "
                f"the last one step {self.step_count}: lower the learning rate, use precision fp32, or look at the "
                "data of these steps; --resume goes on from the checkpoint before them"
            )
        return applied

    def _name_clips(self, data_step: int) -> None:
        """Print which clips the skipped update of a step of the data had."""
        if self.ranks.is_main:
            names = "" if self.clips_of is None else f"; its clips: {', '.join(self.clips_of(data_step))}"
            tqdm.write(f"step {data_step + 1}: loss or gradient of the {self.name} is not finite, no update{names}")

    def _device_step(self) -> bool:
        """Step at stage 0 on a GPU, which decides whether to skip."""
        self._skipped_in_a_row = self._device_steps.in_a_row()
        if self._skipped_in_a_row < self._max_skipped:
            self._device_steps.prepare()
            self._engine.step()
        return True

    def _host_step(self) -> bool:
        """Step at stage 0, where each rank holds all gradients, averaged, and deepspeed does not check them."""
        scaler = self._engine.torch_autocast_z0_gradscaler
        if scaler is not None:
            scaler.unscale_(self._engine.basic_optimizer)
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self._grad_norm = float(norm)
        applied = math.isfinite(self._grad_norm)
        if applied and self.config.clip_grad > 0:
            nn.utils.clip_grads_with_norm_(self.module.parameters(), self.config.clip_grad, norm)
        if not applied and scaler is None:
            # Optimizers ignore parameters without gradients, so that step() only advances deepspeed's counters.
            self._engine.zero_grad()
        self._engine.step()
        return applied

    def _sharded_step(self) -> bool:
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        self._grad_norm = None if norm is None else float(norm)
        return self._engine.was_step_applied()

    @torch.no_grad()
    def overwrite(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a parameter between steps to a value that is the same on every rank; for zero_stage 0 to 2."""
        parameter.copy_(value)
        if self.config.zero_stage > 0:
            from deepspeed.utils import safe_set_full_fp32_param

            # Sharded optimizers hold a copy of the weights, from which the next step would restore the old value.
            safe_set_full_fp32_param(parameter, parameter)

    def close(self) -> None:
        """Release the module and the optimizer, to free their memory for another engine; only `close` may follow."""
        if self._engine is not None:
            self._engine.destroy()
        self._engine = None
        _sharding.discard(self)
        if not _sharding:
            _restore_linear()

    def _apply_lr(self) -> None:
        # Read from the optimizer each time, because loading a checkpoint replaces its groups.
        factor = self._lr_factor(self.step_count)
        groups = self._engine.basic_optimizer.param_groups
        for group, initial, others in zip(groups, self._initial_lrs, self._hyperparameters, strict=True):
            group.update(others, lr=initial * factor)

    def save(self, folder: Path | str, tag: str, client_state: dict[str, Any]) -> None:
        """Write weights, optimizer and counters to folder/tag. Collective; not atomic, see `larp.engine.checkpoint`.

        Frozen weights are left out, because a resumed run builds the module with them.
        """
        own = {"step_count": self.step_count, "skipped_count": self.skipped_count}
        if self._engine.torch_autocast_z0_gradscaler is not None:
            own["scaler"] = self._engine.torch_autocast_z0_gradscaler.state_dict()
        self._engine.save_checkpoint(
            str(folder),
            tag=tag,
            client_state={"larp": {"engine": own, "client": client_state}},
            exclude_frozen_parameters=self._partly_frozen,
        )

    def load(self, folder: Path | str, tag: str | None = None, universal: bool = False) -> dict[str, Any]:
        """Load a checkpoint of `save` and return its client_state. Files that hold code are refused, see `only_data`.

        Learning rates and other optimizer settings stay those of this run. Raises ValueError if there is no checkpoint.

        Args:
            folder, tag: as for `save`; None loads the latest tag.
            universal: read the output of `python -m deepspeed.checkpoint.ds_to_universal`.
        """
        self._engine._config.load_universal_checkpoint = universal
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        with only_data(LossScaler, ZeroStageEnum, fragment_address):
            path, state = self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=not self._partly_frozen)
        if path is None:
            raise ValueError(f"no checkpoint of the {self.name} in {folder}" + (f" with tag {tag}" if tag else ""))
        own = state["larp"]["engine"]
        self.step_count, self._skipped, self._skipped_in_a_row = own["step_count"], own["skipped_count"], 0
        check_loaded(self._engine, self.step_count, self._skipped)
        if self._device_steps is not None:
            self._device_steps.restart(self._skipped)
            move_step_counters(self._engine.basic_optimizer)
        if self._engine.torch_autocast_z0_gradscaler is not None and "scaler" in own:
            self._engine.torch_autocast_z0_gradscaler.load_state_dict(own["scaler"])
        self._apply_lr()
        return state["larp"]["client"]


def _restore_linear() -> None:
    """Restore torch's nn.functional.linear, which the first engine of stage 3 replaces in the whole process."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patches

    if nn.functional.linear is zero3_linear_wrap:
        nn.functional.linear = Patches.linear_bk
