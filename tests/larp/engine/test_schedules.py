"""Learning-rate factors and ramps."""

import math

from larp.engine.optimizer import OptimizerConfig
from larp.engine.schedules import lr_factor, ramp

import pytest


def test_cosine_warms_up_falls_and_ends_at_final():
    factors = [lr_factor("cosine", 100, 10, 0.01)(step) for step in range(100)]
    assert 0 < factors[0] < 0.2 and factors[10] == 1.0 == max(factors)
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.01)
    assert lr_factor("cosine", 100, 10, 0.01)(5000) == pytest.approx(0.01)
    middle = lr_factor("cosine", 101, 0, 0.2)(50)
    assert middle == pytest.approx(0.6)


def test_constant_and_step():
    assert {lr_factor("constant", 10, 0, 0.1)(step) for step in range(10)} == {1.0}
    factor = lr_factor("step", 100, 5, 0.01)
    assert (factor(0), factor(49), factor(50), factor(74), factor(75)) == (1 / 6, 1.0, 0.1, 0.1, 0.01)


def test_the_steps_are_where_and_as_large_as_asked():
    factor = lr_factor("step", 10, 0, 0.5, (0.2, 0.4, 0.9), 0.1)
    assert [round(factor(step), 9) for step in range(10)] == [1, 1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01, 0.01, 0.001]
    three = lr_factor("step", 10, 0, 0.027, (0.2, 0.4, 0.9))
    assert [three(step) for step in (1, 2, 4, 9)] == pytest.approx([1, 0.3, 0.09, 0.027])


def test_a_warm_up_in_epochs_is_one_in_steps():
    in_epochs = OptimizerConfig(schedule="constant", warmup_epochs=1.5).lr_factor(100, steps_per_epoch=6.2)
    in_steps = OptimizerConfig(schedule="constant", warmup=9).lr_factor(100, steps_per_epoch=6.2)
    assert [in_epochs(step) for step in range(100)] == [in_steps(step) for step in range(100)]
    assert in_epochs(8) < 1 == in_epochs(9)
    with pytest.raises(ValueError, match=r"optimizer\.warmup = 5 .* optimizer\.warmup_epochs = 1\.0 .*both"):
        OptimizerConfig(warmup=5, warmup_epochs=1.0)
    with pytest.raises(ValueError, match=r"warmup_epochs = -1"):
        OptimizerConfig(warmup_epochs=-1)
    with pytest.raises(ValueError, match="shorter than the run"):
        OptimizerConfig(warmup_epochs=20).lr_factor(100, steps_per_epoch=6.2)


def test_a_run_of_one_step_works():
    assert lr_factor("cosine", 1, 0, 0.1)(0) == 1.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("linear", 9, 0, 0), "cosine, constant, step"),
        (("cosine", 9, 9, 0), "shorter"),
        (("cosine", 9, 0, 2), "0 to 1"),
        (("step", 9, 0, 0.1, ()), "optimizer.milestones"),
        (("step", 9, 0, 0.1, (0.5, 0.2)), "rise between 0 and 1"),
        (("step", 9, 0, 0.1, (0.5, 3)), "rise between 0 and 1"),
        (("step", 9, 0, 0.1, (0.5,), 1.5), "gamma is 1.5"),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        lr_factor(*arguments)


def test_ramp_rises_and_stays():
    assert [ramp(step, 100, 0.3, 0.5) for step in (0, 15, 30, 99)] == [0.0, 0.25, 0.5, 0.5]
    assert ramp(0, 100, 0.0, 0.5) == 0.5
    assert math.isclose(ramp(3, 100, 0.3, 1.0), 0.1)
