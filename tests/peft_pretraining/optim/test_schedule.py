"""Learning-rate schedules: warm-up, end points, and the middle of the fall."""

import math

import pytest

from peft_pretraining.optim.schedule import lr_factor


def test_cosine():
    factors = [lr_factor(u, "cosine", 100, 10, 0.1) for u in range(1, 101)]
    assert factors[0] == pytest.approx(0.1) and factors[99] == pytest.approx(0.1)
    assert factors[9] == 1.0
    assert factors[54] == pytest.approx(0.55)  # half of the fall
    assert all(a > b for a, b in zip(factors[9:], factors[10:], strict=False))


def test_linear():
    factors = [lr_factor(u, "linear", 100, 0, 0.0) for u in (1, 50, 100)]
    assert factors == pytest.approx([0.99, 0.5, 0.0])


def test_restarts():
    factors = [lr_factor(u, "cosine_restarts", 100, 10, 0.1, 30) for u in (11, 26, 40, 41, 71)]
    assert factors == pytest.approx(
        [1.0, 0.55, 0.1 + 0.9 * (1 + math.cos(math.pi * 29 / 30)) / 2, 1.0, 1.0]
    )


def test_a_run_that_is_all_warm_up():
    assert [lr_factor(u, "linear", 4, 4, 0.0) for u in (1, 4)] == [0.25, 1.0]
