"""The one place that knows DeepSpeed: starting, engines. One CPU process takes the same path as many GPUs.

    ranks = start(seed=0)
    factor = lr_factor("cosine", steps, warmup, 0.01)
    engine = make_engine(model, optimizer, factor, config.engine, config.batch_size, ranks)
    for batch in loader:                        # micro batches
        engine.backward(engine(batch["clip"]).mean())
        if engine.step() is None:               # the global batch is not complete yet
            continue
        ...                                     # True: updated; False: skipped for a non-finite gradient
    finish()

Measured facts behind the choices here: deepspeed builds C++ helpers unless told not to, can take 20 s to import (so
it is imported on use), and at stage 0 in fp32 neither knows the gradient norm nor refuses a non-finite one (so that
is done here).
"""

from __future__ import annotations

import logging
import math
import os
import random
import warnings
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from larp.engine import signals
from larp.engine.device_steps import DeviceSteps, fuse, place_counters
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
    set_current_ranks,
)
from larp.engine.ema import WeightAverage
from larp.engine.settings import AUTOCAST_TYPES, EngineConfig, deepspeed_settings, micro_batch
from larp.kernels.threads import cores
from larp.models.layers import checkpoint_activations, compile_blocks

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "Engine",
    "EngineConfig",
    "Ranks",
    "barrier",
    "broadcast_object",
    "current_ranks",
    "finish",
    "gather",
    "gather_objects",
    "make_engine",
    "micro_batch",
    "reduce_mean",
    "reduce_sum",
    "start",
    "stop_requested",
]


# ----------------------------------------------------------------------------------------------------- start and finish


# How long a rank waits for the others, which may encode many videos or write samples in the meantime; that one has died, it
# learns from the connection or the launcher, long before.
_PATIENCE = timedelta(hours=12)

# The variables that start() set itself because no launcher had; None while no session runs.
_own_variables: tuple[str, ...] | None = None


def start(seed: int) -> Ranks:
    """Join the other ranks and seed torch, numpy and random with `seed` (the same on all ranks); `finish` undoes it.

    Works under `deepspeed`, `torchrun` and plain `python` (one process) alike; a second call only seeds again.
    SIGTERM, and the end of the launcher, are noted for `stop_requested`. OMP_NUM_THREADS is honoured, otherwise torch
    gets cores // ranks on this machine. Raises ValueError if the launcher set only a part of the variables it should.
    """
    global _own_variables
    _seed_everything(seed)
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
    if not own:
        # Before the ranks meet: one that waits for the others for ever would not notice that all is over.
        signals.watch_launcher()
    _init_distributed()
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local_rank, device)
    set_current_ranks(ranks)
    _own_variables = own
    signals.note_signals()
    return ranks


def finish() -> None:
    """Leave the process group and restore signal handlers and environment; `start` may be called again afterwards."""
    global _own_variables
    if _own_variables is None:
        return
    import deepspeed.comm.comm as comm

    signals.restore()
    _sharding.clear()
    _restore_linear()
    if torch.distributed.is_initialized():
        comm.destroy_process_group()
    # deepspeed believes for ever that it is initialised; without this a second start() would skip the real work.
    comm.cdb = None
    for name in _own_variables:
        os.environ.pop(name, None)
    _own_variables = None
    set_current_ranks(None)


def stop_requested() -> bool:
    """True on all ranks alike once any rank got SIGTERM or lost its launcher: save and leave. Call it on every rank."""
    return bool(reduce_sum(torch.tensor(float(signals.stop_flag()))).item())


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _import_deepspeed() -> str:
    """Import deepspeed without its chatter and its compilers; returns the name of the device type."""
    if not torch.accelerator.is_available():
        # Without this deepspeed warns on every rank that it could find no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    logger = logging.getLogger("DeepSpeed")
    for target in (logger, *logger.handlers):
        target.setLevel(logging.WARNING)
    # deepspeed's own use of torch functions that were renamed, once for each call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # A C++ helper: building it takes a minute, and a build that was killed hangs every later run in silence.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return get_accelerator().device_name()


def _init_distributed() -> None:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if os.environ["WORLD_SIZE"] == "1":
        # Nobody else comes to the launcher's port, which is the same for every job on the machine.
        os.environ["MASTER_PORT"] = str(free_port())
    try:
        deepspeed.init_distributed(get_accelerator().communication_backend_name(), verbose=False, timeout=_PATIENCE)
    except torch.distributed.DistNetworkError as error:
        raise ValueError(
            f"the ranks cannot meet at port {os.environ['MASTER_PORT']}, perhaps because another job uses it: choose "
            f"another one with `deepspeed --master_port 29501 ...` ({str(error).splitlines()[0]})"
        ) from error


