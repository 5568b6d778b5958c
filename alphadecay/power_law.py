"""Eigenvalues -> alpha and D: the power law that fits the tail of a spectrum."""

import bisect
import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor

METHODS = ("median", "median-paper", "goodness-of-fit", "fix-finger", "fix-finger-reference")
HISTOGRAM_BINS = 100  # of log10 lambda, for fix-finger
ZERO = 1e-5  # filter_zeros leaves out eigenvalues up to here (the reference's threshold)
BLOCK_ROWS = 256  # thresholds that are tried at a time: they take 256 N numbers of memory


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


@torch.inference_mode()  # spares the many small operations of the searches a tenth of their time
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
    if len(values) > 1 and float(values.diff().min()) < 0:
        raise ValueError("the eigenvalues are not in ascending order: sort them first")
    if len(values) < 2:
        raise UndefinedPowerLaw(TOO_FEW)
    if method in ("median", "median-paper"):
        return _fit_median(values, xmin_pos, paper=method == "median-paper")
    if float(values[-1]) <= 0:
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
    numbers = values.tolist()
    lower, upper = sys.float_info.min, math.inf
    if method != "goodness-of-fit":
        logs = values[bisect.bisect_left(numbers, lower) :].log10()
        low, high = float(logs[0]), float(logs[-1])
        if low == high:
            raise UndefinedPowerLaw(EQUAL_TAIL)
        peak = 10 ** (low + (high - low) * int(torch.histc(logs, HISTOGRAM_BINS, low, high).argmax()) / HISTOGRAM_BINS)
        lower, upper = max(lower, 0.95 * peak if method == "fix-finger" else math.log10(0.95 * peak)), 1.5 * peak
    return bisect.bisect_left(numbers, lower), min(bisect.bisect_right(numbers, upper), len(numbers) - 1)


def _least_distance(values: Tensor, start: int, stop: int) -> PowerLaw:
    """The threshold among the eigenvalues [start, stop) whose fit is closest to its own tail; where alpha <= 1, D counts as 1.

    D of threshold i is the greatest |1 - (lambda_j / lambda_i)^(1 - alpha_i) - (j - i) / (N - i)| over j >= i.
    """
    if start >= stop:
        raise UndefinedPowerLaw(NO_THRESHOLD)
    logs = values[start:].log()  # from here on i and j count from `start`, which changes neither j - i nor N - i
    count, kept = len(logs), stop - start
    places = torch.arange(count, dtype=logs.dtype)
    sizes, own = (count - places[:kept])[:, None], logs[:kept, None]
    suffix_sums = logs.flip(0).cumsum(0).flip(0)[:kept, None]  # of ln lambda_j over j >= i
    slopes = sizes / (sizes * own - suffix_sums)  # [kept, 1], 1 - alpha
    steps, offsets = sizes.reciprocal(), slopes * own
    distances = torch.empty_like(logs[:kept])
    for first in range(0, kept, BLOCK_ROWS):
        rows = slice(first, min(first + BLOCK_ROWS, kept))
        # Each part of the difference, [rows, N - first], is an outer product less a column, which one call makes:
        # (lambda_j / lambda_i)^(1 - alpha_i), and (j - i) / (N - i) - 1 = j / (N - i) - N / (N - i).
        model = torch.addmm(offsets[rows], slopes[rows], logs[None, first:], beta=-1).exp_()
        gap = torch.addmm(steps[rows], steps[rows], places[None, first:], beta=-count).add_(model)
        gap[:, : len(gap)].triu_()  # nothing of what lies below a row's own threshold
        distances[rows] = gap.abs_().amax(dim=1)
    # Where alpha is infinite, D is not a number.
    distances = torch.where((slopes[:, 0] < 0) & (distances < 1), distances, 1.0)
    best = int(distances.argmin())
    alpha, distance, threshold = 1 - float(slopes[best]), float(distances[best]), float(values[start + best])
    if distance >= 1:
        raise UndefinedPowerLaw(NO_THRESHOLD)
    return PowerLaw(alpha, distance, threshold, count - best)
