import math

import pytest
import torch

from alphadecay import FIT_METHODS, UndefinedPowerLaw, fit_power_law
from alphadecay.spectral import power_law
from tests.support import reference


def sample(n, alpha, seed):
    """Eigenvalues drawn from a density proportional to lambda^-alpha over 1."""
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((1 - uniform) ** (-1 / (alpha - 1))).sort().values


@pytest.mark.parametrize("method", FIT_METHODS)
@pytest.mark.parametrize("n", [50, 51, 333])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_the_plain_loops(method, n, seed):
    values = sample(n, 2.0 + 0.5 * seed, seed)
    law = fit_power_law(values, method)
    alpha, D, threshold = reference.fit(values.tolist(), method)
    assert law.xmin == threshold
    assert (law.alpha, law.D) == pytest.approx((alpha, D), rel=1e-10)


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_recovers_a_known_exponent(alpha):
    for method in ("median", "median-paper", "goodness-of-fit"):
        assert fit_power_law(sample(20000, alpha, 0)[-4000:], method).alpha == pytest.approx(
            alpha, rel=0.06
        )


def test_the_two_conventions_differ_as_published():
    """METHOD: by 0.002 to 0.03 on ordinary matrices."""
    values = (
        torch.linalg.svdvals(
            torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
        ).flip(0)
        ** 2
    )
    difference = abs(fit_power_law(values).alpha - fit_power_law(values, "median-paper").alpha)
    assert 0.002 < difference < 0.03


def spectra(seed):
    """Spectra of many kinds, one after another, of 2 to 200 eigenvalues."""
    g = torch.Generator().manual_seed(seed)
    n = [2 + seed, 30, 200][seed % 3]
    uniform = torch.rand(n, generator=g, dtype=torch.float64)
    yield (
        "gaussian",
        torch.linalg.svdvals(torch.randn(n, 2 * n, generator=g, dtype=torch.float64)).flip(0) ** 2,
    )
    yield (
        "square gaussian",
        torch.linalg.svdvals(torch.randn(n, n, generator=g, dtype=torch.float64)).flip(0) ** 2,
    )
    yield "heavy tail", sample(n, 1.5 + uniform[0], seed)
    yield "exact power law", (1 - torch.arange(n, dtype=torch.float64) / n) ** -0.7
    yield "few distinct values", (4 * uniform).floor().add(1).sort().values
    yield "two clusters", torch.cat([1 + uniform, 1e6 * (2 + uniform)]).sort().values
    yield "a lone outlier", torch.cat([1 + 0.1 * uniform, torch.tensor([1e5])]).sort().values
    yield "nearly equal", (1 + 1e-4 * uniform).sort().values
    yield "tiny", 1e-30 * sample(n, 2.5, seed)


@pytest.mark.parametrize("method", ["goodness-of-fit", "fix-finger", "fix-finger-reference"])
@pytest.mark.parametrize("seed", range(24))
def test_the_bounds_rule_out_no_winner(method, seed):
    for kind, values in spectra(seed):
        alpha, D, threshold = reference.fit(values.tolist(), method)
        if alpha is None:
            with pytest.raises(UndefinedPowerLaw):
                fit_power_law(values, method, tolerance=0.0)
            continue
        law = fit_power_law(values, method, tolerance=0.0)
        assert law.xmin == threshold, kind
        assert (law.alpha, law.D) == pytest.approx((alpha, D), rel=1e-10), kind


def test_of_equal_distances_the_lowest_threshold_wins(monkeypatch):
    monkeypatch.setattr(
        "alphadecay.spectral.power_law._distances",
        lambda logs, ranks, own, rates, sizes: torch.full((len(own),), 0.5),
    )
    assert fit_power_law(sample(100, 2.5, 0), "goodness-of-fit").tail == 100


@pytest.mark.parametrize("block, numbers", [(7, 2**15), (16, 100), (1, 1)])
def test_the_search_blocks_change_nothing(monkeypatch, block, numbers):
    values = sample(300, 2.5, 0)
    whole = fit_power_law(values, "goodness-of-fit")
    monkeypatch.setattr("alphadecay.spectral.power_law.BLOCK_ROWS", block)
    monkeypatch.setattr("alphadecay.spectral.power_law.ONE_THREAD", numbers)
    assert fit_power_law(values, "goodness-of-fit") == whole