# -------------------------------------------------------------------------------------------------------------- engines


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
    """Hand a module and its torch optimizer to DeepSpeed. Call it once for each of several models (a GAN has two).

    The learning rate of each parameter group is the rate it has now times `lr_factor(step)`. `name` is used in
    messages. `max_zero_stage=2` is for a model whose raw module takes part in another model's loss. `ema` is the decay
    of an average of the weights (0: none), for zero_stage 0 to 2. All weights must be float32. Raises ValueError for a
    stage above these, an optimizer without trainable parameters, and a batch that does not divide.
    """
    # From here on each rank samples its own dropout masks; the first keeps the stream that one process would have.
    torch.manual_seed(torch.initial_seed() + ranks.rank)
    if config.zero_stage > max_zero_stage:
        raise ValueError(
            f"zero_stage {config.zero_stage} is not possible for the {name}: its raw module takes part in the "
            "loss of another model, and with the sharded parameters of stage 3 that gives silently wrong gradients; "
            f"use zero_stage 0 to {max_zero_stage}"
        )
    if ema and config.zero_stage > 2:
        raise ValueError(
            f"ema = {ema} averages whole weights, and zero_stage 3 cuts those of the {name} up: use zero_stage 0 to 2"
        )
    if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"the optimizer of the {name} has no trainable parameter: unfreeze a part of it, or do not train it"
        )
    others = sorted({str(p.dtype) for p in module.parameters() if p.is_floating_point()} - {"torch.float32"})
    if others:
        raise ValueError(
            f"the {name} has weights in {', '.join(others)}: load it in float32, `precision` decides the rest"
        )
    # Copied before anything is put on the module, and where the module will be.
    average = WeightAverage(module.to(ranks.device), ema) if ema else None
    if config.activation_checkpointing:
        checkpoint_activations(module, name)
    if config.compile:
        compile_blocks(module, ranks.device)
    return Engine(module, optimizer, lr_factor, config, global_batch, ranks, name, max_skipped, average)


