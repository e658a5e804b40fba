"""Who trains together: the ranks, what launchers tell about them, and the few collectives that trainers need."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the processes that train together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes shared files."""
        return self.rank == 0


_current: Ranks | None = None


def current_ranks() -> Ranks:
    """The Ranks of the running session, or those of a lone CPU process outside one."""
    return _current or Ranks()


def set_current_ranks(ranks: Ranks | None) -> None:
    """For backend.start and backend.finish only."""
    global _current
    _current = ranks


def fill_in_environment(environment: MutableMapping[str, str]) -> tuple[str, ...]:
    """Set the launcher's variables for one process if no launcher did; returns the names that were set."""
    given = [name for name in _RANK_VARIABLES if name in environment]
    if "RANK" in given or "WORLD_SIZE" in given:
        missing = sorted(set(_RANK_VARIABLES) - set(given))
        if missing:
            raise ValueError(
                f"{', '.join(given)} are set but {', '.join(missing)} are not: start with `deepspeed` or "
                "`torchrun`, or unset them to train in one process"
            )
        return ()
    environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    return _RANK_VARIABLES


def free_port() -> int:
    """A TCP port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def local_world_size() -> int:
    """Ranks on this machine, as the launcher says; 1 without one."""
    # torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE.
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks of a tensor of the same shape and dtype on each; a new tensor on the device of the input."""
    ranks = current_ranks()
    total = tensor.detach().clone()
    if ranks.world_size > 1:
        total = total.to(ranks.device)
        torch.distributed.all_reduce(total)
    return total.to(tensor.device)


def gather(tensor: Tensor) -> Tensor:
    """The tensors of all ranks, of one shape, joined along axis 0 in the order of the ranks."""
    ranks = current_ranks()
    if ranks.world_size == 1:
        return tensor
    parts = [torch.empty_like(tensor, device=ranks.device) for _ in range(ranks.world_size)]
    torch.distributed.all_gather(parts, tensor.detach().to(ranks.device).contiguous())
    return torch.cat(parts).to(tensor.device)


def gather_objects(obj: Any) -> list[Any]:
    """Every rank's object (anything picklable), in the order of the ranks."""
    ranks = current_ranks()
    if ranks.world_size == 1:
        return [obj]
    box = [None] * ranks.world_size
    torch.distributed.all_gather_object(box, obj)
    return box


def reduce_mean(values: dict[str, Tensor | float]) -> dict[str, float]:
    """The mean over ranks of named scalars; all ranks pass the same names in the same order."""
    if not values:
        return {}
    numbers = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
    mean = reduce_sum(numbers) / current_ranks().world_size
    return dict(zip(values, mean.tolist(), strict=True))


def barrier() -> None:
    """Wait until every rank is here."""
    if current_ranks().world_size > 1:
        torch.distributed.barrier()


def broadcast_object(obj: Any) -> Any:
    """Give every rank the main rank's object (anything picklable)."""
    ranks = current_ranks()
    if ranks.world_size == 1:
        return obj
    box = [obj]
    torch.distributed.broadcast_object_list(box, src=0, device=ranks.device)
    return box[0]


def main_first(work: Callable[[], Any]) -> Any:
    """`work()` of the main rank, and then, when what it left on disk is there, of each other one. Collective.

    What the main rank raises for a mistake of the user (ValueError, OSError) is raised on all of them, where `of_main` of the
    error says that it is told already: see larp.engine.signals.run_script.
    """
    ranks, found, error = current_ranks(), None, None
    if ranks.is_main:
        try:
            found = work()
        except (ValueError, OSError) as raised:
            error = raised
    told = broadcast_object(None if error is None else str(error))
    if error is not None:
        raise error
    if told is not None:
        again = ValueError(told)
        again.of_main = True
        raise again
    return found if ranks.is_main else work()


@contextmanager
def whole(module: nn.Module, zero_stage: int) -> Iterator[None]:
    """Inside, every rank holds all weights, also those that stage 3 shards; changes are not kept. Collective.

    For reading weights, saving among them; do not call the module inside.
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


def whole_copy(module: nn.Module, make: Callable[[], nn.Module], zero_stage: int) -> nn.Module:
    """Return the module, or where stage 3 shards it a copy with all weights, for other uses than training. Collective.

    `make()` builds a module of the same shape. No random numbers are sampled, which training would miss.
    """
    if zero_stage < 3:
        return module
    with torch.device("meta"):
        copy = make()
    with whole(module, zero_stage):
        weights = {name: weight.detach().clone() for name, weight in module.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    return copy
