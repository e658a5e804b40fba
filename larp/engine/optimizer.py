"""Optimizers: Adam, AdamW and Muon, their options, and their parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from larp.config import is_whole
from larp.engine.distributed import current_ranks, gather
from larp.engine.schedules import lr_factor
from larp.kernels.bf16_attention import multiplies_bf16

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule of one model."""

    name: Literal["adam", "adamw", "muon"] = "adamw"
    """`muon`: Muon for the matrices of blocks, AdamW for the rest; zero_stage 0 only, because Muon needs whole matrices."""
    lr: float = 1e-4
    """Peak learning rate of Adam's part."""
    matrix_lr: float = 0.02
    """Peak learning rate of Muon's part."""
    prior_lr: float | None = None
    """Peak learning rate of a tokenizer's prior, by default `lr`. Muon's rate for it is matrix_lr * prior_lr / lr."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of Adam's part."""
    weight_decay: float = 0.0
    """For weights of linear layers and convolutions; not for vectors, tables and embeddings."""
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    warmup: int = 0
    """Steps of linear warm-up."""
    warmup_epochs: float | None = None
    """Warm-up in epochs (passes over the training data), in place of `warmup`."""
    final: float = 0.01
    """Learning rate at the end, as a share of the peak."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of the run at which schedule `step` lowers the learning rate."""
    gamma: float | None = None
    """Factor of schedule `step` at each milestone; by default the one that ends at `final`."""

    def __post_init__(self) -> None:
        for name in ("lr", "matrix_lr", "prior_lr"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"optimizer.{name} = {value} must be positive and finite")
        if self.warmup_epochs is not None and self.warmup:
            raise ValueError(
                f"optimizer.warmup = {self.warmup} (steps) and optimizer.warmup_epochs = {self.warmup_epochs} are both given: "
                "set one of them to 0 or None"
            )
        if self.warmup_epochs is not None and self.warmup_epochs < 0:
            raise ValueError(f"optimizer.warmup_epochs = {self.warmup_epochs} must not be negative")

    def lr_factor(self, steps: int, steps_per_epoch: float) -> Callable[[int], float]:
        """Return the factor on the learning rates by step for a run of `steps`, see `larp.engine.schedules.lr_factor`."""
        epochs = self.warmup_epochs
        warmup = self.warmup if epochs is None else round(epochs * steps_per_epoch)
        return lr_factor(self.schedule, steps, warmup, self.final, self.milestones, self.gamma)


