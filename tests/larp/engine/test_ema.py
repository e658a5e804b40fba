"""The EMA of the weights: its values, skipped updates, and checkpoints."""

from larp.engine.backend import EngineConfig
from larp.engine.checkpoint import load_state, newest_state, save_state

import pytest
import torch


def weights(module):
    return {name: p.detach().clone() for name, p in module.state_dict().items()}


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16")])
def test_it_follows_the_weights_after_each_update(new_engine, train, stage, precision):
    engine = new_engine(EngineConfig(zero_stage=stage, precision=precision, accumulation=2), ema=0.8)
    expected = None
    for step in range(4):
        train(engine, step, step + 1)
        now = weights(engine.module)
        expected = now if expected is None else {name: 0.8 * expected[name] + 0.2 * now[name] for name in now}
    for name, value in weights(engine.average.module).items():
        torch.testing.assert_close(value, expected[name])
        assert not torch.equal(value, now[name])


@pytest.mark.parametrize("stage", [0, 2])
def test_a_skipped_update_does_not_count(new_engine, train, stage):
    engine = new_engine(EngineConfig(zero_stage=stage), ema=0.5)
    train(engine, 0, 2)
    before = weights(engine.average.module)
    engine.backward((engine(torch.ones(8, 4)) * float("nan")).mean())
    assert engine.step() is False
    assert all(torch.equal(value, before[name]) for name, value in weights(engine.average.module).items())


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16")])
def test_a_resumed_run_ends_with_the_same_average(new_engine, train, tmp_path, stage, precision):
    config = EngineConfig(zero_stage=stage, precision=precision)
    straight = new_engine(config, ema=0.9)
    train(straight, 0, 3)
    save_state({"model": straight}, tmp_path, 3, {})
    train(straight, 3, 6)
    resumed = new_engine(config, ema=0.9)
    load_state({"model": resumed}, newest_state(tmp_path))
    train(resumed, 3, 6)
    expected = weights(straight.average.module)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed.average.module).items())


def test_an_average_that_was_not_saved_starts_with_the_weights(new_engine, train, tmp_path):
    engine = new_engine()
    train(engine, 0, 2)
    save_state({"model": engine}, tmp_path, 2, {})
    resumed = new_engine(ema=0.9)
    load_state({"model": resumed}, newest_state(tmp_path))
    expected = weights(engine.module)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed.average.module).items())


def test_invalid_averages_are_refused(new_engine):
    with pytest.raises(ValueError, match=r"ema = 1\.5 is a decay between 0 and 1"):
        new_engine(ema=1.5)
    with pytest.raises(ValueError, match="zero_stage 0 to 2"):
        new_engine(EngineConfig(zero_stage=3), ema=0.9)
    assert new_engine().average is None
