"""Eigenvalues -> alpha and D: the power law that fits the tail of a spectrum."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

METHODS = ("median", "median-paper", "goodness-of-fit", "fix-finger", "fix-finger-reference")
HISTOGRAM_BINS = 100  # of log10 lambda, for fix-finger
ZERO = 1e-5  # filter_zeros leaves out eigenvalues up to here (the reference's threshold)
BLOCK_ROWS = 128  # thresholds that are tried at a time: they take 128 N numbers of memory


ZERO_THRESHOLD = "the median eigenvalue is zero"
EQUAL_TAIL = "all eigenvalues of the tail are equal"
NO_THRESHOLD = "no threshold gives a tail with alpha above 1"
TOO_FEW = "a power law needs at least two eigenvalues"
UNDEFINED = (ZERO_THRESHOLD, EQUAL_TAIL, NO_THRESHOLD, TOO_FEW)


class UndefinedPowerLaw(ValueError):
    """The spectrum has no tail to fit. The text is one of `UNDEFINED`."""


class PowerLaw(NamedTuple):
    """A fitted tail: density proportional to lambda^-alpha for lambda >= xmin.

    alpha: the exponent. D: Kolmogorov-Smirnov distance between the tail and the fit, in [0, 1]. xmin: the threshold.
    tail: how many eigenvalues the fit used.
    """

    alpha: float
    D: float
    xmin: float
    tail: int


def fit_power_law(eigenvalues: Tensor, method: str = "median", xmin_pos: float = 2.0, filter_zeros: bool = False) -> PowerLaw:
    """Fit a power law to the upper part of a spectrum: PL_Alpha_Hill and its two searches for a threshold.

    Args:
        eigenvalues: [N], ascending, not negative (what `alphadecay.eigenvalues` returns).
        method: `median`: the threshold is lambda_i, i = floor(N / xmin_pos), itself one of the n = N - i tail values
            (the published code). `median-paper`: equation 2 of the paper, the threshold being the next lower eigenvalue.
            `goodness-of-fit`: the threshold with the least D of all. `fix-finger`: the same among
            0.95 p <= xmin <= 1.5 p, with p the peak of the log10 histogram; `fix-finger-reference`: with the published
            code's lower bound, log10(0.95 p).
        xmin_pos: for `median`: 2 takes the upper half of the spectrum.
        filter_zeros: leave out eigenvalues up to 1e-5 first, unless that would leave none.

    Raises:
        UndefinedPowerLaw: the threshold is zero, the whole tail is equal, no threshold gives alpha > 1, or there are
            fewer than two eigenvalues.
        ValueError: unknown method, xmin_pos not above 1, or eigenvalues that do not ascend.
    """
    if method not in METHODS:
        raise ValueError(f"unknown fit {method!r}: choose one of {', '.join(METHODS)}")
    if not xmin_pos > 1:
        raise ValueError(f"xmin_pos is {xmin_pos}: it must be above 1 (2 fits the upper half of the spectrum)")
    values = eigenvalues.detach().to("cpu", torch.float64)
    if filter_zeros and (values > ZERO).any():
        values = values[values > ZERO]
    if (values[1:] < values[:-1]).any():
        raise ValueError("the eigenvalues are not in ascending order: sort them first")
    if len(values) < 2:
        raise UndefinedPowerLaw(TOO_FEW)
    if method in ("median", "median-paper"):
        return _fit_median(values, xmin_pos, paper=method == "median-paper")
    if values[-1] <= 0:
        raise UndefinedPowerLaw(ZERO_THRESHOLD)
    return _least_distance(values, *_window(values, method))


def _fit_median(values: Tensor, xmin_pos: float, paper: bool) -> PowerLaw:
    count = len(values)
    if paper:
        start = count - int(count * (1 - 1 / xmin_pos))
        threshold = values[start - 1]
    else:
        start = int(count / xmin_pos)
        threshold = values[start]
    tail = values[start:]
    if threshold <= 0:
        raise UndefinedPowerLaw(ZERO_THRESHOLD)
    spread = (tail / threshold).log().sum()
    if not spread > 0:
        raise UndefinedPowerLaw(EQUAL_TAIL)
    alpha = 1 + len(tail) / spread
    empirical = torch.arange(len(tail), dtype=torch.float64) / len(tail)
    distance = (1 - (tail / threshold) ** (1 - alpha) - empirical).abs().max()
    return PowerLaw(float(alpha), float(distance), float(threshold), len(tail))


def _window(values: Tensor, method: str) -> tuple[int, int]:
    """Indices [start, stop) of the eigenvalues that may be the threshold: all above zero but the last, or those near the peak."""
    lower, upper = torch.finfo(values.dtype).tiny, math.inf
    if method != "goodness-of-fit":
        positive = values[int(torch.searchsorted(values, lower)) :]
        logs = positive.log10()
        low, high = float(logs[0]), float(logs[-1])
        if low == high:
            raise UndefinedPowerLaw(EQUAL_TAIL)
        peak = 10 ** (low + (high - low) * int(torch.histc(logs, HISTOGRAM_BINS, low, high).argmax()) / HISTOGRAM_BINS)
        lower, upper = max(lower, 0.95 * peak if method == "fix-finger" else math.log10(0.95 * peak)), 1.5 * peak
    start, stop = int(torch.searchsorted(values, lower)), int(torch.searchsorted(values, upper, right=True))
    return start, min(stop, len(values) - 1)


def _least_distance(values: Tensor, start: int, stop: int) -> PowerLaw:
    """The threshold among the eigenvalues [start, stop) whose fit is closest to its own tail; where alpha <= 1, D counts as 1.

    D of threshold i is the greatest |1 - (lambda_j / lambda_i)^(1 - alpha_i) - (j - i) / (N - i)| over j >= i.
    """
    if start >= stop:
        raise UndefinedPowerLaw(NO_THRESHOLD)
    logs = values[start:].log()  # from here on i and j count from `start`, which changes neither j - i nor N - i
    count, kept = len(logs), stop - start
    places = torch.arange(count, dtype=logs.dtype)
    sizes = count - places[:kept]
    alphas = 1 + sizes / (logs.flip(0).cumsum(0).flip(0)[:kept] - sizes * logs[:kept])
    slopes, steps = 1 - alphas, sizes.reciprocal()
    # Both parts of the difference are of rank two in (i, j): a product of [rows, 2] and [2, columns] makes each in one pass.
    exponents = torch.stack([slopes, -slopes * logs[:kept]], dim=1), torch.stack([logs, torch.ones_like(logs)])
    empirical = torch.stack([steps, -places[:kept] * steps - 1], dim=1), torch.stack([places, torch.ones_like(logs)])
    distances = torch.empty_like(alphas)
    for first in range(0, kept, BLOCK_ROWS):
        rows = slice(first, min(first + BLOCK_ROWS, kept))
        gap = (exponents[0][rows] @ exponents[1][:, first:]).exp_()  # [rows, N - first], (lambda_j / lambda_i)^(1 - alpha_i)
        gap.addmm_(empirical[0][rows], empirical[1][:, first:])
        gap[:, : len(gap)].triu_()  # nothing of what lies below a row's own threshold
        least, greatest = gap.aminmax(dim=1)
        distances[rows] = torch.maximum(-least, greatest)
    distances = torch.where(alphas.isfinite() & (alphas > 1), distances, 1.0)
    best = int(distances.argmin())
    if not distances[best] < 1:
        raise UndefinedPowerLaw(NO_THRESHOLD)
    return PowerLaw(float(alphas[best]), float(distances[best]), float(values[start + best]), count - best)
