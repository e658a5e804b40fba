"""Which optimizer a recipe names, and which weights decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from larp.engine.schedules import lr_factor

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule of one model."""

    name: Literal["adam", "adamw", "muon"] = "adamw"
    """`muon`: Muon for the matrices inside blocks, AdamW for the rest; whole matrices are needed, so zero_stage 0 only."""
    lr: float = 1e-4
    """Peak learning rate of Adam's part."""
    matrix_lr: float = 0.02
    """Peak learning rate of Muon's part; unused by the others."""
    prior_lr: float | None = None
    """Peak learning rate of a tokenizer's prior, by default `lr`. Under muon its matrices follow: matrix_lr * prior_lr / lr."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of Adam's part."""
    weight_decay: float = 0.0
    """On matrices; vectors, tables and embeddings do not decay."""
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    """What the learning rate does after the warm-up."""
    warmup: int = 0
    """Steps of linear warm-up."""
    warmup_epochs: float | None = None
    """The same in epochs (passes over the training data), in place of `warmup`."""
    final: float = 0.01
    """Learning rate at the end, as a share of the peak."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Where schedule `step` lowers the learning rate, as shares of the run."""
    gamma: float | None = None
    """What schedule `step` multiplies it by there; by default what ends at `final`."""

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
        """Return the factor on the learning rates at each step of a run of `steps`; see `larp.engine.schedules.lr_factor`."""
        epochs = self.warmup_epochs
        warmup = self.warmup if epochs is None else round(epochs * steps_per_epoch)
        return lr_factor(self.schedule, steps, warmup, self.final, self.milestones, self.gamma)


# Where the models keep their repeated blocks; embeddings, heads and bottlenecks are Adam's.
_REPEATED = ("encoder.blocks.", "decoder.blocks.", "prior.blocks.", "layers.")
_PRIOR = "prior."


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of matrices (n, rows, columns) near 1 by Newton-Schulz iterations, in float32.

    Muon's quintic (Jordan et al. 2024) does not converge to 1 but to about 0.7 ... 1.2, which serves as well.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Muon(Optimizer):
    """Momentum (Nesterov, 0.95) whose updates of matrices are orthogonalised, with decoupled weight decay.

    The mathematics of torch.optim.Muon, but in float32 and with all matrices of a shape in one product: torch's bfloat16 turns the last
    bit of a gradient into 0.4 % of an update, so that two processes drift from one, and it takes the matrices one by one.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter] | list[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon trains matrices; give other parameters to another optimizer")

    @torch.no_grad()
    def step(self, closure=None):
        """Update the matrices that have gradients; a closure is not supported."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), alike in shapes.items():
                directions = torch.stack([self._direction(p, group["momentum"]) for p in alike])
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for p, update in zip(alike, orthogonalise(directions), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _direction(self, p: nn.Parameter, momentum: float) -> Tensor:
        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p, dtype=torch.float32))
        gradient = p.grad.float()
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)


class MuonAdamW(Optimizer):
    """Two optimizers behind one face: Muon for `matrices`, torch's AdamW for `others` (both parameter groups).

    On small budgets Muon leaves the plateau where every clip is painted in its mean colour several times sooner than AdamW
    (LOG.md). Learning rates are set through `param_groups`, which are those of the two.
    """

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]], config: OptimizerConfig) -> None:
        self.muon = Muon(matrices, lr=config.matrix_lr, weight_decay=config.weight_decay)
        self.adam = torch.optim.AdamW(others, lr=config.lr, betas=config.betas)
        super().__init__([*self.muon.param_groups, *self.adam.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [*self.muon.param_groups, *self.adam.param_groups]

    def step(self, closure=None):
        """Update all parameters that have gradients; a closure is not supported."""
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure")
        self.muon.step()
        self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both parts."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a `state_dict` of the same split."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adam.load_state_dict(state_dict["adam"])
        self._share_groups()


def build_optimizer(module: nn.Module, config: OptimizerConfig, zero_stage: int = 0) -> Optimizer:
    """Make the optimizer for a module's trainable parameters.

    Each parameter group carries its own peak rate as `lr`, and as `lr_name` the name of that rate in the log: lr, matrix_lr,
    prior_lr, prior_matrix_lr. The prior's groups exist only where `prior_lr` is given. Raises ValueError for Muon with sharded
    parameters, and for a `prior_lr` without a prior.
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
    # One kernel for a whole step, where a GPU has the weights.
    fused = all(p.is_cuda for _, p in named) or None
    if config.name == "adam":
        return torch.optim.Adam(groups, lr=config.lr, betas=config.betas, fused=fused)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)
    if zero_stage:
        raise ValueError(
            f"optimizer muon needs whole matrices, which zero_stage {zero_stage} cuts up: use zero_stage 0, or adamw"
        )
    matrices = [group for group in groups if group["lr_name"].endswith("matrix_lr")]
    others = [group for group in groups if not group["lr_name"].endswith("matrix_lr")]
    return MuonAdamW(matrices, others, config)


def _groups(
    module: nn.Module, config: OptimizerConfig, prefix: str, named: list[tuple[str, nn.Parameter]]
) -> list[dict[str, Any]]:
    """The parameter groups of one part of a module: the prior, or all the rest."""
    lr = config.prior_lr if prefix else config.lr
    own = {"lr": lr, "lr_name": "prior_lr" if prefix else "lr"}
    if config.name == "adam":
        return [{"params": [p for _, p in named], **own}]
    linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear | nn.Conv3d)}
    muon = config.name == "muon"
    inside = {id(p) for name, p in named if muon and id(p) in linear and name.startswith(_REPEATED)}
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
