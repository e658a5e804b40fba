"""Steps skipped on the device: they change nothing and are counted; other steps equal those of the plain optimizer."""

from larp.engine.device_steps import DeviceSteps, fuse, move_step_counters
from larp.engine.optimizer import OptimizerConfig, build_optimizer
from larp.models.generator import GeneratorConfig, LarpGenerator

import pytest
import torch

CPU = torch.device("cpu")


def model() -> LarpGenerator:
    torch.manual_seed(0)
    return LarpGenerator(GeneratorConfig(num_tokens=4, codebook_size=16, depth=2, heads=2, width=16, num_classes=2))


def gradients(module: torch.nn.Module, step: int, poison: bool = False) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    if poison:
        module.abs_pe.grad[0, 0, 0] = torch.nan


def tensors(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the weights and the optimizer's state."""
    parts = (optimizer.muon, optimizer.adam) if hasattr(optimizer, "adam") else (optimizer,)
    states = [state[name] for part in parts for state in part.state.values() for name in sorted(state)]
    return [tensor.detach().clone() for tensor in (*module.parameters(), *states)]


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(name):
    module = model()
    optimizer = build_optimizer(module, OptimizerConfig(name, 1e-2, weight_decay=0.1))
    assert fuse(optimizer)
    steps = DeviceSteps(module, optimizer, 1.0, CPU)

    def step(number: int, poison: bool = False) -> None:
        gradients(module, number, poison)
        steps.prepare()
        optimizer.step()

    step(0)
    before = tensors(module, optimizer)
    for number in (1, 2):
        step(number, poison=True)
    assert (steps.in_a_row(), steps.count()) == (2, 2) and not steps.norm.isfinite()
    for left, right in zip(tensors(module, optimizer), before, strict=True):
        assert torch.equal(left, right)
    step(3)
    assert (steps.in_a_row(), steps.count()) == (0, 2)
    assert not torch.equal(tensors(module, optimizer)[0], before[0])
    steps.restart(5)
    assert (steps.in_a_row(), steps.count()) == (0, 5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_other_steps_are_those_of_the_plain_optimizer(name):
    moved = []
    for fused in (False, True):
        module = model()
        optimizer = build_optimizer(module, OptimizerConfig(name, 1e-2, weight_decay=0.1))
        steps = DeviceSteps(module, optimizer, 1.0, CPU) if fused and fuse(optimizer) else None
        for number in range(3):
            gradients(module, number)
            if steps is not None:
                steps.prepare()
            else:
                torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
        moved.append(list(module.parameters()))
    for plain, fused in zip(*moved, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_step_counters_are_moved_to_the_device():
    module = model()
    optimizer = build_optimizer(module, OptimizerConfig("adamw", 1e-2))
    gradients(module, 0)
    optimizer.step()
    for state in optimizer.state.values():
        state["step"] = 1.0
    fuse(optimizer)
    move_step_counters(optimizer)
    gradients(module, 1)
    optimizer.step()
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_an_optimizer_without_a_fused_kernel_is_unchanged():
    optimizer = torch.optim.SGD(model().parameters())
    assert not fuse(optimizer) and optimizer.param_groups[0]["fused"] is None
