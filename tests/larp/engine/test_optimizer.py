"""Parameter groups of each optimizer; saving and loading of Muon with AdamW."""

import copy

from larp.engine.backend import EngineConfig, make_engine
from larp.engine.distributed import Ranks
from larp.engine.optimizer import Muon, MuonAdamW, OptimizerConfig, build_optimizer, orthogonalise
from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig

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


def tokenizer() -> LarpTokenizer:
    torch.manual_seed(0)
    sides = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("depth", "heads")}
    widths = {"encoder_width": 16, "decoder_width": 16}
    prior = PriorConfig(depth=1, heads=2, width=16, positions=4)
    return LarpTokenizer(
        TokenizerConfig(4, 8, 8, (4, 8, 8), num_tokens=4, codebook_size=8, code_dim=4, prior=prior, **widths, **sides)
    )


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_the_prior_has_its_own_rate_and_the_rest_is_unaffected(name):
    before = tokenizer()
    moved = {}
    for prior_lr in (None, 1e-3, 1e-4):
        model = tokenizer()
        update(model, build_optimizer(model, OptimizerConfig(name, lr=1e-3, prior_lr=prior_lr, weight_decay=0.1)))
        pairs = zip(model.named_parameters(), before.parameters(), strict=True)
        moved[prior_lr] = {key: (p - q).detach() for (key, p), q in pairs}
    for key, step in moved[1e-3].items():
        torch.testing.assert_close(moved[None][key], step)
        # A tenth of the rate is a tenth of the way, matrices and all.
        torch.testing.assert_close(
            moved[1e-4][key], step * (0.1 if key.startswith("prior.") else 1), atol=1e-6, rtol=1e-2
        )


@pytest.mark.parametrize(("name", "stage"), [("adam", 0), ("adamw", 1), ("adamw", 2), ("muon", 0)])
def test_the_priors_rate_keeps_its_peak_through_the_schedule(ranks, name, stage):
    model = tokenizer()
    config = OptimizerConfig(name, lr=1e-3, matrix_lr=0.02, prior_lr=1e-4, weight_decay=0.0)
    optimizer = build_optimizer(model, config, stage)
    engine = make_engine(model, optimizer, lambda step: float(step == 1), EngineConfig(zero_stage=stage), 2, ranks)
    before = {}
    for step in range(2):
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        # A loss that every parameter takes part in.
        outputs = engine(torch.rand(2, 3, 4, 8, 8))
        engine.backward((outputs.reconstruction - 1).square().mean() + outputs.prior.loss)
        engine.step()
        if step == 0:
            assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    largest = {key: (p - before[key]).abs().max().item() for key, p in model.named_parameters()}
    assert largest["prior.head.bias"] == pytest.approx(1e-4, rel=0.2) and largest["head.bias"] == pytest.approx(
        1e-3, rel=0.2
    )
    expected = {"lr": 1e-3, "prior_lr": 1e-4}
    if name == "muon":
        expected |= {"matrix_lr": 0.02, "prior_matrix_lr": 0.002}
    assert engine.learning_rates == pytest.approx(expected)


def test_a_prior_rate_without_a_prior_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.prior_lr = 0\.1 is given, but there is no prior"):
        build_optimizer(small(), OptimizerConfig("adamw", prior_lr=0.1))
    with pytest.raises(ValueError, match=r"optimizer\.prior_lr = -1 must be positive"):
        OptimizerConfig(prior_lr=-1)


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


def test_muon_equals_torchs_up_to_precision():
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


def test_muon_is_refused_with_sharding():
    with pytest.raises(ValueError, match="zero_stage 0"):
        build_optimizer(small(), OptimizerConfig("muon"), zero_stage=1)
    with pytest.raises(ValueError, match="closure"):
        MuonAdamW(
            [{"params": [torch.nn.Parameter(torch.ones(2, 2))]}],
            [{"params": [torch.nn.Parameter(torch.ones(2))]}],
            OptimizerConfig("muon"),
        ).step(lambda: 0)


def test_muon_divides_the_matrices_among_processes(monkeypatch):
    stacks = [torch.randn(3, 8, 4), torch.randn(1, 4, 6)]
    whole = [orthogonalise(stack) for stack in stacks]
    muon, parts = Muon([torch.nn.Parameter(torch.zeros(2, 2))], lr=0.1), []
    monkeypatch.setattr("larp.engine.optimizer.gather", lambda part: parts.append(part) or torch.cat([part, part]))
    for rank in (0, 1):
        monkeypatch.setattr("larp.engine.optimizer.current_ranks", lambda rank=rank: Ranks(rank, 2))
        muon._orthogonalise(stacks)
    assert parts[0].numel() == parts[1].numel() == 2 * 32 + 24
    monkeypatch.setattr("larp.engine.optimizer.gather", lambda part: torch.cat(parts))
    assert all(torch.equal(ours, one) for ours, one in zip(muon._orthogonalise(stacks), whole, strict=True))


def test_muon_in_bfloat16_is_near_float32():
    stack = torch.randn(2, 32, 16)
    exact = orthogonalise(stack)
    (found,) = Muon([torch.nn.Parameter(torch.zeros(2, 2))], lr=0.1, in_bf16=True)._orthogonalise([stack])
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    assert (found - exact).norm() / exact.norm() < 0.02
