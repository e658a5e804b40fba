"""The processes (ranks) of a run: the launcher's environment, collectives, and weights that ZeRO stage 3 shards."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes shared files."""
        return self.rank == 0


_current: Ranks | None = None


def seed_everything(seed: int) -> None:
    """Seed random, numpy and torch, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def current_ranks() -> Ranks:
    """Return the Ranks of the open session; outside of one, those of a single CPU process."""
    return _current or Ranks()


def set_current_ranks(ranks: Ranks | None) -> None:
    """Set or clear `current_ranks`; for backend.start and backend.finish only."""
    global _current
    _current = ranks


def fill_in_environment(environment: MutableMapping[str, str]) -> tuple[str, ...]:
    """Set the launcher's variables for a single process if no launcher has; return the names that were set.

    Raises ValueError if only a part of them is set.
    """
    given = [name for name in RANK_VARIABLES if name in environment]
    if "RANK" in given or "WORLD_SIZE" in given:
        missing = sorted(set(RANK_VARIABLES) - set(given))
        if missing:
            raise ValueError(
                f"{', '.join(given)} are set but {', '.join(missing)} are not: start with `deepspeed` or "
                "`torchrun`, or unset them to train in one process"
            )
        return ()
    environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    return RANK_VARIABLES


def free_port() -> int:
    """Return an unused TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def local_world_size() -> int:
    """Return the number of ranks on this machine; 1 without a launcher."""
    # Set by torchrun and by the deepspeed launcher, respectively.
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum over ranks of a tensor with equal shape and dtype, as a new tensor on its device. Collective."""
    ranks = current_ranks()
    total = tensor.detach().clone()
    if ranks.world_size > 1:
        total = total.to(ranks.device)
        torch.distributed.all_reduce(total)
    return total.to(tensor.device)


def gather(tensor: Tensor) -> Tensor:
    """Return the tensors of all ranks, of equal shape, concatenated along axis 0 in rank order. Collective."""
    ranks = current_ranks()
    if ranks.world_size == 1:
        return tensor
    parts = [torch.empty_like(tensor, device=ranks.device) for _ in range(ranks.world_size)]
    torch.distributed.all_gather(parts, tensor.detach().to(ranks.device).contiguous())
    return torch.cat(parts).to(tensor.device)


def gather_objects(obj: Any) -> list[Any]:
    """Return the objects of all ranks (anything picklable) in rank order. Collective."""
    ranks = current_ranks()
    if ranks.world_size == 1:
        return [obj]
    objects = [None] * ranks.world_size
    torch.distributed.all_gather_object(objects, obj)
    return objects


def all_agree(value: bool) -> bool:
    """Return whether `value` is true on all ranks. Collective."""
    return all(gather_objects(value))


def reduce_mean(values: dict[str, Tensor | float]) -> dict[str, float]:
    """Return the mean over ranks of named scalars; all ranks pass the same names in the same order. Collective."""
    if not values:
        return {}
    numbers = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
    mean = reduce_sum(numbers) / current_ranks().world_size
    return dict(zip(values, mean.tolist(), strict=True))


def barrier() -> None:
    """Wait until every rank has called this."""
    if current_ranks().world_size > 1:
        torch.distributed.barrier()


def broadcast_object(obj: Any) -> Any:
    """Return the object (anything picklable) of the main rank on all ranks. Collective."""
    ranks = current_ranks()
    if ranks.world_size == 1:
        return obj
    objects = [obj]
    torch.distributed.broadcast_object_list(objects, src=0, device=ranks.device)
    return objects[0]


def main_first(work: Callable[[], Any]) -> Any:
    """Call `work()` on the main rank, then, so that its files exist, on the other ranks; return its result. Collective.

    A ValueError or OSError of the main rank is raised on all ranks. On the other ranks its attribute `reported` is True,
    and larp.engine.signals.run_script does not print it again.
    """
    ranks, result, error = current_ranks(), None, None
    if ranks.is_main:
        try:
            result = work()
        except (ValueError, OSError) as raised:
            error = raised
    message = broadcast_object(None if error is None else str(error))
    if error is not None:
        raise error
    if message is not None:
        repeated = ValueError(message)
        repeated.reported = True
        raise repeated
    return result if ranks.is_main else work()


@contextmanager
def gathered_weights(module: nn.Module, zero_stage: int) -> Iterator[None]:
    """Let every rank hold all weights of a module, including those that stage 3 shards. Collective.

    For reading weights only: changes are discarded, and the module must not be called inside.
    """
    parameters = list(module.parameters())
    sharded = zero_stage == 3
    if sharded:
        parameters[0].all_gather(param_list=parameters)
    try:
        yield
    finally:
        if sharded:
            parameters[0].partition(param_list=parameters, has_been_updated=False)


def gathered_copy(module: nn.Module, make: Callable[[], nn.Module], zero_stage: int) -> nn.Module:
    """Return the module, or at stage 3 a copy with all weights, for uses other than training. Collective.

    `make()` builds a module of the same shape. The random state is not changed.
    """
    if zero_stage < 3:
        return module
    with torch.device("meta"):
        copy = make()
    with gathered_weights(module, zero_stage):
        weights = {name: weight.detach().clone() for name, weight in module.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    return copy
