"""Activation checkpointing and torch.compile: the same numbers, the same checkpoints."""

import shutil

from larp.engine.backend import EngineConfig, make_engine
from larp.engine.checkpoint import load_state, newest_state, save_state
from larp.models.discriminator import Discriminator, DiscriminatorConfig
from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.models.noise import BatchNoise
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig

import pytest
import torch
from torch import nn

CLIP = torch.rand(2, 3, 8, 16, 16, generator=torch.Generator().manual_seed(0))


def tokenizer(dropout=0.1, depth=2):
    torch.manual_seed(0)
    sides = {f"{side}_{name}": v for side in ("encoder", "decoder") for name, v in dict(width=16, heads=2).items()}
    model = LarpTokenizer(
        TokenizerConfig(
            8, 16, 16, (4, 8, 8), num_tokens=4, codebook_size=16, code_dim=4, encoder_depth=depth, decoder_depth=depth,
            init="balanced", prior=PriorConfig(depth=depth, heads=2, width=16, positions=4, dropout=dropout), **sides,
        )
    )  # fmt: skip
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model


def discriminator(depth=2):
    torch.manual_seed(0)
    return Discriminator(DiscriminatorConfig(8, 16, 16, (4, 8, 8), hidden=16, depth=depth, heads=2))


def generator():
    torch.manual_seed(0)
    return LarpGenerator(GeneratorConfig(num_tokens=4, codebook_size=16, depth=2, heads=2, width=16, num_classes=2))


def tokenizer_loss(model):
    out = model(CLIP, BatchNoise(0, 0, len(CLIP)), 0.5)
    return (out.reconstruction - CLIP).square().mean() + out.prior.loss + out.quantized.commitment_loss


def discriminator_loss(model):
    return model(CLIP).square().mean()


def generator_loss(model):
    return model(torch.tensor([[1, 2, 3, 4]]), torch.tensor([0])).square().mean()


def train(model, loss_of, steps=2, **engine_options):
    """Return losses, the gradient of the last step, and the bytes stored for it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = make_engine(model, optimizer, lambda step: 1.0, EngineConfig(**engine_options), 2, RANKS)
    losses, kept = [], {}
    torch.manual_seed(1)
    for _ in range(steps):
        kept.clear()

        def note(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = loss_of(engine)
        engine.backward(loss)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        engine.step()
        losses.append(loss.item())
    return losses, gradients, sum(kept.values())


RANKS = None


@pytest.fixture(autouse=True)
def _ranks(ranks):
    global RANKS
    RANKS = ranks


@pytest.mark.parametrize(
    ("make", "loss_of"),
    [
        (tokenizer, tokenizer_loss),
        (discriminator, discriminator_loss),
        (generator, generator_loss),
    ],
    ids=["tokenizer", "discriminator", "generator"],
)
def test_checkpointing_gives_the_same_losses_and_gradients_with_less_memory(make, loss_of):
    losses, gradients, kept = train(make(), loss_of)
    again, gradients_again, kept_again = train(make(), loss_of, activation_checkpointing=True)
    assert again == losses
    for name, gradient in gradients.items():
        assert torch.equal(gradients_again[name], gradient), name
    assert kept_again < 0.75 * kept


def test_a_model_without_blocks_is_named():
    with pytest.raises(ValueError, match=r"discriminator has no blocks.*activation_checkpointing off"):
        make_engine(
            nn.Linear(2, 2), torch.optim.SGD(nn.Linear(2, 2).parameters()), lambda s: 1.0,
            EngineConfig(activation_checkpointing=True), 2, RANKS, name="discriminator",
        )  # fmt: skip


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"engine\.compile needs a compiler, and no-such-compiler was not found"):
        train(tokenizer(), tokenizer_loss, compile=True)


@pytest.mark.slow
def test_compiled_checkpoints_are_the_same_and_resume_without(monkeypatch, tmp_path):
    """With torch's tracing but without its C++ compiler."""
    compiled = []
    compile_in_place = nn.Module.compile

    def traced(module, **options):
        compiled.append(module)
        compile_in_place(module, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", traced)
    monkeypatch.setattr("shutil.which", lambda name: name)
    engines = {}
    for compile in (True, False):
        model = tokenizer(dropout=0.0, depth=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engines[compile] = make_engine(model, optimizer, lambda s: 1.0, EngineConfig(compile=compile), 2, RANKS)

    def step(engine):
        loss = tokenizer_loss(engine)
        engine.backward(loss)
        engine.step()
        return loss.item()

    assert len(compiled) == 3, "encoder, decoder and prior have one block each"
    assert step(engines[True]) == pytest.approx(step(engines[False]), rel=1e-4)
    assert engines[True].module.state_dict().keys() == engines[False].module.state_dict().keys()
    save_state({"model": engines[True]}, tmp_path, 1, {})
    load_state({"model": engines[False]}, newest_state(tmp_path))
    assert step(engines[True]) == pytest.approx(step(engines[False]), rel=1e-4)
    folder = engines[True].module.save_pretrained(tmp_path / "model")
    assert LarpTokenizer.from_pretrained(folder).weight_hash() == engines[True].module.weight_hash()


@pytest.mark.slow
def test_compiling_changes_no_loss():
    """With the C++ compiler, which takes ten seconds for each kind of block."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    losses, gradients, _ = train(discriminator(depth=1), discriminator_loss)
    again, gradients_again, _ = train(discriminator(depth=1), discriminator_loss, compile=True)
    assert again == pytest.approx(losses, rel=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-3, atol=1e-5)
