"""From eigenvalues to alpha and D: fit a power law to the tail of a spectrum.

The fit is PL_Alpha_Hill of He et al. 2025 (arXiv 2506.14562), equation 2, and two searches for its
threshold.
"""

import math
import sys
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from alphadecay.constants import FIT_METHODS

HISTOGRAM_BINS = 100  # of log10 lambda, for fix-finger
# Left edges of the bins in bin widths, counted from the first; the last bin has no right edge.
EDGES = torch.tensor([*range(HISTOGRAM_BINS), math.inf], dtype=torch.float64)
ZERO = 1e-5  # filter_zeros leaves out eigenvalues up to here (the published threshold)
BLOCK_ROWS = 16  # thresholds whose D is computed at once; takes 2 * 16 * N float64 numbers
# Tolerance: larger than the rounding error of D, smaller than any real difference between two D.
ROUNDING = 1e-9
FLAT = 1e-5  # a tail whose eigenvalues differ by less would have an alpha above 100,000
# Numbers in one elementwise operation that torch leaves to one thread: waking a second thread for
# a few more numbers takes longer than it saves.
ONE_THREAD = 2**15

ZERO_THRESHOLD = "the median eigenvalue is zero"
EQUAL_TAIL = "all eigenvalues of the tail are equal"
NO_THRESHOLD = "no threshold gives a tail with alpha above 1"
TOO_FEW = "a power law needs at least two eigenvalues"
UNDEFINED = (ZERO_THRESHOLD, EQUAL_TAIL, NO_THRESHOLD, TOO_FEW)


class UndefinedPowerLaw(ValueError):
    """The spectrum has no tail that a power law can be fitted to. The text is in `UNDEFINED`."""


class PowerLaw(NamedTuple):
    """A fitted tail: the density is proportional to lambda^-alpha for lambda >= xmin.

    Attributes:
        alpha: the exponent.
        D: Kolmogorov-Smirnov distance between the tail and the fit, in [0, 1].
        xmin: the threshold, the smallest eigenvalue that the power law describes.
        tail: number of eigenvalues that the fit used.
    """

    alpha: float
    D: float
    xmin: float
    tail: int


class FitSettings(TypedDict, total=False):
    """Keyword arguments of `fit_power_law`, for functions that pass them on."""

    method: str
    xmin_pos: float
    filter_zeros: bool


@torch.inference_mode()  # saves a tenth of the time of the searches' many small operations
def fit_power_law(
    eigenvalues: Tensor,
    method: str = "median",
    xmin_pos: float = 2.0,
    filter_zeros: bool = False,
    tolerance: float = FLAT,
) -> PowerLaw:
    """Fit a power law to the upper part of a spectrum (PL_Alpha_Hill).

    Args:
        eigenvalues: [N], ascending and not negative, as `alphadecay.eigenvalues` returns them.
        method: how the threshold is chosen, one of `alphadecay.FIT_METHODS`:

            * `median`: lambda_i with i = floor(N / xmin_pos), itself one of the n = N - i values
              of the tail. This is the published code's convention.
            * `median-paper`: equation 2 of the paper: the next lower eigenvalue, not in the tail.
            * `goodness-of-fit`: of all eigenvalues the one with the smallest D.
            * `fix-finger`: the same among those with 0.95 p <= xmin <= 1.5 p, where p is the peak
              of the histogram of log10 lambda.
            * `fix-finger-reference`: as `fix-finger`, but with the lower bound of the published
              code, log10(0.95 p), which excludes almost nothing.
        xmin_pos: for the median methods; 2 fits the upper half of the spectrum.
        filter_zeros: leave out eigenvalues up to 1e-5 first, unless that would leave none.
        tolerance: relative difference up to which eigenvalues count as equal, see
            `spectral.eigenvalues.rounding_of`. The alpha of a tail that is flat up to rounding
            would be a large number that says nothing about the weight.

    Returns:
        The fitted tail.

    Raises:
        UndefinedPowerLaw: the threshold is zero, all eigenvalues of the tail are equal, no
            threshold gives alpha above 1, or there are fewer than two eigenvalues.
        ValueError: unknown method, xmin_pos not above 1, or eigenvalues that do not ascend.
    """
    if method not in FIT_METHODS:
        raise ValueError(f"unknown fit {method!r}: choose one of {', '.join(FIT_METHODS)}")
    if not xmin_pos > 1:
        raise ValueError(
            f"xmin_pos is {xmin_pos}: it must be above 1 (2 fits the upper half of the spectrum)"
        )
    values = eigenvalues.detach().to("cpu", torch.float64)
    if filter_zeros and (values > ZERO).any():
        values = values[values > ZERO]
    if values.numel() > 1 and float(values.diff().min()) < 0:
        raise ValueError("the eigenvalues are not in ascending order: sort them first")
    if values.numel() < 2:
        raise UndefinedPowerLaw(TOO_FEW)
    if method in ("median", "median-paper"):
        law = _fit_median(values, xmin_pos, paper=method == "median-paper")
        return _checked(law, float(values[-1]), tolerance)
    if float(values[0]) < sys.float_info.min:  # zero has no logarithm
        values = values[int(torch.searchsorted(values, sys.float_info.min)) :]
    if not values.numel():
        raise UndefinedPowerLaw(ZERO_THRESHOLD)
    largest = float(values[-1])
    if largest <= float(values[0]) * (1 + tolerance):
        raise UndefinedPowerLaw(EQUAL_TAIL)
    logs = values.log10()
    if method == "goodness-of-fit":
        start, stop = 0, values.numel() - 1
    else:
        start, stop = _peak_window(values, logs, method)
    law = _fit_smallest_distance(values[start:], logs[start:], stop - start)
    return _checked(law, largest, tolerance)


