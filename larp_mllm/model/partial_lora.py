"""Partial LoRA: low-rank updates of a base's linear layers that act at the positions of video ids alone.

    add_partial_lora(model.base, rank=16)
    with at_positions(is_video):                # bool (B, S)
        model.base.base_model(inputs_embeds=...)

Text takes the path of the frozen base: without a video before it, what the model says of text is the base's to the last bit.
The method is that of InternLM-XComposer2 (arXiv:2401.16420); the updates cannot be merged into the base's weights.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The linear layers of Llama, Qwen and Mistral. Others have others, see `larp_mllm.model.probe.linear_layers`.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Per thread, since several may use one model.
_POSITIONS: ContextVar[Tensor | None] = ContextVar("positions of video ids", default=None)


class PartialLoraLinear(nn.Linear):
    """A linear layer W with a low-rank update: x -> W x + up(down(x)) at the positions of `at_positions`, W x elsewhere.

    It takes over the parameters of `linear`, so that their names in a state dict stay as they were.
    """

    def __init__(self, linear: nn.Linear, rank: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_down = nn.Parameter(linear.weight.new_empty(rank, self.in_features))
        self.lora_up = nn.Parameter(linear.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, in) -> (B, S, out)."""
        out, where = F.linear(x, self.weight, self.bias), _POSITIONS.get()
        if where is None:
            return out
        # Chosen where rows are narrow: of the width of `out`, the choice costs a seventh of a training step.
        down = F.linear(x, self.lora_down)
        # Some layers get the positions of all rows as one dimension.
        down = torch.where(where.view(*x.shape[:-1], 1), down, 0)
        return torch.addmm(out.flatten(0, -2), down.flatten(0, -2), self.lora_up.T).view_as(out)


def add_partial_lora(base: nn.Module, rank: int, layers: Collection[str] = PROJECTIONS) -> None:
    """Replace linear layers of `base` by such with updates of this rank, which change nothing yet.

    layers: the last parts of their names. Raises ValueError for a base without any.
    """
    found = layers_named(base, layers)
    if not found:
        raise no_layers(base)
    for name, layer in found:
        parent, _, own = name.rpartition(".")
        setattr(base.get_submodule(parent), own, PartialLoraLinear(layer, rank))


def layers_named(base: nn.Module, last: Collection[str]) -> list[tuple[str, nn.Linear]]:
    """Return the names and linear layers of `base` whose names end with one of `last`."""
    linear = ((name, layer) for name, layer in base.named_modules() if isinstance(layer, nn.Linear))
    return [(name, layer) for name, layer in linear if name.rpartition(".")[2] in last]


def no_layers(base: nn.Module) -> ValueError:
    """Return the error for a base without linear layers."""
    return ValueError(
        f"LoRA finds no linear layer besides the head in this base ({type(base).__name__}): train it with --joint.method full"
    )


def for_recomputation() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The `context_fn` of gradient checkpointing: what is computed again, in another thread perhaps, has the positions of now."""
    return nullcontext(), at_positions(_POSITIONS.get())


@contextmanager
def at_positions(where: Tensor | None) -> Iterator[None]:
    """In the block, the updates act at these positions, bool (B, S), of what passes through a base; None: nowhere."""
    token = _POSITIONS.set(where)
    try:
        yield
    finally:
        _POSITIONS.reset(token)
