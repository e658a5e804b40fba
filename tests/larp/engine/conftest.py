"""One DeepSpeed session for all engine tests, because starting it takes longer than the tests."""

from larp.engine import backend
from larp.engine.backend import EngineConfig, make_engine

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def _session():
    yield
    backend.finish()


@pytest.fixture
def ranks(_session):
    """The ranks of a single process, freshly seeded."""
    return backend.start(seed=0)


@pytest.fixture
def new_engine(ranks):
    """Make an engine on a tiny model, the same weights each time; two parameter groups with their own rates."""
    made = []

    def make(config=EngineConfig(), factor=lambda step: 1.0, batch=8, **options):  # noqa: B008 - frozen
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
        groups = [{"params": module[0].parameters(), "lr": 1e-2}, {"params": module[2].parameters(), "lr": 1e-3}]
        optimizer = torch.optim.AdamW(groups, betas=(0.5, 0.9))
        made.append(make_engine(module, optimizer, factor, config, batch, ranks, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def batch_of_step(step):
    """Input and target of one step, a function of the step only."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)


@pytest.fixture
def train():
    """Train an engine over steps; returns the losses."""

    def run(engine, first, last):
        losses = []
        for step in range(first, last):
            parts = engine.config.accumulation
            loss_of_step = 0.0
            for inputs, targets in zip(*(part.chunk(parts) for part in batch_of_step(step)), strict=True):
                loss = (engine(inputs).float() - targets).square().mean()
                engine.backward(loss)
                engine.step()
                loss_of_step += loss.item() / parts
            losses.append(loss_of_step)
        return losses

    return run