# Prefixes of the repeated blocks, whose matrices Muon trains; embeddings, heads and bottlenecks are trained by AdamW.
_BLOCKS = ("encoder.blocks.", "decoder.blocks.", "prior.blocks.", "layers.")
_PRIOR = "prior."


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Orthogonalise matrices (n, rows, columns) approximately by Newton-Schulz iterations, in their dtype.

    With Muon's quintic (Jordan et al. 2024) singular values end between about 0.7 and 1.2, which is sufficient.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Muon(Optimizer):
    """Nesterov momentum with orthogonalised updates of matrices and decoupled weight decay.

    The algorithm of torch.optim.Muon, in float32 and with all matrices of one shape in one product. In torch's bfloat16 a
    change of the last bit of a gradient changes an update by 0.4 %, so that two processes diverge from one. On CPUs each
    process orthogonalises its share of the matrices; the results are those of one process to the last bit.

    Args:
        matrices, lr, weight_decay, momentum: as of torch.optim.Muon.
        in_bf16: orthogonalise matrices on a CPU in bfloat16, where gradients have no more digits anyway.

    Attributes:
        found_inf: as in torch's fused optimizers, a scalar tensor, 1 if a step must not change anything, or None.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter] | list[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        in_bf16: bool = False,
    ):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.in_bf16 = in_bf16
        self.found_inf: Tensor | None = None
        if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon trains matrices; give other parameters to another optimizer")

    @torch.no_grad()
    def step(self, closure=None):
        """Update the matrices that have gradients; a closure is not supported."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        jobs = []
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            jobs += [(group, matrices) for matrices in shapes.values()]
        directions = [torch.stack(self._directions(matrices, group["momentum"])) for group, matrices in jobs]
        for (group, matrices), updates in zip(jobs, self._orthogonalise(directions), strict=True):
            rows, columns = matrices[0].shape
            rate, decay = group["lr"] * max(1.0, rows / columns) ** 0.5, group["lr"] * group["weight_decay"]
            if self.found_inf is not None:
                updates, decay = updates * (1 - self.found_inf), decay * (1 - self.found_inf)
            torch._foreach_mul_(matrices, 1 - decay)
            torch._foreach_add_(matrices, list(updates.unbind()), alpha=-rate)

    def _orthogonalise(self, directions: list[Tensor]) -> list[Tensor]:
        """Orthogonalise stacks of matrices, on CPUs each process its share of every stack."""
        if not directions or not directions[0].is_cpu:
            return [orthogonalise(stack) for stack in directions]
        ranks, parts = current_ranks(), []
        for stack in directions:
            share = math.ceil(len(stack) / ranks.world_size)
            own = stack[ranks.rank * share : (ranks.rank + 1) * share]
            part = orthogonalise(own.bfloat16() if self.in_bf16 else own)
            # All processes have equally many, since the parts are gathered.
            parts.append(torch.cat([part, part.new_zeros(share - len(own), *own.shape[1:])]))
        # One collective for all.
        gathered = gather(torch.cat([part.flatten() for part in parts])).view(ranks.world_size, -1)
        shares = gathered.split([part.numel() for part in parts], 1)
        return [
            share.reshape(-1, *stack.shape[1:])[: len(stack)].to(stack.dtype)
            for share, stack in zip(shares, directions, strict=True)
        ]

    def _directions(self, matrices: list[nn.Parameter], momentum: float) -> tuple[Tensor, ...]:
        buffers = [
            self.state[p].setdefault("momentum_buffer", torch.zeros_like(p, dtype=torch.float32)) for p in matrices
        ]
        gradients = [p.grad.float() for p in matrices]
        if self.found_inf is not None:
            # A gradient equal to the momentum leaves it unchanged.
            skip = self.found_inf.bool()
            gradients = [torch.where(skip, buffer, grad) for buffer, grad in zip(buffers, gradients, strict=True)]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        return torch._foreach_lerp(gradients, buffers, momentum)