def test_fix_finger_windows_differ():
    """The published lower bound is a logarithm, which excludes almost no threshold."""
    values = torch.cat([sample(40, 2.5, 0), 100 * sample(200, 2.5, 1)]).sort().values
    assert fit_power_law(values, "fix-finger").xmin >= 95
    assert (
        reference.fit(values.tolist(), "fix-finger-reference")[2]
        == fit_power_law(values, "fix-finger-reference").xmin
    )


def test_xmin_pos():
    values = sample(100, 2.5, 0)
    law = fit_power_law(values, xmin_pos=4)
    assert (law.tail, law.xmin) == (75, values[25])


def test_filter_zeros():
    values = torch.cat([torch.full((60,), 1e-6, dtype=torch.float64), sample(100, 2.5, 0)])
    assert fit_power_law(values, filter_zeros=True) == fit_power_law(values[60:])
    assert fit_power_law(values) != fit_power_law(values[60:])
    tiny = sample(100, 2.5, 0) * 1e-9
    assert fit_power_law(tiny, filter_zeros=True) == fit_power_law(
        tiny
    )  # none would be left: all are kept


@pytest.mark.parametrize("method", FIT_METHODS)
@pytest.mark.parametrize("values", [torch.zeros(60), torch.ones(60), torch.ones(1)])
def test_undefined(method, values):
    with pytest.raises(UndefinedPowerLaw):
        fit_power_law(values, method)


@pytest.mark.parametrize("method", ["goodness-of-fit", "fix-finger", "fix-finger-reference"])
def test_searches_pass_over_zeros(method):
    values = torch.cat([torch.zeros(100, dtype=torch.float64), sample(100, 2.5, 0)])
    law = fit_power_law(values, method)
    assert law.xmin >= 1 and math.isfinite(law.alpha) and 0 <= law.D < 1


def test_a_tail_of_two_can_win():
    assert fit_power_law(torch.tensor([1.0, 2.0]), "goodness-of-fit").tail == 2


@pytest.mark.parametrize("method", ["median", "median-paper"])
def test_a_zero_median_has_its_reason(method):
    with pytest.raises(UndefinedPowerLaw, match="the median eigenvalue is zero"):
        fit_power_law(torch.cat([torch.zeros(40), torch.ones(20)]), method)


def test_bad_arguments():
    with pytest.raises(ValueError, match="not in ascending order"):
        fit_power_law(torch.arange(60).flip(0))
    with pytest.raises(ValueError, match="unknown fit 'hill': choose one of median"):
        fit_power_law(torch.rand(60), "hill")
    with pytest.raises(ValueError, match="xmin_pos is 1"):
        fit_power_law(torch.rand(60), xmin_pos=1)


def test_a_bound_that_is_rounded_up_rules_out_no_winner(monkeypatch):
    """A bound may exceed the D of its tail by rounding, which must not end the search early."""
    calls = []

    def equally_good(logs, ranks, thresholds, rates, sizes):
        calls.append(len(sizes))  # the first call computes the bounds, the others D
        return torch.full_like(sizes, 0.25 + (power_law.ROUNDING / 2 if len(calls) == 1 else 0))

    monkeypatch.setattr(power_law, "BLOCK_ROWS", 1)
    monkeypatch.setattr(power_law, "_distances", equally_good)
    assert fit_power_law(sample(30, 2.5, 0), "goodness-of-fit").tail == 30
    assert len(calls) == 1 + 29  # every tail was fitted, because each may be the best


def test_fix_finger_takes_no_threshold_above_its_window():
    """The body of the spectrum has its peak near 1, and the tail above 20 is an exact power law."""
    generator = torch.Generator().manual_seed(0)
    body = torch.randn(400, generator=generator, dtype=torch.float64).mul(0.5).exp()
    values = torch.cat([body, 20 * sample(200, 2.5, 1)]).sort().values
    logs = values.log10()
    counts = torch.histc(logs, bins=100)
    width = (logs[-1] - logs[0]) / 100
    peak = float(10 ** (logs[0] + counts.argmax() * width))
    assert fit_power_law(values, "goodness-of-fit").xmin > 2 * peak
    assert 0.95 * peak <= fit_power_law(values, "fix-finger").xmin <= 1.5 * peak
    assert fit_power_law(values, "fix-finger-reference").xmin <= 1.5 * peak