def _checked(law: PowerLaw, largest: float, tolerance: float) -> PowerLaw:
    """Return the fit of a tail, or raise UndefinedPowerLaw if the tail is flat."""
    if largest <= law.xmin * (1 + tolerance):
        raise UndefinedPowerLaw(EQUAL_TAIL)
    return law


def _fit_median(values: Tensor, xmin_pos: float, paper: bool) -> PowerLaw:
    """Fit the upper part of [N] values, from index floor(N / xmin_pos) on."""
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


def _peak_window(values: Tensor, logs: Tensor, method: str) -> tuple[int, int]:
    """Return the range of thresholds near the peak of the histogram of log10 lambda.

    Args:
        values: [N], ascending eigenvalues above zero.
        logs: [N], their log10.
        method: `fix-finger` or `fix-finger-reference`.

    Returns:
        Indices start and stop; stop is exclusive and at most N - 1, because a tail of one
        eigenvalue has no alpha.
    """
    low, high = float(logs[0]), float(logs[-1])
    if low == high:
        raise UndefinedPowerLaw(EQUAL_TAIL)
    width = (high - low) / HISTOGRAM_BINS
    # The logarithms ascend, so counting them is a search of the edges. torch.histc would wake its
    # threads for it.
    counts = torch.searchsorted(logs, EDGES * width + low).diff()
    peak = 10 ** (int(counts.argmax()) * width + low)
    lower = 0.95 * peak if method == "fix-finger" else math.log10(0.95 * peak)
    start = int(torch.searchsorted(values, lower))
    stop = int(torch.searchsorted(values, 1.5 * peak, right=True))
    return start, min(stop, values.numel() - 1)


def _fit_smallest_distance(values: Tensor, logs: Tensor, count: int) -> PowerLaw:
    """Fit every tail that starts at one of the first `count` eigenvalues; return the smallest D.

    Among equal D the lowest threshold is taken. Comparing a tail with its fit at about 2 sqrt(N) of
    the eigenvalues gives a lower bound of its D. The tails are fitted completely in the order of
    their bounds, until no remaining bound is below the smallest D found.

    Args:
        values: [N], ascending eigenvalues above zero.
        logs: [N], their log10.
        count: number of candidate thresholds.

    Raises:
        UndefinedPowerLaw: no threshold gives alpha above 1.
    """
    if count <= 0:
        raise UndefinedPowerLaw(NO_THRESHOLD)
    # In descending order a tail is the first n eigenvalues. Relative to the largest one, nearly
    # equal eigenvalues keep their digits.
    length = values.numel()  # faster than len(), which torch implements in Python
    logs = logs.flip(0).sub_(logs[-1])
    sizes = torch.arange(1, length + 1, dtype=logs.dtype)
    # Of each tail the sum of log10(lambda_j / lambda_i) over its eigenvalues lambda_j.
    spreads = logs.cumsum(0).addcmul_(sizes, logs, value=-1)
    rates = sizes / spreads.mul_(math.log(2))  # (alpha - 1) log2(10)
    # One column for each candidate, that of the lowest threshold first.
    tails = torch.stack([logs * rates, rates, sizes])[:, -count:].flip(1)
    logs, sizes = logs.unsqueeze(1), sizes.unsqueeze(1)
    step = max(1, math.isqrt(length) // 2)
    sample = logs[::step], sizes[::step]
    chunk = max(1, ONE_THREAD // sample[0].numel())
    parts = [
        _distances(*sample, *part.unbind())
        for part in (torch.split(tails, chunk, 1) if count > chunk else (tails,))
    ]
    bounds, order = (torch.cat(parts) if count > chunk else parts[0]).sort()
    # D and candidate. No fit has a D of 1 or more; where alpha is infinite, D is NaN.
    best = (1.0, 0)
    for first in range(0, count, BLOCK_ROWS):
        if not float(bounds[first]) <= best[0] + ROUNDING:
            break
        block = order[first : first + BLOCK_ROWS]
        distances = _distances(logs, sizes, *tails.index_select(1, block).unbind())
        best = min(best, *zip(distances.tolist(), block.tolist(), strict=True))
    distance, candidate = best
    if distance >= 1:
        raise UndefinedPowerLaw(NO_THRESHOLD)
    alpha = 1 + float(rates[-1 - candidate]) * math.log10(2)
    return PowerLaw(alpha, distance, float(values[candidate]), length - candidate)


def _distances(
    logs: Tensor, ranks: Tensor, thresholds: Tensor, rates: Tensor, sizes: Tensor
) -> Tensor:
    """Return the largest difference between each tail and its fit.

    Both are taken as the fraction of the tail at or above an eigenvalue.

    Args:
        logs: [m, 1], log10 of the eigenvalues at which to compare.
        ranks: [m, 1], number of eigenvalues of the spectrum at or above each of them.
        thresholds: [n], of each tail log10 of its threshold times its rate.
        rates: [n], of each tail (alpha - 1) log2(10).
        sizes: [n], of each tail its number of eigenvalues.

    Returns:
        [n]
    """
    # Below a tail's threshold both fractions are held at 1.
    fitted = torch.addcmul(thresholds, logs, rates, value=-1).clamp_(max=0).exp2_()
    return fitted.addcdiv_(ranks.clamp(max=sizes), sizes, value=-1).abs_().amax(dim=0)