class MuonAdamW(Optimizer):
    """Muon for `matrices` and torch's AdamW for `others` (both are parameter groups) as one optimizer.

    `param_groups` are those of both. On small budgets Muon leaves the plateau at which every reconstruction is the mean
    colour several times sooner than AdamW (LOG.md).
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        config: OptimizerConfig,
        in_bf16: bool = False,
    ) -> None:
        self.muon = Muon(matrices, lr=config.matrix_lr, weight_decay=config.weight_decay, in_bf16=in_bf16)
        self.adam = torch.optim.AdamW(others, lr=config.lr, betas=config.betas)
        super().__init__([*self.muon.param_groups, *self.adam.param_groups], {})
        self.found_inf: Tensor | None = None
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [*self.muon.param_groups, *self.adam.param_groups]

    def step(self, closure=None):
        """Update all parameters that have gradients; a closure is not supported."""
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure")
        self.muon.found_inf = self.found_inf
        self.muon.step()
        self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both optimizers."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` of the same parameter groups."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adam.load_state_dict(state_dict["adam"])
        self._share_groups()


def check_loaded(engine: Any, steps: int, skipped: int) -> None:
    """Raise ValueError unless a DeepSpeed engine counts in whole numbers, and the state of its optimizer fits its parameters.

    steps, skipped: counts of the checkpoint that was loaded, not yet checked.
    """
    counts = [getattr(engine, name) for name in ("global_steps", "global_samples", "micro_steps", "skipped_steps")]
    if not all(is_whole(count) for count in (*counts, steps, skipped)):
        raise ValueError("its counters are no whole numbers")
    optimizer = engine.basic_optimizer
    parts = [optimizer.muon, optimizer.adam] if isinstance(optimizer, MuonAdamW) else [optimizer]
    parts = [part for part in parts if isinstance(part, Muon | torch.optim.Adam | torch.optim.AdamW)]
    for part in parts:
        names = {"momentum_buffer"} if isinstance(part, Muon) else {"step", "exp_avg", "exp_avg_sq"}
        for parameter, state in part.state.items():
            for name in names | state.keys() if state else ():
                shape = () if name == "step" else parameter.shape
                value = state.get(name)
                if (
                    not isinstance(value, Tensor)
                    or value.shape != shape
                    or value.is_sparse
                    or not value.is_floating_point()
                ):
                    raise ValueError(
                        f"{name} of the optimizer does not fit a parameter of shape {tuple(parameter.shape)}"
                    )
    if steps > skipped and parts and not any(part.state for part in parts):
        raise ValueError("it holds no state of the optimizer")


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, zero_stage: int = 0, precision: str = "fp32"
) -> Optimizer:
    """Return the optimizer of a module's trainable parameters. `zero_stage` and `precision` are those of its engine.

    Each parameter group has its peak rate as `lr` and the name of that rate in the log as `lr_name`: lr, matrix_lr,
    prior_lr or prior_matrix_lr. The prior has its own groups only if `prior_lr` is given. Raises ValueError for Muon with
    ZeRO sharding, and for a `prior_lr` without a prior.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    parts = {"": named}
    if config.prior_lr is not None:
        parts = {
            "": [(name, p) for name, p in named if not name.startswith(_PRIOR)],
            _PRIOR: [(name, p) for name, p in named if name.startswith(_PRIOR)],
        }
        if not parts[_PRIOR]:
            raise ValueError(
                f"optimizer.prior_lr = {config.prior_lr} is given, but there is no prior to train: leave it out"
            )
    groups = [group for prefix, part in parts.items() for group in _groups(module, config, prefix, part)]
    if config.name == "adam":
        return torch.optim.Adam(groups, lr=config.lr, betas=config.betas)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    if zero_stage:
        raise ValueError(
            f"optimizer muon needs whole matrices, which zero_stage {zero_stage} cuts up: use zero_stage 0, or adamw"
        )
    matrices = [group for group in groups if group["lr_name"].endswith("matrix_lr")]
    others = [group for group in groups if not group["lr_name"].endswith("matrix_lr")]
    return MuonAdamW(matrices, others, config, precision == "bf16" and multiplies_bf16())


def _groups(
    module: nn.Module, config: OptimizerConfig, prefix: str, named: list[tuple[str, nn.Parameter]]
) -> list[dict[str, Any]]:
    """Return the parameter groups of one part of a module: the prior, or everything else."""
    lr = config.prior_lr if prefix else config.lr
    own = {"lr": lr, "lr_name": "prior_lr" if prefix else "lr"}
    if config.name == "adam":
        return [{"params": [p for _, p in named], **own}]
    linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)}
    muon = config.name == "muon"
    inside = {id(p) for name, p in named if muon and id(p) in linear and name.startswith(_BLOCKS)}
    matrices = {"lr": config.matrix_lr * (lr / config.lr), "lr_name": "prior_matrix_lr" if prefix else "matrix_lr"}
    groups = [
        {"params": [p for _, p in named if id(p) in inside], "weight_decay": config.weight_decay, **matrices},
        {
            "params": [p for _, p in named if id(p) in linear and id(p) not in inside],
            "weight_decay": config.weight_decay,
            **own,
        },
        {"params": [p for _, p in named if id(p) not in linear], "weight_decay": 0.0, **own},
    ]
    return [group for group in groups if group["params"]]
