"""Learning-rate factors and ramps."""

import math

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


def test_a_run_of_one_step_works():
    assert lr_factor("cosine", 1, 0, 0.1)(0) == 1.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("linear", 9, 0, 0), "cosine, constant, step"),
        (("cosine", 9, 9, 0), "shorter"),
        (("cosine", 9, 0, 2), "0 to 1"),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        lr_factor(*arguments)


def test_ramp_rises_and_stays():
    assert [ramp(step, 100, 0.3, 0.5) for step in (0, 15, 30, 99)] == [0.0, 0.25, 0.5, 0.5]
    assert ramp(0, 100, 0.0, 0.5) == 0.5
    assert math.isclose(ramp(3, 100, 0.3, 1.0), 0.1)