# The engines of stage 3 that are open: while there are any, torch computes linear layers as they need it.
_sharding: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine:
    """A module in training: forward, backward, step, save, load. Made by `make_engine`.

    step_count: global batches done, skipped updates included, so that it stays in step with the data.
    average: of the weights after each update, or None; skipped ones do not count (see `step`).
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
        later = on_gpu and fuse(optimizer)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        groups = self._engine.basic_optimizer.param_groups
        self._initial_lrs = [group["lr"] for group in groups]
        self._hyperparameters = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
        self.step_count = 0
        self._skipped = self._skipped_in_a_row = 0
        self._grad_norm: float | None = None
        self._later = DeviceSteps(self.module, optimizer, config.clip_grad, ranks.device) if later else None
        self._apply_lr()

    @property
    def module(self) -> nn.Module:
        """The raw module, for all but the training pass (at stage 3: for nothing that touches parameters)."""
        return self._engine.module

    @property
    def skipped_count(self) -> int:
        """How many of the steps were skipped."""
        return self._skipped if self._later is None else self._later.count()

    @property
    def grad_norm(self) -> float | None:
        """Global norm before clipping at the last step, inf if it was skipped, None before the first. On a GPU it is waited for."""
        if self._later is None or self._later.norm is None:
            return self._grad_norm
        norm = float(self._later.norm)
        return norm if math.isfinite(norm) else math.inf

    @property
    def lr(self) -> float:
        """The first parameter group's learning rate at the last step, or at the first one to come."""
        return self._engine.basic_optimizer.param_groups[0]["lr"]

    @property
    def learning_rates(self) -> dict[str, float]:
        """The same of every part that has a name of its own (`lr_name` of the parameter groups): lr, prior_lr, ..."""
        groups = self._engine.basic_optimizer.param_groups
        return {group.get("lr_name", "lr"): group["lr"] for group in groups}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward under the engine's autocast."""
        return self._engine(*args, **kwargs)

    def autocast(self) -> torch.autocast:
        """The engine's autocast, for passes through the raw module (another model's loss, validation)."""
        dtype = AUTOCAST_TYPES.get(self.config.precision)
        return torch.autocast(self.ranks.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def backward(self, loss: Tensor) -> None:
        """Add one micro batch's gradients; `loss` is its plain mean, accumulation and loss scale are applied here."""
        self._engine.backward(loss)

    def step(self) -> bool | None:
        """Call once for each micro batch, after `backward`. True: the weights were updated; False: the gradient was
        not finite and the update was skipped on all ranks alike; None: the global batch is not complete yet.

        At stage 0 on a GPU (but for fp16) nothing is waited for: the answer is True, `skipped_count` knows better, and an average
        takes in the weights that a skipped update left. Raises FloatingPointError after `max_skipped` skipped updates in a row,
        there one step later.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        self._apply_lr()
        if self._later is not None:
            applied = self._unwatched_step()
        else:
            applied = self._guarded_step() if self.config.zero_stage == 0 else self._sharded_step()
            self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        self.step_count += 1
        if applied and self.average is not None:
            self.average.update(self.module)
        if not applied:
            self._skipped += 1
            self._grad_norm = math.inf
        if self._skipped_in_a_row >= self._max_skipped:
            raise FloatingPointError(
                f"the gradient of the {self.name} was not finite in {self._skipped_in_a_row} steps in a row, "
                f"the last one step {self.step_count}: lower the learning rate, use precision fp32, or look at the "
                "data of these steps"
            )
        return applied

    def _unwatched_step(self) -> bool:
        """Stage 0 on a GPU: the same, decided there."""
        self._skipped_in_a_row = self._later.in_a_row()
        if self._skipped_in_a_row < self._max_skipped:
            self._later.prepare()
            self._engine.step()
        return True

    def _guarded_step(self) -> bool:
        """Stage 0, where deepspeed does not look: gradients are whole, and already averaged, on every rank."""
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
            # An optimizer passes over parameters without gradient: no decay, no momentum, only the counters move on.
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
        """Put a value into a parameter between steps, the same on every rank; for zero_stage 0 to 2."""
        parameter.copy_(value)
        if self.config.zero_stage > 0:
            from deepspeed.utils import safe_set_full_fp32_param

            # Sharded optimizers keep a copy of their own, with which the next step would undo this.
            safe_set_full_fp32_param(parameter, parameter)

    def close(self) -> None:
        """Let go of the module and the optimizer, so that their memory is free for a next engine; only `close` may follow."""
        if self._engine is not None:
            self._engine.destroy()
        self._engine = None
        _sharding.discard(self)
        if not _sharding:
            _restore_linear()

    def _apply_lr(self) -> None:
        # Always by way of the optimizer: loading a checkpoint puts new group objects there.
        factor = self._lr_factor(self.step_count)
        groups = self._engine.basic_optimizer.param_groups
        for group, initial, others in zip(groups, self._initial_lrs, self._hyperparameters, strict=True):
            group.update(others, lr=initial * factor)

    def save(self, folder: Path | str, tag: str, client_state: dict[str, Any]) -> None:
        """Write weights, optimizer and counters to folder/tag. Collective; not atomic (state.py makes it so).

        Frozen weights are left out: who resumes builds the module with them, and a checkpoint of an adapter stays small.
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
        """Read what `save` wrote (None: the latest tag) and return its client_state. Only for checkpoints of this
        program: it unpickles.

        `universal` reads the output of `python -m deepspeed.checkpoint.ds_to_universal`. Learning rates and other
        optimizer settings stay those of this run. Raises ValueError if there is no checkpoint.
        """
        self._engine._config.load_universal_checkpoint = universal
        path, state = self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=not self._partly_frozen)
        if path is None:
            raise ValueError(f"no checkpoint of the {self.name} in {folder}" + (f" with tag {tag}" if tag else ""))
        own = state["larp"]["engine"]
        self.step_count, self._skipped, self._skipped_in_a_row = own["step_count"], own["skipped_count"], 0
        if self._later is not None:
            self._later.restart(self._skipped)
            place_counters(self._engine.basic_optimizer)
        if self._engine.torch_autocast_z0_gradscaler is not None and "scaler" in own:
            self._engine.torch_autocast_z0_gradscaler.load_state_dict(own["scaler"])
        self._apply_lr()
        return state["larp"]["client"]


def _restore_linear() -> None:
    """Give torch its own nn.functional.linear back, which the first engine of stage 3 replaces for the whole process."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patches

    if nn.functional.linear is zero3_linear_wrap:
        nn.functional.linear = Patches.linear_bk
