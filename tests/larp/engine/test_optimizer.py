"""Which weights each optimizer gets, and that Muon with AdamW saves and loads."""

import copy

from larp.engine.optimizer import Muon, MuonAdamW, OptimizerConfig, build_optimizer, orthogonalise
from larp.generator import GeneratorConfig, LarpGenerator

import pytest
import torch


def small() -> LarpGenerator:
    torch.manual_seed(0)
    settings = GeneratorConfig(task="class", num_tokens=4, codebook_size=8, depth=1, heads=2, width=16, num_classes=2)
    return LarpGenerator(settings)


def update(model, optimizer) -> None:
    for p in model.parameters():
        p.grad = torch.sin(torch.arange(p.numel(), dtype=torch.float32)).view_as(p)
    optimizer.step()


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_every_parameter_is_trained_once(name):
    model = small()
    optimizer = build_optimizer(model, OptimizerConfig(name))
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_decay_is_on_linear_weights_only():
    model = small()
    decayed, rest = build_optimizer(model, OptimizerConfig("adamw", weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert {id(p) for p in decayed["params"]} == linear


def test_muon_takes_the_matrices_of_the_blocks_and_follows_its_groups():
    model = small()
    optimizer = build_optimizer(model, OptimizerConfig("muon", lr=1e-3, matrix_lr=0.02))
    matrices = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert matrices == {id(p) for name, p in model.named_parameters() if name.startswith("layers.") and p.ndim == 2}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.clone() for p in model.parameters()]
    update(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_muon_is_torchs_but_for_its_precision():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 8), (8, 24), (24, 8))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    pair = Muon(ours, lr=0.1, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=5e-3)


def test_orthogonalised_matrices_have_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 16, 48)))
    assert values.min() > 0.5 and values.max() < 1.3


def test_muon_resumes_exactly():
    model, config = small(), OptimizerConfig("muon", lr=1e-2)
    optimizer = build_optimizer(model, config)
    update(model, optimizer)
    other = small()
    other.load_state_dict(model.state_dict())
    resumed = build_optimizer(other, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, opt in ((model, optimizer), (other, resumed)):
        for group in opt.param_groups:
            group["lr"] *= 0.5
        update(one, opt)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_muon_is_refused_where_matrices_are_cut_up():
    with pytest.raises(ValueError, match="zero_stage 0"):
        build_optimizer(small(), OptimizerConfig("muon"), zero_stage=1)
    with pytest.raises(ValueError, match="closure"):
        MuonAdamW(
            [torch.nn.Parameter(torch.ones(2, 2))],
            [{"params": [torch.nn.Parameter(torch.ones(2))]}],
            OptimizerConfig("muon"),
        ).step(lambda: 0)
