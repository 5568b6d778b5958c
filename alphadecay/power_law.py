"""Eigenvalues -> alpha and D: the power law that fits the tail of a spectrum."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

METHODS = ("median", "median-paper", "goodness-of-fit", "fix-finger", "fix-finger-reference")
HISTOGRAM_BINS = 100  # of log10 lambda, for fix-finger
ZERO = 1e-5  # filter_zeros leaves out eigenvalues up to here (the reference's threshold)
BLOCK_ELEMENTS = 1 << 20  # the threshold searches work on at most so many [threshold, eigenvalue] pairs at a time


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
    return _least_distance(values, _candidates(values, method))


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


def _candidates(values: Tensor, method: str) -> Tensor:
    """Indices of the eigenvalues that may be the threshold: all but the last, or those near the histogram's peak."""
    thresholds = values[:-1]
    allowed = thresholds > 0
    if method != "goodness-of-fit":
        logs = values[values > 0].log10()
        low, high = float(logs[0]), float(logs[-1])
        if low == high:
            raise UndefinedPowerLaw(EQUAL_TAIL)
        counts = torch.histc(logs, HISTOGRAM_BINS, low, high)
        peak = 10 ** (low + (high - low) * int(counts.argmax()) / HISTOGRAM_BINS)
        lower = 0.95 * peak if method == "fix-finger" else math.log10(0.95 * peak)
        allowed &= (thresholds >= lower) & (thresholds <= 1.5 * peak)
    return allowed.nonzero().flatten()


def _least_distance(values: Tensor, candidates: Tensor) -> PowerLaw:
    """The candidate threshold whose fit is closest to its own tail; thresholds with alpha <= 1 count as D = 1."""
    count = len(values)
    logs = values.clamp_min(torch.finfo(values.dtype).tiny).log()
    suffix_sums = logs.flip(0).cumsum(0).flip(0)  # [N], sum of ln lambda_j over j >= i
    sizes = count - candidates  # [C]
    alphas = 1 + sizes / (suffix_sums[candidates] - sizes * logs[candidates])
    distances = torch.ones_like(alphas)
    for block in (alphas.isfinite() & (alphas > 1)).nonzero().flatten().split(max(1, BLOCK_ELEMENTS // count)):
        first, size = candidates[block, None], sizes[block, None]
        rank = torch.arange(count, dtype=torch.float64) - first  # [block, N], j of the tail's j-th value, negative before the tail
        model = 1 - torch.exp((logs - logs[first]) * (1 - alphas[block, None]))
        distances[block] = torch.where(rank >= 0, (model - rank / size).abs(), 0.0).amax(1)
    if not (distances < 1).any():
        raise UndefinedPowerLaw(NO_THRESHOLD)
    best = int(distances.argmin())
    return PowerLaw(float(alphas[best]), float(distances[best]), float(values[candidates[best]]), int(sizes[best]))
